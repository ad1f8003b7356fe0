"""`decay_at`: how long a training lasts whose rate is constant up to some number of tokens, and then falls. Several
that differ in it alone take the same steps until the first of them decays, and each keeps a branch point there: a curve
of loss over tokens for the price of the longest and the others' decays (Haegele et al. 2024, arXiv:2405.18392).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from data_pipeline.core.config import Config
from llm.training.schedule import Schedule

BATCH_TOKENS = 524_288
"""Tokens a step, where a recipe says nothing."""


class Decaying(Config):
    """Fields of a `PretrainConfig` that is not yet whole, which its length follows from."""

    model_config = ConfigDict(extra="ignore")
    decay_at: int = Field(ge=1)
    batch_tokens: int = Field(default=BATCH_TOKENS, ge=2)
    schedule: Schedule = Schedule()

    @property
    def constant(self) -> int:
        """Count the steps before the rate falls."""
        return max(1, self.decay_at // self.batch_tokens)

    @property
    def steps(self) -> int:
        """Count all steps: the least of which so many are left when `decay_share` of them fall."""
        steps, share = self.constant, self.schedule.decay_share
        while steps - round(share * steps) < self.constant:
            steps += 1
        return steps


def fill(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `PretrainConfig`'s raw values with the tokens that follow from ``decay_at``, where it is given.

    Values that cannot be right are left alone, to be refused where they stand.

    Raises:
        ValueError: the schedule has no constant rate, or its steps differ with the length from the first one on.
    """
    given = dict(values)
    if given.get("decay_at") is None:
        return given
    try:
        decaying = Decaying.model_validate(given)
    except ValidationError:
        return {"tokens": 1, **given}
    schedule = decaying.schedule
    for wrong, right in {
        schedule.kind != "wsd": "schedule.kind: wsd, whose rate is constant before it falls",
        schedule.warmup_steps
        is None: "schedule.warmup_steps: a share of the run would be other steps in each",
        schedule.batch_warmup is not None: "no schedule.batch_warmup, whose steps are shares of the run",
        schedule.decay_share > 0.9: "a schedule.decay_share of at most 0.9",
    }.items():
        if wrong:
            raise ValueError(f"decay_at needs {right}")
    return {**given, "tokens": decaying.steps * decaying.batch_tokens}


def describe(decay_at: int | None, constant: int, tokens: int) -> list[str]:
    """Describe, for a person, what follows from ``decay_at``."""
    if decay_at is None:
        return []
    return [f"decay_at {decay_at:,}: the rate falls after step {constant:,}, and tokens are {tokens:,}"]
