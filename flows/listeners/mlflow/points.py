"""The points of metrics that MLflow gets of a training's events."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Point = tuple[str, float, int, int]
"""A metric's name, its value, its time in milliseconds since 1970, and its step."""


def event_points(event: Mapping[str, Any]) -> list[Point]:
    """A training event's metrics, under ``train/`` or ``val/``, at its step and its own time."""
    prefix = {"step": "train", "validation": "val", "checkpoint": "checkpoint"}.get(event["event"])
    if prefix is None:
        return []
    stamp = int(event["time"] * 1000)
    return [
        (f"{prefix}/{key}", float(value), stamp, event["step"])
        for key, value in event.items()
        if key not in ("event", "step", "time") and isinstance(value, int | float) and math.isfinite(value)
    ]
