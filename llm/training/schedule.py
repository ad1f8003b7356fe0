"""Schedules, as pure functions of the step: the learning rate, which warms up linearly and then
follows half a cosine (Loshchilov and Hutter 2016, arXiv:1608.03983, without restarts) or stays constant and decays at
the end (WSD: Hu et al. 2024, arXiv:2404.06395), and the size of the batch, which may start small and double. Every
parameter group's rate is its own peak times the one schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from data_pipeline.core.config import Config


class BatchWarmup(Config):
    """A batch that starts small and doubles until it is whole: early gradients agree so well that averaging more of
    them is waste (McCandlish et al. 2018, arXiv:1812.06162)."""

    start_tokens: int = Field(ge=1)
    """Tokens a step at the start: the whole batch divided by a power of two, and a multiple of the context."""
    share: float = Field(default=0.1, gt=0, lt=1)
    """Fraction of the run's tokens in which the batch is not whole, divided equally among the sizes."""


class Schedule(Config):
    """How learning rate and batch size go over a run."""

    kind: Literal["cosine", "wsd"] = "cosine"
    """cosine: falls all the way. wsd: constant, then down over the last `decay_share` of the steps, so that a run
    can be prolonged from before its decay."""
    warmup_share: float = Field(default=0.02, ge=0, lt=1)
    """Fraction of the steps in which the rate rises."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """The same in steps; when given, `warmup_share` does not count."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """The last step's rate as a fraction of the peak."""
    decay_share: float = Field(default=0.2, ge=0, le=1)
    """Fraction of wsd's steps in which the rate falls."""
    decay_shape: Literal["1-sqrt", "linear"] = "1-sqrt"
    """Curve of wsd's fall; 1-sqrt(t) ended lower than 1-t in Haegele et al. 2024, arXiv:2405.18392, 4."""
    batch_warmup: BatchWarmup | None = None
    """Begin with a smaller batch; None: all steps read batch_tokens."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind == "wsd" and self.warmup_steps is None and self.warmup_share + self.decay_share > 1:
            raise ValueError(
                f"warmup_share {self.warmup_share} and decay_share {self.decay_share} are more than the run"
            )
        return self

    def warmup_of(self, steps: int) -> int:
        """Count the steps of ``steps`` in which the rate rises."""
        return round(self.warmup_share * steps) if self.warmup_steps is None else self.warmup_steps

    def decay_of(self, steps: int) -> int:
        """Count the steps of ``steps`` in which a wsd schedule falls: those that `decay_share` rounds to, after the
        warm-up."""
        return min(round(self.decay_share * steps), steps - self.warmup_of(steps))

    def require_room(self, steps: int) -> None:
        """Refuse a warm-up that is longer than the run.

        Raises:
            ValueError: it is.
        """
        if self.warmup_of(steps) > steps:
            raise ValueError(
                f"schedule.warmup_steps is {self.warmup_of(steps)}, but the run has {steps} steps: "
                "lower it, or raise tokens"
            )

    def lr_multiplier(self, step: int, steps: int) -> float:
        """Return the rate of ``step`` in ``range(steps)`` as a fraction of the peak, in [0, 1].

        Rises over steps 0 .. warmup - 1 as (step + 1) / warmup, is 1 at step ``warmup``, and reaches `min_lr_ratio`
        at the last step.
        """
        warmup = self.warmup_of(steps)
        if step < warmup:
            return (step + 1) / warmup
        floor = self.min_lr_ratio
        if self.kind == "cosine":
            fraction = (step - warmup) / max(1, steps - 1 - warmup)
            return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, fraction))) / 2
        decay = self.decay_of(steps)
        done = step - (steps - 1 - decay)  # 0 at the last constant step, `decay` at the last of all
        if done <= 0:
            return 1.0
        fraction = done / decay
        return floor + (1 - floor) * (1 - (math.sqrt(fraction) if self.decay_shape == "1-sqrt" else fraction))


@dataclass(frozen=True)
class BatchPlan:
    """How many sequences each step reads: stairs of (steps, sequences a step), in order, the last going on for ever."""

    stairs: tuple[tuple[int, int], ...]

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return sum(steps for steps, _ in self.stairs)

    @property
    def smallest(self) -> int:
        """Sequences of the smallest batch, of which every other is a multiple."""
        return self.stairs[0][1]

    def sequences_at(self, step: int) -> int:
        """Count the sequences that ``step`` (from 0) reads."""
        for steps, sequences in self.stairs:
            if step < steps:
                return sequences
            step -= steps
        return self.stairs[-1][1]

    def sequences_before(self, step: int) -> int:
        """Count the sequences that the steps before ``step`` read."""
        total = 0
        for steps, sequences in self.stairs[:-1]:
            total += min(step, steps) * sequences
            step -= min(step, steps)
        return total + step * self.stairs[-1][1]

    def step_of(self, sequence: int) -> int:
        """Return the step that reads the ``sequence``-th of all sequences (from 0): the inverse of
        `sequences_before`."""
        first = 0
        for steps, sequences in self.stairs[:-1]:
            if sequence < steps * sequences:
                return first + sequence // sequences
            first, sequence = first + steps, sequence - steps * sequences
        return first + sequence // self.stairs[-1][1]


def batch_plan(tokens: int, batch_tokens: int, context: int, warmup: BatchWarmup | None) -> BatchPlan:
    """Return the sizes of batches that read ``tokens`` tokens, less a remainder under one whole batch; at least one
    step.

    Raises:
        ValueError: the warm-up's sizes do not divide.
    """
    stairs: list[tuple[int, int]] = []
    spent = 0
    for size in warmup_sizes(batch_tokens, context, warmup):
        assert warmup is not None
        doublings = (batch_tokens // warmup.start_tokens).bit_length() - 1
        steps = int(warmup.share * tokens / doublings / size)
        stairs.append((steps, size // context))
        spent += steps * size
    whole = (tokens - spent) // batch_tokens
    if spent == 0:
        whole = max(1, whole)
    return BatchPlan((*stairs, (whole, batch_tokens // context)))


def warmup_sizes(batch_tokens: int, context: int, warmup: BatchWarmup | None) -> list[int]:
    """Return tokens of the batches below ``batch_tokens``, doubling.

    Raises:
        ValueError: they do not end at ``batch_tokens``, or hold no whole number of sequences.
    """
    if warmup is None:
        return []
    start = warmup.start_tokens
    ratio = batch_tokens // start
    if start * ratio != batch_tokens or ratio < 2 or ratio & (ratio - 1):
        raise ValueError(
            f"schedule.batch_warmup.start_tokens {start} must be batch_tokens {batch_tokens} "
            "divided by 2, 4, 8 or another power of two"
        )
    if start % context:
        raise ValueError(
            f"schedule.batch_warmup.start_tokens {start} is not a multiple of model.context {context}"
        )
    return [start << doubling for doubling in range(ratio.bit_length() - 1)]
