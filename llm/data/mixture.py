"""Several sources mixed by weights: which source, and which position in that source's own order, a sample reads follows
from the sample's index alone, in whole numbers. Samples repeat in periods of 1,000 steps' worth. In each, every source
has its share of the sequences, rounded by largest remainder, so any 1,000 whole steps in a row are exact to within one
sequence; and within a period its sequences lie evenly, as the pixels of a line of that slope do (Bresenham 1965). Each
source is shuffled by itself, anew each time it has been read to its end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
import numpy.typing as npt

from llm.data.order import Indices, batch_sequences, shuffled

PERIOD_STEPS = 1000
"""Steps after which the pattern of sources repeats."""

LARGEST_PERIOD = 3_000_000_000
"""In sequences: the square still fits 63 bits."""


@dataclass(frozen=True)
class Mixture:
    """How the samples of a period are shared."""

    names: tuple[str, ...]
    """Names of sources, by falling share."""
    counts: tuple[int, ...]
    """Samples a period of each."""

    @classmethod
    def of(cls, weights: Mapping[str, float], batch_sequences: int) -> Mixture:
        """Make the mixture of positive ``weights`` (of any sum) for steps of ``batch_sequences`` sequences.

        Raises:
            ValueError: a weight so small that its source would never be read; a batch beyond all bounds.
        """
        period = PERIOD_STEPS * batch_sequences
        if period > LARGEST_PERIOD:
            raise ValueError(f"a mixture can't share out batches of {batch_sequences:,} sequences")
        total = sum(map(Fraction, weights.values()))
        quotas = {name: Fraction(weights[name]) * period / total for name in sorted(weights)}
        counts = {name: int(quota) for name, quota in quotas.items()}
        by_remainder = sorted(quotas, key=lambda name: counts[name] - quotas[name])
        for name in by_remainder[: period - sum(counts.values())]:
            counts[name] += 1
        if unread := [name for name, count in counts.items() if not count]:
            raise ValueError(
                f"the weight of {', '.join(unread)} gives not one sequence in {PERIOD_STEPS:,} steps: "
                "raise it or leave the source out"
            )
        names = sorted(counts, key=lambda name: -counts[name])
        return cls(tuple(names), tuple(counts[name] for name in names))

    @property
    def period(self) -> int:
        """Samples after which the pattern repeats."""
        return sum(self.counts)

    def positions(
        self, samples: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return for each sample the number of its source, and how many samples before it read that source.

        The largest source takes its samples of all, the next takes its own of those that are left, and so on. In any
        first n samples a source then has more than its share less one, and less than its share plus 1 + ln(sources).
        """
        periods, rank = np.divmod(samples, self.period)
        left = self.period
        sources, positions = np.full(len(samples), -1), np.empty(len(samples), np.int64)
        for source, count in enumerate(self.counts):
            before = rank * count // left
            mine = (sources < 0) & ((rank + 1) * count // left > before)
            sources[mine] = source
            positions[mine] = (periods * count + before)[mine]
            rank, left = rank - before, left - count
        return sources, positions

    def samples(self, source: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the samples that read these positions of a source's own order: the inverse of `positions`."""
        count = self.counts[source]
        periods, before = np.divmod(positions, count)
        left = self.period - sum(self.counts[:source])
        ranks = -(-(before + 1) * left // count) - 1
        for other in reversed(
            self.counts[:source]
        ):  # the rank among what the larger sources left -> among all
            left += other
            ranks = ranks * left // (left - other)
        return periods * self.period + ranks

    def read_before(self, sample: int) -> list[int]:
        """Count how many of the samples before ``sample`` read each source."""
        periods, rank = divmod(sample, self.period)
        left, found = self.period, []
        for count in self.counts:
            before = rank * count // left
            found.append(periods * count + before)
            rank, left = rank - before, left - count
        return found

    def order(self, totals: Sequence[int], seed: int) -> Callable[[int, int], Indices]:
        """(first, count) -> the sequences of so many samples, numbered source after source as `names` goes.

        ``totals`` are the sequences of each source, at least one.
        """
        firsts = np.cumsum([0, *totals])
        seeds = [source_seed(name, seed) for name in self.names]

        def sequences(first: int, count: int) -> Indices:
            sources, positions = self.positions(np.arange(first, first + count))
            found = np.empty(count, np.uint64)
            for source, total in enumerate(totals):
                here = sources == source
                own = shuffled(positions[here].astype(np.uint64), seeds[source], total)
                found[here] = own + np.uint64(firsts[source])
            return found

        return sequences


def source_seed(name: str, seed: int) -> int:
    """Return the seed that shuffles a source: others have other orders, and keep them whatever the mixture holds."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def order_of(counts: Sequence[int], seed: int, mixture: Mixture | None) -> Callable[[int, int], Indices]:
    """Return (first, count) -> which sequences so many samples read, of sources that have ``counts`` of them: by a
    mixture of these, or all alike."""
    if mixture:
        return mixture.order(counts, seed)
    return partial(batch_sequences, seed=seed, total=sum(counts))
