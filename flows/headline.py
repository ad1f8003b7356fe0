"""A step's result in a few words, with numbers as people write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_pipeline.core.text import human_bytes
from data_pipeline.discards import MOST_REASONS, is_discard
from data_pipeline.discards import describe as discarded
from flows.stages import BY_NAME

BITS = "bits_per_byte"
"""The metric of an evaluation that models are ranked by."""


def headline(stage: str, metrics: Mapping[str, float], most: int | None = MOST_REASONS) -> str:
    """Sum a step's result up in a few words: its headline metrics, and all that it discarded.

    Args:
        most: reasons of discarding that are named of each kind; None: all.
    """
    row = BY_NAME.get(stage)  # a stage of another version of llmill has no headline
    return describe(metrics, row.shown(metrics) if row else (), most)


def describe(metrics: Mapping[str, float], names: Sequence[str], most: int | None = MOST_REASONS) -> str:
    """Name metrics that are there, and what was discarded: ``1,203 documents · 19.8 MB · 3 rejected (empty)``."""
    named = [measure(name, metrics[name]) for name in names if name in metrics and not is_discard(name)]
    return " · ".join([*named, *discarded(metrics, most)])


def measure(name: str, value: float) -> str:
    """A metric with its name, as a person would write it."""
    if name == "bytes":
        return human_bytes(value)
    return f"{quantity(value, name)} {name.replace('_', ' ').replace('/', ' ')}"


def quantity(value: float, unit: str = "") -> str:
    """``1234567`` -> ``1,234,567``; ``3.14159`` -> ``3.142``; bytes as kB, MB ..."""
    if unit == "bytes":
        return human_bytes(value)
    if abs(value) >= 100 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4g}"
