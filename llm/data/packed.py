"""Conversations packed into rows of a fixed length: no position sees another conversation, positions count from 0 in
each, and only some of the targets count in the loss. Rows are written once and mapped into memory by each rank.
Shape suffixes: R rows, T positions, B rows of a batch.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.core.files import atomic_path
from data_pipeline.tokenize.flat import Split
from llm.data.mixture import Mixture, order_of
from llm.data.order import Indices
from llm.data.sequences import Batch

IGNORED = -1
"""In place of a target that does not count."""
REFERENCE = ".reference.npy"
"""Ending of the file of a source's nats under another model."""
ROUND = 16
"""Positions of a micro-batch are a multiple of this: of few shapes."""
INDEX = "rows.json"
"""Names the sources and their rows; written last."""


class Conversation(NamedTuple):
    """Tokens, and which of them count in the loss."""

    tokens: Sequence[int]
    counted: Sequence[bool]

    @property
    def length(self) -> int:
        """Number of positions: each token but the last is read, each but the first is a target."""
        return len(self.tokens) - 1


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Share items out among rows of ``room``, each whole: best-fit decreasing (Johnson 1973), in which the longest that
    is left goes into the fullest row that has room for it. The same items give the same rows.

    Returns:
        The numbers of each row's items.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    """Room that is left and row, by rising room; of full rows nothing."""
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        assert lengths[item] <= room, "what is longer was cut or dropped"
        place = bisect_left(free, (lengths[item], -1))
        if place == len(free):
            left, row = room, len(rows)
            rows.append([])
        else:
            left, row = free.pop(place)
        rows[row].append(item)
        if left > lengths[item]:
            insort(free, (left - lengths[item], row))
    return rows


def lay_out(
    conversations: Sequence[Conversation], rows: Sequence[Sequence[int]], room: int
) -> NDArray[np.int32]:
    """Return ``(3, R, T)``: tokens, targets (`IGNORED` where they don't count), and the number, within its row, of the
    conversation that a position belongs to. What fills a row up is a conversation of its own, of token 0."""
    laid = np.zeros((3, len(rows), room), np.int32)
    laid[1] = IGNORED
    for place, row in enumerate(rows):
        start = 0
        for number, item in enumerate(row):
            tokens, counted = conversations[item]
            end = start + len(tokens) - 1
            laid[0, place, start:end] = tokens[:-1]
            laid[1, place, start:end] = np.where(counted[1:], tokens[1:], IGNORED)
            laid[2, place, start:end] = number
            start = end
        laid[2, place, start:] = len(row)
    return laid


