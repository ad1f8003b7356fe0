"""Plots of sealed artifacts, logged beside their metrics in MLflow."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow.parquet as pq

from flows.drawing import Axes, Figure
from flows.engine.store import Artifact
from llm.pretrain.config import tokens_at


def plots(artifact: Artifact) -> dict[str, Figure]:
    """File name -> figure, for the stages that have something to draw."""
    draw = DRAWINGS.get(artifact.stage)
    return draw(artifact) if draw else {}


def loss_curve(artifact: Artifact) -> dict[str, Figure]:
    """Training and held-out loss over tokens."""
    losses = pq.read_table(artifact.path / "losses.parquet")
    checks = pq.read_table(artifact.path / "validation.parquet")
    figure, axes = sheet("tokens", LOSSES.get(artifact.stage, "loss (nats a token)"))
    axes.plot(losses["tokens"], losses["loss"], linewidth=1, label="training")
    at = tokens_at(artifact.manifest, checks["step"].to_numpy())
    axes.plot(at, checks["loss"], marker="o", label="held out")
    axes.legend()
    return {"loss.png": figure}


def document_histogram(artifact: Artifact) -> dict[str, Figure]:
    """How hard the held-out documents are."""
    values = pq.read_table(artifact.path / "documents.parquet")["bits_per_byte"].drop_null().to_pylist()
    figure, axes = sheet("bits per byte", "held-out documents")
    axes.hist(values, bins=min(40, max(5, len(values) // 4)))
    axes.axvline(artifact.metrics["bits_per_byte"], color="black", linewidth=1, label="over all bytes")
    axes.legend()
    return {"bits_per_byte.png": figure}


def drop_reasons(artifact: Artifact) -> dict[str, Figure]:
    """Documents dropped, by reason."""
    dropped = {
        name.removeprefix("dropped/"): count
        for name, count in artifact.metrics.items()
        if name.startswith("dropped/") and count
    }
    if not dropped:
        return {}
    figure, axes = sheet("documents dropped", "")
    axes.barh(list(dropped), list(dropped.values()))
    axes.invert_yaxis()
    return {"dropped.png": figure}


LOSSES = {"align": "loss (a pair)"}
"""Names of the axis of a loss that is not that of the next token."""


def sheet(x: str, y: str) -> tuple[Figure, Axes]:
    """An empty plot with named axes."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


DRAWINGS: dict[str, Callable[[Artifact], dict[str, Figure]]] = {
    "clean": drop_reasons,
    "pretrain": loss_curve,
    "finetune": loss_curve,
    "align": loss_curve,
    "evaluate": document_histogram,
}
