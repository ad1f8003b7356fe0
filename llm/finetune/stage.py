"""The finetune stage: a model and conversations to a model that follows them, by the trainer that pretraining has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.files import atomic_path, once
from data_pipeline.stage import Metrics, StageContext
from llm.chat.template import FILE
from llm.finetune.answers import answer, rows_of
from llm.finetune.config import FinetuneConfig
from llm.finetune.reader import Conversations
from llm.finetune.report import report
from llm.finetune.training import chat_of, check_adapters, course, read_rows, read_start, train_on_rows

ANSWERS = pa.schema(
    [("messages", pa.string()), ("held_out", pa.string()), ("before", pa.string()), ("after", pa.string())]
)
"""Columns of ``answers.parquet``; ``messages`` in JSON."""


def finetune(config: FinetuneConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Train the model of ``inputs["model"]`` on conversations, as the tokenizer of ``inputs["tokenizer"]`` writes them.

    Leaves ``model.safetensors``, ``model.json``, ``chat_template.jinja``, ``losses.parquet``, ``validation.parquet``,
    ``answers.parquet`` (held-out questions with the answers before and after), ``rejected.parquet`` and ``report.md``;
    with `lora`, the model has the adapters added in, and ``adapter`` holds these as PEFT reads them.

    Raises:
        UserError: there is no chat template, or too few conversations; the model reads fewer tokens than a row has.
    """
    config = config.resolve()
    model = read_start(inputs["model"])
    chat = chat_of(config, inputs)
    scratch, room = out / "scratch", config.row_length(model)
    read = read_rows(config, Conversations(chat), room, out, context)
    check_adapters(config, model)
    questions = read.held_out[: config.answers]
    answers = partial(answer, chat=chat, questions=questions, most=config.answer_tokens)
    before = once(scratch / "before.json", lambda: {"answers": answers(inputs["model"])})["answers"]
    train_on_rows(config, model, read, context, inputs=inputs, out=out)
    after = once(scratch / "after.json", lambda: {"answers": answers(out)})["answers"]
    with atomic_path(out / FILE) as temporary:
        temporary.write_text(chat.template, encoding="utf-8")
    metrics, checks = course(config, read, room, out)
    metrics["val_bits_per_byte"] = checks[-1]["bits_per_byte"]
    answered = rows_of(questions, before, after)
    with atomic_path(out / "answers.parquet") as path:
        rows = [
            {**row, "messages": json.dumps(row["messages"], ensure_ascii=False, allow_nan=False)}
            for row in answered
        ]
        pq.write_table(pa.Table.from_pylist(rows, ANSWERS), path, compression="zstd")
    with atomic_path(out / "report.md") as path:
        path.write_text(report(config, metrics, checks, answered, read.example), encoding="utf-8")
    return metrics
