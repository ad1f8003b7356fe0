"""Which steps read a stretch of the training text, and where in their batches: `llm.data.order` and `llm.data.mixture`
turned round. A document's tokens lie in a few sequences; each is read once an epoch, at the sample index that the
inverse of the epoch's permutation names; a sample belongs to a step. So an answer costs a few numbers a sequence and
epoch, whatever the length of the run, and nothing has to be logged while it trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from llm.data.mixture import source_seed
from llm.data.order import positions_of
from llm.pretrain.config import PretrainConfig

Fate = Literal["trained", "not finite", "rolled back", "not yet"]
"""Outcome of a step that read something: it moved the model; its loss was not finite, and it moved nothing; the
training went back to before it; or the run has not come to it."""


class Stretch(NamedTuple):
    """Steps ``first`` to ``end - 1``, which read ``skipped`` samples behind their own."""

    first: int
    end: int
    skipped: int
    rolled_back: bool


class Read(NamedTuple):
    """One sequence of a document in a batch."""

    step: int
    """From 1, as events and losses count."""
    row: int
    """Index in the batch, from 0, over all ranks: of R ranks, rank ``row // (rows / R)`` reads it."""
    sequence: int
    """Its number in the flat file."""
    first: int
    """The document's first token in the sequence, from 0; position ``context`` is a target only."""
    end: int
    """After the document's last token in the sequence."""
    epoch: int
    """How many times the text had been read to its end, from 0."""
    fate: Fate


@dataclass(frozen=True)
class Training:
    """A run as far as it has come."""

    config: PretrainConfig
    done: int
    """Steps taken."""
    skipped: Sequence[Mapping[str, Any]]
    """Facts as in ``skipped.parquet``, in order: `step`, `reason`, and the sequences passed over (`windows`)."""
    before: int = 0
    """Samples before the first that is read."""

    def stretches(self) -> list[Stretch]:
        """Return the steps in the order in which they were taken; some twice, where the training went back."""
        plan, found, first, skipped = self.config.plan, [], 0, self.before
        for fact in self.skipped:
            if fact["reason"] == "spike":
                target = plan.step_of(plan.sequences_before(fact["step"]) - fact["windows"])
                found += [
                    Stretch(first=first, end=target, skipped=skipped, rolled_back=False),
                    Stretch(first=target, end=fact["step"], skipped=skipped, rolled_back=True),
                ]
                first, skipped = target, skipped + fact["windows"]
        return [*found, Stretch(first=first, end=self.config.steps, skipped=skipped, rolled_back=False)]

    def samples(self) -> int:
        """Count the samples that the whole run reads or passes over."""
        last = self.stretches()[-1]
        return self.config.plan.sequences_before(last.end) + last.skipped

    def step_of(self, sample: int, stretches: Sequence[Stretch]) -> tuple[int, int, Fate] | None:
        """Return the step (from 1) that reads a sample, the row of its batch, and what became of it."""
        plan = self.config.plan
        for stretch in stretches:
            first, end = (
                plan.sequences_before(step) + stretch.skipped for step in (stretch.first, stretch.end)
            )
            if first <= sample < end:
                step = plan.step_of(sample - stretch.skipped)
                row = sample - stretch.skipped - plan.sequences_before(step)
                return step + 1, row, self._fate(step + 1, stretch)
        return None

    def _fate(self, step: int, stretch: Stretch) -> Fate:
        if stretch.rolled_back:
            return "rolled back"
        if any(fact["reason"] == "nonfinite" and fact["step"] == step for fact in self.skipped):
            return "not finite"
        return "trained" if step <= self.done else "not yet"

    def reads(self, start: int, end: int, count: int, source: str | None = None) -> list[Read]:
        """List when tokens ``start`` to ``end - 1`` of a flat file of ``count`` sequences are read, by step and row.

        ``source``: whose file it is, under a mixture; a source that is not in the mixture is never read.
        """
        mix, context = self.config.mix, self.config.model.context
        if mix and source not in mix.names:
            return []
        sequences = np.arange(max(0, (start - 1) // context), min(count, (end - 1) // context + 1))
        total = self._count(source)
        if not len(sequences) or not total:
            return []
        epochs = np.arange(-(-total // count))
        asked, epoch = np.tile(sequences, len(epochs)), np.repeat(epochs, len(sequences))
        seed = source_seed(str(source), self.config.seed) if mix else self.config.seed
        samples = positions_of(asked.astype(np.uint64), epoch, seed, count).astype(np.int64)
        if mix:
            samples = mix.samples(mix.names.index(str(source)), samples)
        stretches, found = self.stretches(), []
        for sample, sequence, time in zip(samples.tolist(), asked.tolist(), epoch.tolist(), strict=True):
            if read := self.step_of(sample, stretches):
                first, last = max(0, start - sequence * context), min(context + 1, end - sequence * context)
                step, row, fate = read
                found.append(
                    Read(
                        step=step,
                        row=row,
                        sequence=sequence,
                        first=first,
                        end=last,
                        epoch=time,
                        fate=fate,
                    )
                )
        return sorted(found)

    def _count(self, source: str | None) -> int:
        """Count how many samples of the run read ``source``, or all of them without a mixture."""
        mix, samples = self.config.mix, self.samples()
        return mix.read_before(samples)[mix.names.index(str(source))] if mix else samples
