"""A claim about two models, or two recipes, and what makes one better than the other."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.core.text import p_text
from llm.score.statistics import LEVEL, Estimate

SECOND, FIRST, NONE = "second is better", "first is better", "no difference shown"
SAME, ALIKE, SEEDS, UNKNOWN = "same model", "same models", "seeds of one recipe", "not known"
NOT_COMPARED = "not compared"
LESS, PERHAPS_LESS = ", by less than matters", ", perhaps by less than matters"
"""Ends of an outcome where a minimum effect is asked for: the whole interval lies below it, or its near end."""
TOO_FEW = "; too few documents differ to bound it"


@dataclass(frozen=True)
class Least:
    """The least that is called a difference: the smallest ones that matter (0: all do), and the strictness of tests."""

    bits_per_byte: float = 0.0
    accuracy: float = 0.0
    """A share of the items."""
    correction: float = 1.0
    """Factor of all p-values, for looks before this one: see `flows.compare.budget`."""


ANY = Least()


@dataclass(frozen=True)
class Claim:
    """A claim about two models, or two recipes."""

    first: str
    second: str
    outcome: str
    estimate: Estimate | None = None
    adjusted: float | None = None
    """The p-value, where several tests were made at once."""

    def as_json(self) -> dict[str, Any]:
        numbers = asdict(self.estimate) if self.estimate else {}
        numbers = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return {
            "first": self.first,
            "second": self.second,
            "outcome": self.outcome,
            **numbers,
            "adjusted_p_value": self.adjusted,
        }

    @property
    def heading(self) -> str:
        """``B is better than A``."""
        a, b = self.first, self.second
        which, comma, by = self.outcome.partition(",")
        return {
            SECOND: f"{b} is better than {a}",
            FIRST: f"{a} is better than {b}",
            NONE: f"no difference shown between {a} and {b}",
            SAME: f"{a} and {b} are the same model",
            ALIKE: f"no difference: {a} and {b} make the same models",
            SEEDS: f"{a} and {b} are two seeds of one recipe",
            UNKNOWN: f"whether {a} or {b} is better is not known",
            NOT_COMPARED: f"{a} and {b} are not compared",
        }[which] + comma + by  # fmt: skip

    @property
    def missed(self) -> float | None:
        """The largest difference that the interval leaves open, where none is shown."""
        if self.outcome != NONE or self.estimate is None:
            return None
        return max(abs(self.estimate.low), abs(self.estimate.high))

    def in_words(self) -> str:
        """In words: ``B is better than A: ...``."""
        found = self.estimate
        if found is None:
            return self.heading
        several = self.adjusted is not None and self.adjusted != found.p_value
        p = f"p {p_text(found.p_value)}" + (
            f", {p_text(self.adjusted)} among all tests here" if several and self.adjusted is not None else ""
        )
        interval = (
            f"{found.difference:+.4f} bits per byte (95% interval {found.low:+.4f} to {found.high:+.4f}, {p})"
        )
        hint = ""
        if self.outcome == NONE:
            bounded = math.isfinite(found.smallest)
            hint = f"; smaller than {found.smallest:.4f} would hardly be seen" if bounded else TOO_FEW
        return f"{self.heading}: {self.second} − {self.first} = {interval}{hint}"


def outcome(estimate: Estimate, p_value: float, least: float = 0.0, *, more_is_better: bool = False) -> str:
    """Which of two is better: the one with fewer bits, or with more that is right.

    Args:
        least: smaller differences don't matter, and are called so.
    """
    if p_value >= LEVEL:
        return NONE
    found = SECOND if (estimate.difference > 0) == more_is_better else FIRST
    ends = estimate.low, estimate.high
    near, far = ends if estimate.difference > 0 else (-ends[1], -ends[0])
    if far < least:
        return found + LESS
    return found + PERHAPS_LESS if near < least and least else found
