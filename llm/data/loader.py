"""A rank's micro-batches, prepared ahead: while one step trains, a thread gathers the next one's sequences into
buffers that are used in turn. Looking ahead changes nothing that is read: whichever step is asked for comes out the
same, and asking for another one than expected (after a rollback) only costs the wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from llm.data.order import Indices, rank_slice
from llm.data.packed import PackedRows
from llm.data.sequences import Batch, Sequences

ORDER_BLOCK = 1 << 14
"""Samples whose sequences are worked out at once, but no more than an epoch has: for a few, numpy's calls cost far more
than the arithmetic."""


@dataclass(frozen=True)
class RankSlice:
    """A rank's slice of each step's batch, and its micro-batches."""

    rank: int
    ranks: int
    micro_batch: int
    """Sequences in a micro-batch; the last of a step may have fewer."""


class Loader:
    """The batches of one rank. Use it in a ``with`` block, or `close` it: a thread works for it.

    Args:
        sequences: where sequences are read.
        order: (first, count) -> the sequences of so many samples from the first.
        samples: step -> (its first sample, how many samples it has).
        steps: there are batches for steps 0 to ``steps - 1``.
        ahead: steps that are prepared before they are asked for.
        pinned: whether a GPU is to read the batches.
    """

    def __init__(
        self,
        sequences: Sequences | PackedRows,
        order: Callable[[int, int], Indices],
        samples: Callable[[int], tuple[int, int]],
        mine: RankSlice,
        steps: int,
        *,
        ahead: int = 2,
        pinned: bool = False,
    ) -> None:
        self.sequences, self.order, self.samples, self.mine = sequences, order, samples, mine
        self.steps, self.ahead, self.pinned = steps, ahead, pinned
        # One that is trained on, and one for each step ahead.
        self._buffers: list[Batch | None] = [None] * (ahead + 1)
        self._turn = 0
        self._block: tuple[int, Indices] = (0, np.empty(0, np.uint64))
        self._prepared: deque[tuple[int, Future[list[Batch]]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: Any) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the thread's end; what it has prepared is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def micro_batches(self, step: int) -> list[Batch]:
        """Return this rank's slice of the batch of ``step``, in order; good until the next call.

        Raises:
            Exception: whatever went wrong while the step was prepared.
        """
        if not self._prepared or self._prepared[0][0] != step:
            for _, future in self._prepared:
                future.cancel()
            self._prepared.clear()
            self._prepare(step)
        _, future = self._prepared.popleft()
        batches = future.result()
        following = self._prepared[-1][0] + 1 if self._prepared else step + 1
        for later in range(following, min(step + self.ahead, self.steps - 1) + 1):
            self._prepare(later)
        return batches

    def _prepare(self, step: int) -> None:
        """Have the thread make the batches of ``step``, in the buffer whose turn it is."""
        turn, self._turn = self._turn, (self._turn + 1) % len(self._buffers)
        self._prepared.append((step, self._thread.submit(self._make, step, turn)))

    def _make(self, step: int, turn: int) -> list[Batch]:
        everyone = self._sequences_of(*self.samples(step))
        sequences = self.sequences.arranged(rank_slice(everyone, self.mine.rank, self.mine.ranks))
        buffer = self._buffers[turn]
        if buffer is None or len(buffer.tokens_BT) < len(sequences):
            buffer = self._buffers[turn] = self.sequences.empty(len(sequences), self.pinned)
        batch = self.sequences.take(sequences, buffer)
        starts = range(0, len(sequences), self.mine.micro_batch)
        batches = [batch.slice(start, start + self.mine.micro_batch) for start in starts]
        return self.sequences.weighed(batches, sequences, everyone)

    def _sequences_of(self, first: int, count: int) -> Indices:
        """Return the sequences of a range of samples, worked out a block at a time."""
        start, block = self._block
        if not start <= first <= first + count <= start + len(block):
            start, block = self._block = (
                first,
                self.order(first, max(count, min(ORDER_BLOCK, len(self.sequences)))),
            )
        return block[first - start : first - start + count]
