"""What training tells of itself, line by line, and the points that MLflow gets of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EVENTS = "logs/events.jsonl"
Point = tuple[str, float, int, int]
"""A metric's name, its value, its time in milliseconds since 1970, and its step."""


def event_points(event: Mapping[str, Any]) -> list[Point]:
    """A training event's figures, under ``train/`` or ``val/``, at its step and its own time."""
    prefix = {"step": "train", "validation": "val", "checkpoint": "checkpoint"}.get(event["event"])
    if prefix is None:
        return []
    stamp = int(event["time"] * 1000)
    return [
        (f"{prefix}/{key}", float(value), stamp, event["step"])
        for key, value in event.items()
        if key not in ("event", "step", "time") and isinstance(value, int | float) and math.isfinite(value)
    ]


def read_lines(path: Path, offset: int, end: int | None = None) -> tuple[list[str], int]:
    """The whole lines of a growing file from byte ``offset`` on (to ``end``), and the offset after them."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read() if end is None else file.read(end - offset)
    except FileNotFoundError:
        return [], offset
    whole = data[: data.rfind(b"\n") + 1]
    return whole.decode().splitlines(), offset + len(whole)
