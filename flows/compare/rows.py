"""Differences between runs, as rows: a name and a value for each run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flows.compare.subjects import SCORES, Subject
from flows.engine.store import Artifact
from flows.recipe import flatten
from flows.stages import BY_NAME, STAGES

MODEL_STAGES = tuple(stage.name for stage in STAGES if stage.makes not in ("scores", "folder"))
"""Those that decide the weights."""
ABSENT = "—"
OF_FIXED = r".*/(bits_per_byte|accuracy)|centred_mean"
"""Metrics of sets and tasks, which need not be the same ones in all runs."""
COUNTED = {
    "download": ("documents", "rejected/", "left_out/"),
    "clean": ("documents", "kept", "dropped/", "lines_removed/", "cut/", "masked/"),
    "dedup": ("kept", "removed/", "spans/"),
    "tokenize": ("train_tokens", "val_tokens", "tokens/"),
}
"""Stage -> the metrics of its data; one that ends in ``/`` stands for all that begin so."""


@dataclass(frozen=True)
class Row:
    """One thing about all runs."""

    stage: str
    name: str
    values: list[Any]
    """In the order of the runs; None where a run has none."""
    comparable: bool = True
    """Whether values mean the same in all runs, so that differences between them mean something."""

    def as_json(self) -> dict[str, Any]:
        own = {"stage": self.stage, "name": self.name, "values": self.values}
        return own if self.comparable else own | {"comparable": False}

    @property
    def differs(self) -> bool:
        return len({json.dumps(value, sort_keys=True, allow_nan=False) for value in self.values}) > 1


def settings(artifact: Artifact | None) -> dict[str, Any]:
    """Return the version and the settings that made an artifact, its inputs aside."""
    if artifact is None:
        return {}
    return {"version": artifact.manifest["version"], **flatten(artifact.manifest["config"])}


def is_seed(setting: str) -> bool:
    """Whether a setting only decides chance: ``seed``, in whatever stage."""
    return setting.rpartition(".")[2] == "seed"


def setting_rows(subjects: Sequence[Subject]) -> list[Row]:
    """The settings in which the runs differ, in the order of the pipeline."""
    rows = []
    for stage in BY_NAME:
        made_by = [settings(subject.artifacts.get(stage)) for subject in subjects]
        if not all(made_by):
            continue  # an export that one of them lacks is no setting
        names = dict.fromkeys(name for one in made_by for name in one)
        rows += [Row(stage, name, [one.get(name, ABSENT) for one in made_by]) for name in names]
    return [row for row in rows if row.differs]


def recipe_rows(subjects: Sequence[Subject]) -> list[Row]:
    """Those of `setting_rows` that distinguish recipes of models."""
    return [row for row in setting_rows(subjects) if row.stage in MODEL_STAGES and not is_seed(row.name)]


def recipe_key(subject: Subject) -> str:
    """Equal for runs whose models were made by one recipe, whatever the seeds."""
    made_by = {
        stage: {
            name: value for name, value in settings(subject.artifacts.get(stage)).items() if not is_seed(name)
        }
        for stage in MODEL_STAGES
    }
    return json.dumps(made_by, sort_keys=True, allow_nan=False)


def metric_rows(subjects: Sequence[Subject]) -> list[Row]:
    """The headline metrics of each stage, and its seconds; those of sets and tasks have a table of their own."""
    rows = []
    for stage in BY_NAME.values():
        of_stage = [subject.artifacts.get(stage.name) for subject in subjects]
        rows += [
            Row(stage.name, name, [one.metrics.get(name) if one else None for one in of_stage])
            for name in dict.fromkeys(name for one in of_stage if one for name in stage.named(one.metrics))
            if not (stage.name in SCORES and re.fullmatch(OF_FIXED, name))
        ]
        seconds = [one.manifest["seconds"] if one else None for one in of_stage]
        rows.append(Row(stage.name, "seconds", seconds))
    known = [row for row in rows if any(value is not None for value in row.values)]
    return known if one_tokenizer(subjects) else [marked(row) for row in known]


def one_tokenizer(subjects: Sequence[Subject]) -> bool:
    """Whether a token stands for the same piece of text in all runs."""
    return len({subject.tokenizer for subject in subjects}) == 1


def marked(row: Row) -> Row:
    """A row of runs with different tokenizers: what is a mean over tokens is not comparable."""
    return replace(row, comparable=not re.match(r"(val_)?loss|perplexity", row.name))


def held_out(row: Row) -> bool:
    """Whether it is a metric over held-out documents."""
    return row.name.startswith("val_") or (row.stage == "evaluate" and row.name != "seconds")


def data_rows(subjects: Sequence[Subject]) -> list[Row]:
    """Documents kept and dropped by reason, tokens by source, and sequences of each source that were read."""
    rows = []
    for stage, wanted in COUNTED.items():
        metrics = [metrics_of(subject.artifacts.get(stage)) for subject in subjects]
        names = dict.fromkeys(name for one in metrics for name in chosen(one, wanted))
        rows += [Row(stage, name, [one.get(name) for one in metrics]) for name in names]
    read = [tokens_read(subject.made) for subject in subjects]
    names = dict.fromkeys(name for one in read for name in one)
    return rows + [Row("pretrain", name, [one.get(name) for one in read]) for name in names]


def metrics_of(artifact: Artifact | None) -> dict[str, float]:
    return artifact.metrics if artifact else {}


def chosen(names: Iterable[str], wanted: Sequence[str]) -> Iterator[str]:
    for one in wanted:
        yield from (name for name in names if name == one or (one.endswith("/") and name.startswith(one)))


def tokens_read(training: Artifact) -> dict[str, int]:
    """``tokens read/SOURCE`` -> tokens of it that training read, those read again counted again."""
    windows = training.path / "sources.json"
    if not windows.exists():
        return {}  # it was not trained here
    context = training.manifest["config"]["model"]["context"]
    sources = json.loads(windows.read_text(encoding="utf-8"))
    return {
        f"tokens read/{one['source']}" if one["source"] else "tokens read": one["read"] * context
        for one in sources
    }
