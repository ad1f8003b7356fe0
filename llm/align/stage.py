"""The align stage: a model and pairs of answers to a model that gives those that people prefer (direct preference
optimisation), held to the model that it starts from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import binomtest

from data_pipeline.core.files import atomic_path, once
from data_pipeline.stage import Metrics, StageContext
from llm.align.config import AlignConfig
from llm.align.pairs import Pairs
from llm.align.reference import answer_nats, on_device, write_references
from llm.align.report import report
from llm.chat.template import FILE, Chat
from llm.data.packed import Conversation
from llm.finetune.answers import answer_tokens, end_of_answer
from llm.finetune.training import (
    chat_of,
    check_adapters,
    course,
    read_rows,
    read_start,
    rows_folder,
    train_on_rows,
)
from llm.training.objective import Preferences

PAIRS = pa.schema(
    {
        "prompt": pa.string(),
        "chosen": pa.string(),
        "rejected": pa.string(),
        "chosen_reference_nats": pa.float64(),
        "chosen_model_nats": pa.float64(),
        "rejected_reference_nats": pa.float64(),
        "rejected_model_nats": pa.float64(),
    }
)
"""Columns of ``pairs.parquet``: held-out pairs (messages in JSON), and the nats of their answers under the model that
training started from and under the one that it made."""
ANSWERS = pa.schema(
    {
        "messages": pa.string(),
        "before": pa.string(),
        "after": pa.string(),
        "before_tokens": pa.int64(),
        "after_tokens": pa.int64(),
        "log_ratio": pa.float64(),
    }
)
"""Columns of ``answers.parquet``; ``log_ratio`` is how much more likely than to the reference an answer after training
is to the model that drew it (nats), whose mean estimates their divergence."""


def align(config: AlignConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Train the model of ``inputs["model"]`` to prefer the chosen answers of pairs to the rejected ones.

    Leaves what `finetune` leaves, ``pairs.parquet`` (the held-out ones), ``answers.parquet`` (drawn at temperature 1
    before and after) and ``reference`` (`llm.align.reference.KEPT`).

    Raises:
        UserError: there is no chat template, or too few pairs; the model reads fewer tokens than a row has.
    """
    config = config.resolve()
    model = read_start(inputs["model"])
    chat = chat_of(config, inputs)
    scratch, room = out / "scratch", config.row_length(model)
    reader = Pairs(chat)
    read = read_rows(config, reader, room, out, context)
    check_adapters(config, model)
    assert config.precision != "auto", "the config is resolved"
    write_references(inputs["model"], rows_folder(out), config.precision, out=out, context=context)
    asked = [one["prompt"] for one in read.held_out[: config.answers]]

    def answers(folder: Path) -> dict[str, Any]:
        return {"tokens": answer_tokens(folder, chat, asked, most=config.answer_tokens, temperature=1.0)}

    before = once(scratch / "before.json", lambda: answers(inputs["model"]))["tokens"]
    objective = Preferences(by=config.loss, beta=config.beta, label_smoothing=config.label_smoothing)
    train_on_rows(config, model, read, context, inputs=inputs, out=out, objective=objective)
    after = once(scratch / "after.json", lambda: answers(out))["tokens"]
    with atomic_path(out / FILE) as temporary:
        temporary.write_text(chat.template, encoding="utf-8")

    folders = {"reference": inputs["model"], "model": out}
    pairs = measured_pairs(reader, read.held_out, room, folders)
    answered = measured_answers(chat, asked, before, after, most=config.answer_tokens, folders=folders)
    write(out / "pairs.parquet", pairs, PAIRS)
    write(out / "answers.parquet", answered, ANSWERS)
    metrics, checks = course(config, read, room, out)
    metrics |= {f"val_{name}": checks[-1][name] for name in ("accuracy", "margin")}
    metrics |= preference_metrics(pairs, config.beta) | answer_metrics(answered)
    with atomic_path(out / "report.md") as path:
        path.write_text(report(config, metrics, checks, answered, read.example), encoding="utf-8")
    return metrics


def measured_pairs(
    reader: Pairs, pairs: Sequence[Mapping[str, Any]], room: int, folders: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """Return held-out pairs as rows, with the nats of both answers under each of the models in ``folders``."""
    rows: list[dict[str, Any]] = [
        {name: json.dumps(pair[name], ensure_ascii=False, allow_nan=False) for name in pair} for pair in pairs
    ]
    kept = [reader.fitted(pair, room) for pair in pairs]
    answers = {"chosen": [parts[0] for parts in kept], "rejected": [parts[1] for parts in kept]}
    for name, folder in folders.items():
        model = on_device(folder)
        for answer, conversations in answers.items():
            for row, nats in zip(rows, answer_nats(model, conversations), strict=True):
                row[f"{answer}_{name}_nats"] = nats
    return rows


def measured_answers(
    chat: Chat,
    asked: Sequence[Any],
    before: Sequence[list[int]],
    after: Sequence[list[int]],
    *,
    most: int,
    folders: Mapping[str, Path],
) -> list[dict[str, Any]]:
    """Return answers as rows, with how much more likely those after training are than to the reference."""
    rows: list[dict[str, Any]] = [
        {
            "messages": json.dumps(messages, ensure_ascii=False, allow_nan=False),
            "before": chat.plain.decode(old, skip_special_tokens=True),
            "after": chat.plain.decode(new, skip_special_tokens=True),
            "before_tokens": len(old),
            "after_tokens": len(new),
        }
        for messages, old, new in zip(asked, before, after, strict=True)
    ]
    if not rows:
        return rows
    drawn = []
    for messages, tokens in zip(asked, after, strict=True):
        prompt = chat.prompt(messages)
        new = tokens if len(tokens) == most else [*tokens, end_of_answer(chat)]
        drawn.append(Conversation([*prompt, *new], [*[False] * len(prompt), *[True] * len(new)]))
    reference, trained = (answer_nats(on_device(folders[name]), drawn) for name in folders)
    for row, theirs, ours in zip(rows, reference, trained, strict=True):
        row["log_ratio"] = theirs - ours
    return rows


def preference_metrics(pairs: Sequence[Mapping[str, Any]], beta: float) -> Metrics:
    """Return the share of held-out pairs whose chosen answer has become likelier against the rejected one, with its 95%
    interval (Wilson 1927), and the means of the margin and of the rewards, which are beta times the log ratios."""
    chosen, rejected = (
        beta * np.array([row[f"{answer}_reference_nats"] - row[f"{answer}_model_nats"] for row in pairs])
        for answer in ("chosen", "rejected")
    )
    right = int((chosen > rejected).sum())
    low, high = binomtest(right, len(pairs)).proportion_ci(method="wilson")
    return {
        "accuracy": right / len(pairs),
        "accuracy_low": low,
        "accuracy_high": high,
        "margin": float((chosen - rejected).mean()),
        "chosen_reward": float(chosen.mean()),
        "rejected_reward": float(rejected.mean()),
    }


def answer_metrics(answered: Sequence[Mapping[str, Any]]) -> Metrics:
    """Return the mean length of the answers before and after (tokens), and the divergence (nats an answer) with its
    standard error."""
    if not answered:
        return {}
    ratios = np.array([row["log_ratio"] for row in answered])
    found = {
        f"answer_tokens_{when}": float(np.mean([row[f"{when}_tokens"] for row in answered]))
        for when in ("before", "after")
    }
    found["divergence"] = float(ratios.mean())
    if len(ratios) > 1:
        found["divergence_error"] = float(ratios.std(ddof=1) / len(ratios) ** 0.5)
    return found


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Write rows to a Parquet file, atomically."""
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary, compression="zstd")
