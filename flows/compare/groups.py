"""Runs grouped by the recipe that made their models: its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flows.compare.rows import recipe_key, recipe_rows
from flows.compare.subjects import Subject


@dataclass(frozen=True)
class Group:
    """Runs of one recipe."""

    label: str
    """``1``, ``2`` ..."""
    settings: dict[str, Any]
    """Settings in which it differs from the other recipes here."""
    runs: list[str]
    called: str
    """Name of its first run."""
    models: list[int]
    """Places of the runs with different models: its seeds."""
    bits_per_byte: list[float]
    """Bits per byte of each of these models, on what ranks them."""

    @property
    def mean(self) -> float:
        return math.fsum(self.bits_per_byte) / len(self.bits_per_byte)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None where there is one only."""
        return float(np.std(self.bits_per_byte, ddof=1)) if len(self.bits_per_byte) > 1 else None

    @property
    def name(self) -> str:
        """``recipe 1 (lr 0.003)``, or ``recipe 1 (as “RUN”)`` where only files differ, by their hashes."""
        told = {name: value for name, value in self.settings.items() if not name.endswith("sha256")}
        parts = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in told.items())
        if self.settings and not told:
            parts = f"as “{self.called}”"
        return f"recipe {self.label}" + (f" ({parts})" if parts else "")

    def as_json(self) -> dict[str, Any]:
        own = {"label": self.label, "settings": self.settings, "runs": self.runs, "seeds": len(self.models)}
        return own | {"bits_per_byte": self.bits_per_byte, "mean": self.mean, "spread": self.spread}


def grouped(subjects: Sequence[Subject], bits_per_byte: Sequence[float]) -> list[Group]:
    """Group the runs by recipe, in the order in which recipes first appear."""
    by_key: dict[str, list[int]] = {}
    for place, subject in enumerate(subjects):
        by_key.setdefault(recipe_key(subject), []).append(place)
    telling = recipe_rows(subjects)
    groups = []
    for number, places in enumerate(by_key.values(), 1):
        models = list({subjects[place].model: place for place in reversed(places)}.values())[::-1]
        groups.append(
            Group(
                label=str(number),
                settings={f"{row.stage}.{row.name}": row.values[places[0]] for row in telling},
                runs=[subjects[place].label for place in places],
                called=subjects[places[0]].name,
                models=models,
                bits_per_byte=[bits_per_byte[place] for place in models],
            )
        )
    return groups
