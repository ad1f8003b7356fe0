"""Recovery of a long training from steps that go wrong. A step whose loss or gradient is not finite moves nothing (see
`llm.training.engine`), and the run ends when there were too many in a row. A loss that leaps above the recent ones
rolls the training back to a checkpoint, from where it reads other batches than those that led there (as PaLM was
trained: Chowdhery et al. 2022, arXiv:2204.02311, 5.1). Both are decided from losses that all ranks share, and nothing
else, so a run that was killed decides again as an undisturbed one.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from data_pipeline.core.config import Config
from data_pipeline.core.errors import UserError

MAD_TO_DEVIATION = 1.4826
"""The standard deviation of a normal distribution in units of its median absolute deviation: 1 / Phi^-1(3/4)."""

History = dict[str, list[dict[str, Any]]]


class Recovery(Config):
    """When training goes back. How often it may stands in `TrainingRuntime`: it decides no weight, only an end."""

    spike_z: float | None = Field(default=None, gt=0)
    """Roll back when a loss is this many deviations above the median of the recent ones; 10 is a leap that no batch
    explains. Off by default: it costs a checkpoint every `rollback_every` steps, and what is a spike depends on
    the data."""
    spike_window: int = Field(default=128, ge=8)
    """How many of the losses before count as recent; before there are so many, no loss is a spike."""
    rollback_every: int = Field(default=100, ge=1)
    """Steps between the checkpoints that a spike rolls back to. They are written besides those of
    `runtime.checkpoint_every`, which may change where a run is interrupted, but not what it trains."""


def robust_z(loss: float, recent: Sequence[float]) -> float:
    """Count the deviations by which ``loss`` lies above the median of ``recent``, by their median absolute
    deviation (Hampel 1974), which the spikes before it hardly move."""
    middle = statistics.median(recent)
    deviation = MAD_TO_DEVIATION * statistics.median(abs(value - middle) for value in recent)
    return (loss - middle) / max(deviation, 1e-6)


class SpikeDetector:
    """Judges each step by the steps before it, all of which are in a training's history."""

    def __init__(self, config: Recovery, *, max_nonfinite: int, max_rollbacks: int) -> None:
        self.config = config
        self.max_nonfinite, self.max_rollbacks = max_nonfinite, max_rollbacks

    def require_finite(self, history: History, done: int) -> None:
        """Count the steps that were skipped up to step ``done``.

        Raises:
            UserError: they are too many in a row.
        """
        skipped = {fact["step"] for fact in history["skipped"] if fact["reason"] == "nonfinite"}
        row = 0
        while done - row in skipped:
            row += 1
        if row > self.max_nonfinite:
            raise UserError(
                f"loss or gradient was not finite in {row} steps in a row, up to step {done}: training diverged; "
                "lower pretrain.lr (pretrain.runtime.max_nonfinite limits how many may be skipped)"
            )

    def require_any(self, history: History, steps: int) -> None:
        """Refuse to end a training that moved nothing.

        Raises:
            UserError: each of its ``steps`` was skipped.
        """
        if not history["step"]:
            raise UserError(
                f"loss or gradient was not finite in any of the {steps} steps: nothing was trained; "
                "lower pretrain.lr, or look at pretrain.model"
            )

    def spike(self, history: History) -> float | None:
        """Return the newest step's `robust_z`, where it makes a spike."""
        config = self.config
        if config.spike_z is None:
            return None
        *recent, newest = [fact["loss"] for fact in history["step"][-config.spike_window - 1 :]]
        if len(recent) < config.spike_window:
            return None
        z = robust_z(newest, recent)
        return z if z > config.spike_z else None

    def rollback_to(self, history: History, done: int) -> int:
        """Return the step that a spike in step ``done`` rolls back to.

        Raises:
            UserError: it was rolled back too often.
        """
        before = [fact for fact in history["skipped"] if fact["reason"] == "spike"]
        if len(before) >= self.max_rollbacks:
            raise UserError(
                f"the loss spiked again in step {done}, after {len(before)} rollbacks: lower pretrain.lr, or look at "
                "the data (pretrain.runtime.max_rollbacks limits how many there may be)"
            )
        return (done - 1) // self.config.rollback_every * self.config.rollback_every

    def saves_at(self, done: int) -> bool:
        """Return whether a spike may roll back to step ``done``."""
        return self.config.spike_z is not None and done % self.config.rollback_every == 0


def skipped_sequences(history: History) -> int:
    """Count the sequences that rollbacks passed over: step N reads those that come so many after its own."""
    return sum(fact["windows"] for fact in history["skipped"])
