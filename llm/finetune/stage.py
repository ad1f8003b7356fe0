"""The finetune stage: a model and conversations to a model that follows them, by the trainer that pretraining has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path, once
from data_pipeline.stage import Metrics, StageContext
from llm.chat.template import FILE, Chat
from llm.finetune.answers import answer, rows_of
from llm.finetune.config import FinetuneConfig
from llm.finetune.report import report
from llm.finetune.rows import Read, prepare_rows
from llm.model.config import ModelConfig
from llm.training.job import Job, as_begun, train


def finetune(config: FinetuneConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Train the model of ``inputs["model"]`` on conversations, as the tokenizer of ``inputs["tokenizer"]`` writes them.

    Leaves ``model.safetensors``, ``model.json``, ``chat_template.jinja``, ``losses.parquet``, ``validation.parquet``,
    ``answers.parquet`` (held-out questions with the answers before and after), ``rejected.parquet`` and ``report.md``;
    with `lora`, the model has the adapters added in, and ``adapter`` holds these as PEFT reads them.

    Raises:
        UserError: there is no chat template, or too few conversations; the model reads fewer tokens than a row has.
    """
    config = config.resolve()
    path = inputs["model"] / "model.json"
    if not path.exists():
        raise UserError(f"{inputs['model']} holds a model that llmill does not compute: it can't be trained")
    model = ModelConfig.model_validate_json(path.read_text(encoding="utf-8"))
    chat = Chat(inputs["tokenizer"], config.own_template)
    scratch = out / "scratch"
    room = config.row_length(model)
    (scratch / "rows").mkdir(parents=True, exist_ok=True)
    make = partial(prepare_rows, config, chat, room, out, scratch / "rows")
    read = Read(**once(scratch / "read.json", lambda: asdict(make())))
    for line in read.lines():
        context.note(line)
    check_adapters(config, model, context)
    questions = read.held_out[: config.answers]
    answers = partial(answer, chat=chat, questions=questions, most=config.answer_tokens)
    before = once(scratch / "before.json", lambda: {"answers": answers(inputs["model"])})["answers"]
    if not (out / "model.safetensors").exists():  # the last file that the ranks write
        train(prepare(config, model, read, inputs=inputs, out=out), context)
    after = once(scratch / "after.json", lambda: {"answers": answers(out)})["answers"]
    with atomic_path(out / FILE) as temporary:
        temporary.write_text(chat.template, encoding="utf-8")
    return summarise(config, read, model, rows_of(questions, before, after), out=out)


def check_adapters(config: FinetuneConfig, model: ModelConfig, context: StageContext) -> None:
    """See that the adapters that are asked for can be made, and say what is not written of them.

    Raises:
        UserError: the model has none of the matrices.
    """
    if config.lora is None:
        return
    gpt2 = model.positions == "learned"
    if gpt2 and {*config.lora.targets} <= {"gate_proj"}:
        raise UserError("finetune.lora.targets has no matrix of this model, whose MLP has no gate_proj")
    if gpt2:
        context.note(
            "adapters of GPT-2's layout are added into the model only: PEFT's is not written", warning=True
        )


def prepare(
    config: FinetuneConfig, model: ModelConfig, read: Read, *, inputs: Mapping[str, Path], out: Path
) -> Job:
    """Make the job of training on the rows that were written."""
    settings = config.training(model, read.rows["train"])
    if settings.runtime.validate_on.paths:
        settings = settings.with_read_sets()
    return as_begun(
        Job(
            config=settings,
            model=model,
            tokens=out / "scratch" / "rows",
            tokenizer=inputs["tokenizer"],
            out=out,
            packed=True,
            lora=config.lora,
            start=inputs["model"],
        )
    )


def summarise(
    config: FinetuneConfig, read: Read, model: ModelConfig, answered: list[dict[str, Any]], *, out: Path
) -> Metrics:
    """Return the metrics, and write the answers and the report."""
    losses = pq.read_table(out / "losses.parquet").to_pylist()
    checks = pq.read_table(out / "validation.parquet").to_pylist()
    last = losses[-max(1, len(losses) // 50) :]
    metrics = {
        "steps": float(len(losses)),
        "tokens": float(losses[-1]["tokens"]),
        "batch_tokens": float(config.batch_rows * config.row_length(model)),
        "loss": sum(row["loss"] for row in last) / len(last),
        "val_loss": checks[-1]["loss"],
        "val_loss_before": checks[0]["loss"],
        "val_bits_per_byte": checks[-1]["bits_per_byte"],
        **read.metrics(),
    }
    with atomic_path(out / "answers.parquet") as path:
        rows = [
            {**row, "messages": json.dumps(row["messages"], ensure_ascii=False, allow_nan=False)}
            for row in answered
        ]
        pq.write_table(pa.Table.from_pylist(rows, ANSWERS), path, compression="zstd")
    with atomic_path(out / "report.md") as path:
        path.write_text(report(config, metrics, checks, answered, read.example), encoding="utf-8")
    return metrics


ANSWERS = pa.schema(
    [("messages", pa.string()), ("held_out", pa.string()), ("before", pa.string()), ("after", pa.string())]
)
"""Columns of ``answers.parquet``; ``messages`` in JSON."""
