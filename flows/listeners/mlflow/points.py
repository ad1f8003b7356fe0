"""The points of metrics that MLflow gets of a training's events.

MLflow draws a metric over its step, its time or the seconds since the run began, and over nothing else (3.17). So
what is to be drawn over tokens is a metric of its own, whose step is the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Point = tuple[str, float, int, int]
"""A metric's name, its value, its time in milliseconds since 1970, and its step."""
PREFIXES = {
    "step": "train",
    "norms": "norms",
    "validation": "val",
    "scores": "scores",
    "checkpoint": "checkpoint",
}
"""Kind of a training event -> the first part of the names of its metrics."""
CURVES = {
    "step": {"loss": "train/loss", "tokens_per_second": "train/tokens_per_second"},
    "validation": {"bits_per_byte": "val/bits_per_byte", "accuracy": "val/accuracy"},
}
"""Kind of a training event -> its fields that are drawn on the page of the whole run, and how they are called there."""
OVER_TOKENS = {
    "train/loss": "tokens/train_loss",
    "val/bits_per_byte": "tokens/val_bits_per_byte",
    "val/accuracy": "tokens/val_accuracy",
}
"""Curve over steps -> the same over tokens."""
SCORED = "tokens/scores/"
"""In the names of scores over tokens."""
METRICS = 800
"""Points of a request: MLflow takes 1,000 metrics, params and tags in all."""
SYSTEM = (
    "system/cpu_utilization_percentage",
    "system/system_memory_usage_megabytes",
    "system/gpu_0_utilization_percentage",
    "system/gpu_0_memory_usage_megabytes",
)
"""System metrics that are drawn there."""
FINE_STEPS = 128
"""All of the first so many steps are drawn; behind them half as many each time that the steps double."""
EACH_STEP = {"loss", "lr", "grad_norm", "tokens_per_second", "mfu"}
"""A step's fields that are drawn for each of those; the others for the first ones, and then for one in so many."""
SELDOM_STEPS = 8
UNDRAWN = {"event", "step", "time", "eta_seconds"}
PLAIN = "pretrain"
"""The step whose curves are called as they are; those of others begin with the step's name."""


def event_points(event: Mapping[str, Any]) -> list[Point]:
    """A training event's metrics that MLflow draws, under ``train/``, ``val/`` and so on, at its step and its own time.

    All of them are in the artifact's ``logs/events.jsonl``; MLflow takes a fifth of a millisecond for each.
    """
    prefix = PREFIXES.get(event["event"])
    if prefix is None:
        return []
    stamp, step = int(event["time"] * 1000), event["step"]
    fields = event.keys() - UNDRAWN
    if event["event"] == "step":
        all_of_them = step <= SELDOM_STEPS or step % SELDOM_STEPS == 0
        fields = set() if not is_drawn(step) else fields if all_of_them else fields & EACH_STEP
    return [
        (f"{prefix}/{key}", float(value), stamp, step)
        for key, value in event.items()
        if key in fields and isinstance(value, int | float) and math.isfinite(value)
    ]


def curve_points(step_name: str, event: Mapping[str, Any]) -> list[Point]:
    """A training event's points on the page of the whole run, over steps and over tokens; none between those drawn."""
    fields = curves_of(event)
    if event["event"] == "step" and not is_drawn(event["step"]):
        return []
    stamp, prefix = int(event["time"] * 1000), "" if step_name == PLAIN else f"{step_name}/"
    points: list[Point] = []
    for field, name in fields.items():
        if field in event and math.isfinite(event[field]):
            points.append((prefix + name, float(event[field]), stamp, event["step"]))
            over_tokens = f"tokens/{name}" if event["event"] == "scores" else OVER_TOKENS.get(name)
            if over_tokens and "tokens" in event:
                points.append((prefix + over_tokens, float(event[field]), stamp, event["tokens"]))
    return points


def curves_of(event: Mapping[str, Any]) -> Mapping[str, str]:
    """A training event's fields that are drawn on the page of the whole run, and how they are called there."""
    if event["event"] == "scores":  # whose fields go by the names of sets and tasks
        return {field: f"scores/{field}" for field in event if "/" in field}
    return CURVES.get(event["event"], {})


def is_drawn(step: int) -> bool:
    """Whether a step's points are among those drawn: the same for whoever asks, however long the training is.

    10,000 steps give 526 points, a million 954: MLflow draws 320 of a chart at most, and few for MLflow.
    """
    return step % (1 << max(0, (step - 1).bit_length() - FINE_STEPS.bit_length() + 1)) == 0
