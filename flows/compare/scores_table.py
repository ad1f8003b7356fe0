"""The scores of several models, side by side: no figure of a sample without its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.engine.store import Artifact

Scored = Sequence[tuple[str, Artifact]]
"""Names of models, and their scores."""


def as_rows(scored: Scored) -> list[dict[str, Any]]:
    """A row a model, for programs."""
    return [
        {
            "model": name,
            "fingerprint": artifact.fingerprint,
            "path": str(artifact.path),
            "inputs": {type_: one.fingerprint for type_, one in artifact.inputs.items()},
            "metrics": artifact.metrics,
        }
        for name, artifact in scored
    ]


def show_scores(scored: Scored, console: Console) -> None:
    """Print a row a set and task, and a column a model."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("")
    table.add_column("")
    for name, _ in scored:
        table.add_column(name, justify="right", overflow="fold")
    for name, what in questions([artifact.metrics for _, artifact in scored]):
        words = f"{what} (harness)" if name.startswith(HARNESS) else WORDS[what]
        table.add_row(
            name.removeprefix(HARNESS), words, *(cell(artifact.metrics, name, what) for _, artifact in scored)
        )
    console.print()
    console.print(table, soft_wrap=False)
    console.print("\nin brackets: 95% intervals, over documents and over items", style="dim")
    for name, artifact in scored:
        console.print(f"{name}: {artifact.path}", style="dim")


WORDS = {
    "bits_per_byte": "bits per byte",
    "accuracy": "right",
    "gold_bits_per_byte": "bits per byte of the answer",
    "centred_mean": "above chance",
}
"""Metrics that a person is shown -> what they are called."""
HARNESS, INNER = "harness/", ("_low", "_high", "items")
"""Beginning of the names of metrics by lm-evaluation-harness, and ends of those that are not shown by themselves."""


def questions(metrics: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """Set or task, and metric, of each row; the mean over all tasks comes last."""
    rows = [
        (name, what)
        for key in dict.fromkeys(key for one in metrics for key in one)
        for name, _, what in [key.rpartition("/")]
        if name and (what in WORDS or (name.startswith(HARNESS) and not what.endswith(INNER)))
    ]
    return [
        *rows,
        *([("all tasks", "centred_mean")] if any("centred_mean" in one for one in metrics) else []),
    ]


def cell(metrics: Mapping[str, float], name: str, what: str) -> str:
    """A figure with its interval, where it has one."""
    value = metrics.get(what if what == "centred_mean" else f"{name}/{what}")
    if value is None:
        return ""
    low, high = (metrics.get(f"{name}/{what}_{end}") for end in ("low", "high"))
    share = what == "accuracy"
    text = f"{value:.1%}" if share else f"{value:.4f}" if what != "centred_mean" else f"{value:.3f}"
    if low is None or high is None:
        return text
    return f"{text} [{low:.1%}, {high:.1%}]" if share else f"{text} [{low:.4f}, {high:.4f}]"
