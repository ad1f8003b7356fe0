"""The start of a training that is given a model: at the end of another training or at one of its branch points, with
what the optimizer kept of it or without. It has a schedule of its own, counts its steps from 0, and reads on in the
text where the other one stopped, where that is the same text in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from llm.model.config import ModelConfig
from llm.model.layouts import behaviour_sha256, settings_to_begin
from llm.pretrain import branches
from llm.pretrain.config import PretrainConfig, read_sealed
from llm.training import checkpoint
from llm.training.recovery import skipped_sequences

FILE = "start.json"


@dataclass(frozen=True)
class Start:
    """The state that a training begins with."""

    model: Path
    """Folder of the model that it was given."""
    branch: Path | None
    """Folder of the branch point; None: the model's own weights."""
    step: int | None
    """Steps that the other training had taken; None: it is none of ours."""
    samples: int
    """Sequences that come before the first that is read."""
    again: str
    """Reason to read from the first sequence on, though the other training read the same text; empty where there is
    none."""

    def lines(self) -> list[str]:
        """Describe it for a person."""
        where = "" if self.step is None else f" after step {self.step:,}"
        lines = [f"begins with the model of {self.model.parent.name} {self.model.name}{where}"]
        if self.samples:
            lines.append(f"reads on behind the {self.samples:,} sequences that it had read")
        if self.again:
            lines.append(f"may read again what it had read: {self.again}")
        return lines


def read_start(config: PretrainConfig, model: ModelConfig, inputs: Mapping[str, Path]) -> Start:
    """Find what a training begins with, in the folder ``inputs["model"]``.

    Raises:
        UserError: the model has another shape; the branch point is not there, or can't be used.
    """
    folder = inputs["model"]
    if not (folder / "model.json").exists():
        raise UserError(f"{folder} holds a model that llmill does not compute: it can't be trained")
    theirs = ModelConfig.model_validate_json((folder / "model.json").read_text(encoding="utf-8"))
    if theirs.labels:
        raise UserError(f"{folder} holds a model that gives labels: name one that continues text")
    if (folder / "tokenizer.json").exists() and behaviour_sha256(folder) != behaviour_sha256(
        inputs["tokenizer"]
    ):
        raise UserError(
            f"{folder} has a tokenizer that cuts text otherwise: tokens would stand for other text"
        )
    require_shape(model, theirs, folder.name)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest["stage"] != "pretrain":
        return Start(model=folder, branch=None, step=None, samples=0, again="")
    sealed = read_sealed(manifest["config"], manifest["runtime"])
    step, branch, skipped = sealed.steps, None, read_skipped(folder)
    if config.start.needs_branch:
        step = sealed.step_at(config.start.at)
        branch = folder / branches.FOLDER / f"{branches.PREFIX}{step:08d}"
        skipped = read_branch(branch, step, config)
    read = samples_before(folder) + sealed.plan.sequences_before(step)
    same_text = manifest["inputs"]["tokens"]["fingerprint"] == inputs["tokens"].name
    reordered = other_order(config, sealed) if same_text else ""
    return Start(
        model=folder,
        branch=branch,
        step=step,
        samples=read + skipped_sequences({"skipped": skipped}) if same_text and not reordered else 0,
        again=reordered,
    )


def read_branch(branch: Path, step: int, config: PretrainConfig) -> list[dict[str, Any]]:
    """Check a branch point that training is to begin with; return the steps that were skipped or gone back over.

    Raises:
        UserError: it is not there, is not what was written, or is split otherwise.
    """
    record = checkpoint.read_record(branch)
    problem = "it is not there" if record is None else checkpoint.damage(branch.parent, record)
    if record is None or problem:
        raise UserError(f"the branch point of step {step:,} in {branch.parents[1]} can't be used: {problem}")
    if record.setup.tensor_parallel != config.runtime.tensor_parallel:
        raise UserError(
            f"the branch point of step {step:,} was made with tensor_parallel={record.setup.tensor_parallel}: "
            "set pretrain.runtime.tensor_parallel to that"
        )
    return list(checkpoint.read_history(branch.parent, record)["skipped"])


def require_shape(ours: ModelConfig, theirs: ModelConfig, name: str) -> None:
    """Refuse a model of another shape.

    Raises:
        UserError: it has another one.
    """
    if settings := settings_to_begin(ours, theirs):
        raise UserError(
            f"the model that this training begins with ({name}) has another shape than pretrain.model: set {settings}"
        )


def other_order(config: PretrainConfig, sealed: PretrainConfig) -> str:
    """Say why two trainings read the same text in other orders; empty where they do not."""
    for name, ours, theirs in (
        ("seed", config.seed, sealed.seed),
        ("model.context", config.model.context, sealed.model.context),
        ("mixture", config.mixture, sealed.mixture),
    ):
        if ours != theirs:
            return f"with another {name}, the text has another order"
    return ""


def read_skipped(folder: Path) -> list[dict[str, Any]]:
    """Read which steps a sealed training skipped or went back over."""
    path = folder / "skipped.parquet"
    return list(pq.read_table(path).to_pylist()) if path.exists() else []


def samples_before(folder: Path) -> int:
    """Count the sequences that came before the first that a training read."""
    path = folder / FILE
    return int(json.loads(path.read_text(encoding="utf-8"))["samples"]) if path.exists() else 0


def write_start(start: Start, out: Path) -> None:
    """Write down where a training began."""
    with atomic_path(out / FILE) as path:
        facts = {"model": start.model.name, "step": start.step, "samples": start.samples}
        path.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