def write_rows(folder: Path, split: Split, laid: dict[str, NDArray[np.int32]]) -> None:
    """Write the rows of each source of a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(laid.values()):
        with atomic_path(folder / f"{split}-{number:03}.npy") as path, open(path, "wb") as file:
            np.save(file, rows)
    with atomic_path(folder / f"{split}-{INDEX}") as path:
        path.write_text(json.dumps(list(laid), ensure_ascii=False, allow_nan=False), encoding="utf-8")


def count_targets(rows_3RT: NDArray[np.int32]) -> NDArray[np.float64]:
    """Count the targets of each row that count in the loss."""
    return (rows_3RT[1] != IGNORED).sum(axis=1).astype(np.float64)


Units = Callable[[NDArray[np.int32]], NDArray[np.float64]]
"""Rows ``(3, R, T)`` -> how much each weighs in the mean over a step ``(R,)``."""


class PackedRows:
    """Rows of a split, read as `llm.data.sequences.Sequences` are: numbered from 0, source after source.

    Args:
        sources: rows ``(3, R, T)`` of each source.
        units: weight of a row in the mean over a step.
        references: nats of the targets under another model ``(R, T)``, of each source, where there is one.
    """

    def __init__(
        self,
        sources: Sequence[NDArray[np.int32]],
        units: Units = count_targets,
        references: Sequence[NDArray[np.float32]] | None = None,
    ) -> None:
        self._sources, self._units, self._references = sources, units, references
        self.counts = [source.shape[1] for source in sources]
        """Rows of each source."""

    def __len__(self) -> int:
        return sum(self.counts)

    @cached_property
    def units_R(self) -> NDArray[np.float64]:
        """Weight of each row in the mean over a step."""
        return np.concatenate([self._units(source) for source in self._sources])

    @cached_property
    def used_R(self) -> NDArray[np.int64]:
        """Positions of each row up to its last target that counts: what comes behind moves nothing."""
        places = np.arange(1, self._sources[0].shape[2] + 1)
        return np.concatenate([((source[1] != IGNORED) * places).max(axis=1) for source in self._sources])

    def empty(self, count: int, pinned: bool = False) -> Batch:
        """Make room for ``count`` rows, in memory that a GPU can read directly where ``pinned``."""
        shape = (count, self._sources[0].shape[2])
        tokens, targets, positions = (
            torch.empty(shape, dtype=torch.int64, pin_memory=pinned) for _ in range(3)
        )
        return Batch(
            tokens,
            targets,
            documents_BT=torch.empty(shape, dtype=torch.int32, pin_memory=pinned),
            positions_BT=positions,
            counted_BT=torch.empty(shape, dtype=torch.bool, pin_memory=pinned),
            reference_BT=torch.empty(shape, pin_memory=pinned) if self._references else None,
        )

    def take(self, indices: NDArray[Any], into: Batch | None = None) -> Batch:
        """Gather the rows of these indices, in ``into`` (from `empty`, at least as large) or in new memory."""
        batch = self.empty(len(indices)) if into is None else into.slice(0, len(indices))
        assert batch.documents_BT is not None
        assert batch.positions_BT is not None
        assert batch.counted_BT is not None
        ends = np.cumsum(self.counts)
        for place, index in enumerate(indices.astype(np.int64).tolist()):
            source = int(np.searchsorted(ends, index, side="right"))
            first = int(ends[source]) - self.counts[source]
            tokens_T, targets_T, documents_T = self._sources[source][:, index - first]
            batch.tokens_BT.numpy()[place] = tokens_T
            batch.targets_BT.numpy()[place] = np.maximum(targets_T, 0)
            batch.counted_BT.numpy()[place] = targets_T != IGNORED
            batch.documents_BT.numpy()[place] = documents_T
            begins_T = np.flatnonzero(np.diff(documents_T, prepend=-1))
            lengths = np.diff(begins_T, append=len(documents_T))
            batch.positions_BT.numpy()[place] = np.arange(len(documents_T)) - np.repeat(begins_T, lengths)
            if self._references and batch.reference_BT is not None:
                batch.reference_BT.numpy()[place] = self._references[source][index - first]
        return batch

    def arranged(self, rows: Indices) -> Indices:
        """Put a rank's rows of a step in the order of the positions that they use, so that those of a micro-batch use
        about as many."""
        return rows[np.argsort(self.used_R[rows.astype(np.int64)], kind="stable")]

    def needed(self, batch: Batch, rows: NDArray[Any]) -> Batch:
        """Return these rows without the positions behind all that counts in them, which move nothing."""
        used = self.used_R[rows.astype(np.int64)].max()
        return batch.begin(min(batch.tokens_BT.shape[1], math.ceil(used / ROUND) * ROUND))

    def weighed(self, batches: Sequence[Batch], mine: Indices, everyone: Indices) -> list[Batch]:
        """Return a rank's micro-batches, without the positions behind all that counts in them, with the weight of each
        in the step's loss, so that the mean over micro-batches and ranks of their means is the mean over all that
        counts in the step.

        Args:
            mine: the rows of ``batches``.
            everyone: the rows of the step, on all ranks.
        """
        total = self.units_R[everyone.astype(np.int64)].sum()
        weighed, start = [], 0
        for batch in batches:
            count = len(batch.tokens_BT)
            rows = mine[start : start + count]
            units = self.units_R[rows.astype(np.int64)].sum()
            weight = float(units * len(everyone) / (count * total))
            weighed.append(self.needed(batch, rows)._replace(weight=weight))
            start += count
        return weighed


@dataclass(frozen=True)
class Packed:
    """A job's conversations: the rows in its input folder, and the order in which training reads them."""

    folder: Path
    seed: int
    mixture: Mixture | None
    units: Units = count_targets

    def sequences(self, split: Split) -> PackedRows:
        """Return the rows of a split; for training in the order of the mixture."""
        names = json.loads((self.folder / f"{split}-{INDEX}").read_text(encoding="utf-8"))
        wanted = self.mixture.names if self.mixture and split == "train" else names
        paths = [self.folder / f"{split}-{names.index(name):03}.npy" for name in wanted]
        others = [path.with_suffix(REFERENCE) for path in paths]
        references = [np.load(path, mmap_mode="r") for path in others] if others[0].exists() else None
        return PackedRows([np.load(path, mmap_mode="r") for path in paths], self.units, references)

    def order(self, counts: Sequence[int]) -> Callable[[int, int], Indices]:
        """(first, count) -> which of the training rows so many samples read; ``counts`` are those of each source."""
        return order_of(counts, self.seed, self.mixture)
