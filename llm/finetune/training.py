"""Training on packed rows, from a model that is there: what the stages that do so have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import once
from data_pipeline.stage import Metrics, StageContext
from llm.chat.template import FILE, Chat
from llm.finetune.config import FinetuneConfig, RowsConfig
from llm.finetune.rows import Read, Reader, prepare_rows
from llm.model.config import ModelConfig
from llm.training.job import Job, as_begun, train
from llm.training.objective import NEXT_TOKEN, Objective


def rows_folder(out: Path) -> Path:
    """Return where the packed rows lie until a step is sealed."""
    return out / "scratch" / "rows"


def read_start(folder: Path) -> ModelConfig:
    """Return the config of the model that training starts from.

    Raises:
        UserError: it is none that we train.
    """
    path = folder / "model.json"
    if not path.exists():
        raise UserError(f"{folder} holds a model that llmill does not compute: it can't be trained")
    model = ModelConfig.model_validate_json(path.read_text(encoding="utf-8"))
    if model.labels:
        raise UserError(f"{folder} holds a model that gives labels: name one that continues text")
    return model


def read_rows(config: RowsConfig, reader: Reader, room: int, out: Path, context: StageContext) -> Read:
    """Write the packed rows, where they are not there yet, and say what was found in the files.

    Raises:
        UserError: there is too little to train on, or to hold out.
    """
    folder = rows_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    found = once(
        out / "scratch" / "read.json",
        lambda: asdict(prepare_rows(config, reader, room=room, out=out, folder=folder)),
    )
    read = Read(**found)
    for line in read.lines():
        context.note(line)
    return read


def chat_of(config: FinetuneConfig, inputs: Mapping[str, Path]) -> Chat:
    """Return the chat template that is named; else that which the model was trained with, or the tokenizer's.

    Raises:
        UserError: there is none, or it can't be rendered.
    """
    own, trained = config.own_template, inputs["model"] / FILE
    if own is None and trained.is_file():
        own = trained.read_text(encoding="utf-8")
    return Chat(inputs["tokenizer"], own)


def check_adapters(config: RowsConfig, model: ModelConfig) -> None:
    """See that the adapters that are asked for can be made.

    Raises:
        UserError: the model has none of the matrices.
    """
    if config.lora and model.positions == "learned" and {*config.lora.targets} <= {"gate_proj"}:
        raise UserError(
            f"{config.stage}.lora.targets has no matrix of this model, whose MLP has no gate_proj"
        )


def train_on_rows(
    config: RowsConfig,
    model: ModelConfig,
    read: Read,
    context: StageContext,
    *,
    inputs: Mapping[str, Path],
    out: Path,
    objective: Objective = NEXT_TOKEN,
    last_blocks: int | None = None,
) -> None:
    """Train a model of this config on the rows that were written, where that is not done yet."""
    if (out / "model.safetensors").exists():  # the last file that the ranks write
        return
    settings = config.training(model, read.rows["train"])
    if settings.runtime.validate_on.paths:
        settings = settings.with_read_sets()
    job = Job(
        config=settings,
        model=model,
        tokens=rows_folder(out),
        tokenizer=inputs["tokenizer"],
        out=out,
        packed=True,
        lora=config.lora,
        last_blocks=last_blocks,
        start=inputs["model"],
        objective=objective,
    )
    train(as_begun(job), context)


def course(
    config: RowsConfig, read: Read, room: int, out: Path
) -> tuple[Metrics, Sequence[Mapping[str, Any]]]:
    """Return the metrics of a training that has ended, and what was measured on held-out rows on the way."""
    losses = pq.read_table(out / "losses.parquet").to_pylist()
    checks: list[dict[str, Any]] = pq.read_table(out / "validation.parquet").to_pylist()
    last = losses[-max(1, len(losses) // 50) :]
    metrics = {
        "steps": float(len(losses)),
        "tokens": float(losses[-1]["tokens"]),
        "batch_tokens": float(config.batch_rows * room),
        "loss": sum(row["loss"] for row in last) / len(last),
        "val_loss": checks[-1]["loss"],
        "val_loss_before": checks[0]["loss"],
        **read.metrics(),
    }
    return metrics, checks
