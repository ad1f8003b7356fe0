"""Plots of sealed artifacts, logged beside their metrics in MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
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


def label_plots(artifact: Artifact) -> dict[str, Figure]:
    """Loss, confusion of labels, and confidence against what is right."""
    rows = pq.read_table(artifact.path / "predictions.parquet").to_pylist()
    names = json.loads((artifact.path / "labels.json").read_text(encoding="utf-8"))["labels"]
    drawn = loss_curve(artifact)
    if len(names) <= MOST_LABELS and all(len(row["labels"]) == len(row["given"]) == 1 for row in rows):
        places = {name: place for place, name in enumerate(names)}
        counts = np.zeros((len(names), len(names)), int)
        for row in rows:
            counts[places[row["labels"][0]], places[row["given"][0]]] += 1
        figure, axes = sheet("label that is given", "label")
        axes.grid(visible=False)
        axes.imshow(counts / np.maximum(1, counts.sum(axis=1, keepdims=True)), cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        for (row, column), count in np.ndenumerate(counts):
            share = count / max(1, counts[row].sum())
            axes.text(
                column, row, f"{count:,}", ha="center", va="center", color="white" if share > 0.5 else "black"
            )
        drawn["confusion.png"] = figure
    confidence = np.array([max(row["probabilities"]) for row in rows])
    right = np.array([row["right"] for row in rows])
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    used = [one for one in range(BINS) if (bins == one).any()]
    figure, axes = sheet("probability of the likeliest label", "share that is right")
    axes.plot([0, 1], [0, 1], color="black", linewidth=1)
    axes.plot(
        [confidence[bins == one].mean() for one in used], [right[bins == one].mean() for one in used], "o-"
    )
    return drawn | {"calibration.png": figure}


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


MOST_LABELS = 20
"""Labels of which confusions are drawn."""
BINS = 10
LOSSES = {"align": "loss (a pair)", "classify": "loss (nats a text)"}
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
    "classify": label_plots,
    "evaluate": document_histogram,
}
