"""Check edges near the threshold on the documents' whole shingle sets.

Signatures estimate a similarity with a standard deviation of sqrt(s (1 - s) / entries) at most. Edges clearly above the
threshold (by `MARGIN` deviations) stand as estimated; for all others that signatures leave open, the exact Jaccard
similarity is computed. Only the documents of those edges are read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.core.files import atomic_path
from data_pipeline.core.kernels import kernel
from data_pipeline.core.words import Signs
from data_pipeline.dedup.candidates import read_chunks, read_raw
from data_pipeline.dedup.minhash import shingle_sets
from data_pipeline.dedup.signed import Signed
from data_pipeline.documents import read_shard, save_array

MARGIN = 4.0
"""Standard deviations of an estimate that count as certain: beyond are 3 of 100,000."""


def margin(threshold: float, entries: int) -> float:
    """Return how far an estimate from signatures of so many entries may be from a similarity at the threshold."""
    return max(MARGIN * sqrt(threshold * (1 - threshold) / entries), 1 / entries)


@dataclass(frozen=True, kw_only=True)
class VerifyRules:
    """How edges are checked."""

    ngram: int
    signs: Signs
    seed: int
    threshold: float
    certain: float
    """Estimates from here on need no check."""
    memory: int
    """Bytes of shingle sets to hold at once (but for the sets of one pair)."""


def mark_open(certain: float, edges: Sequence[Path], marks: NDArray[np.bool_]) -> None:
    """Mark the rows of documents that must be compared exactly."""
    for chunk in read_chunks(edges):
        unsure = chunk["similarity"] < certain
        marks[chunk["loser"][unsure]] = True
        marks[chunk["winner"][unsure]] = True


def save_sets(rules: VerifyRules, folder: Path, marks: Path, item: tuple[Path, int]) -> None:
    """Write the shingle sets of a shard's marked documents; an item is a shard and its first row."""
    shard, first = item
    index = folder / f"{shard.stem}-sets.npy"
    if index.exists():
        return
    marked = np.load(marks, mmap_mode="r")
    row, sizes, indices = first, [0], [np.zeros(0, np.int64)]
    with atomic_path(folder / f"{shard.stem}.shingles") as temporary, open(temporary, "wb") as file:
        for batch in read_shard(shard, ("text",)):
            wanted = marked[row : row + batch.num_rows]
            texts = batch.column("text").filter(pa.array(wanted))
            for one in shingle_sets(texts, ngram=rules.ngram, seed=rules.seed, signs=rules.signs):
                one.tofile(file)
                sizes.append(len(one))
            indices.append(row - first + np.flatnonzero(wanted))
            row += batch.num_rows
    # Each index with where its set begins, and at the end one that is no document.
    save_array(index, np.stack([np.append(np.concatenate(indices), row - first), np.cumsum(sizes)]))


@dataclass(frozen=True)
class Sets:
    """Reader of what `save_sets` wrote."""

    signed: Signed
    folder: Path

    def bounds(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Find where the sets of some ascending rows begin and end in their shards' files; shape (rows, 2)."""
        result = np.empty((len(rows), 2), np.int64)
        for stem, within, indices in self.signed.by_shard(rows):
            stored, starts = np.load(self.folder / f"{stem}-sets.npy", mmap_mode="r")
            at = np.searchsorted(stored, indices)
            result[within] = np.stack([starts[at], starts[at + 1]], axis=1)
        return result

    def load(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Read the sets of some ascending rows, one after another, and where each begins (rows + 1)."""
        bounds = self.bounds(rows)
        starts = np.append(0, np.cumsum(bounds[:, 1] - bounds[:, 0]))
        shingles = np.empty(starts[-1], np.uint64)
        for stem, within, _ in self.signed.by_shard(rows):
            stored = read_raw(self.folder / f"{stem}.shingles", np.dtype("<u8"))
            for into, (start, end) in enumerate(bounds[within].tolist(), within.start):
                shingles[starts[into] : starts[into + 1]] = stored[start:end]
        return shingles, starts


def verify_edges(rules: VerifyRules, sets: Sets, folder: Path, edges: Path) -> None:
    """Write those edges of a file that hold."""
    path = folder / edges.name
    if path.exists():
        return
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for stored in read_chunks([edges]):
            those_that_hold(rules, sets, stored).tofile(file)


def those_that_hold(rules: VerifyRules, sets: Sets, edges: NDArray[np.void]) -> NDArray[np.void]:
    """Return the edges that hold, with exact similarities where estimates don't suffice."""
    edges = np.array(edges)
    measure(rules, sets, edges)
    return edges[edges["similarity"] >= rules.threshold]


def measure(rules: VerifyRules, sets: Sets, edges: NDArray[np.void]) -> None:
    """Replace the similarity of edges that signatures leave open by the exact one."""
    unsure = np.flatnonzero(edges["similarity"] < rules.certain)
    unsure = unsure[np.lexsort((edges["loser"][unsure], edges["winner"][unsure]))]
    pairs = np.stack([edges["loser"][unsure], edges["winner"][unsure]], axis=1)
    rows, local = np.unique(pairs, return_inverse=True)
    bounds = sets.bounds(rows)
    reached = np.cumsum((bounds[:, 1] - bounds[:, 0])[local.reshape(-1, 2)].sum(axis=1))
    groups = np.flatnonzero(np.diff(reached // max(rules.memory // 8, 1), prepend=-1))
    for start, end in pairwise([*groups.tolist(), len(unsure)]):
        rows, local = np.unique(pairs[start:end], return_inverse=True)
        shingles, starts = sets.load(rows)
        edges["similarity"][unsure[start:end]] = jaccards(shingles, starts, local.reshape(-1, 2))
    edges["exact"][unsure] = True


@kernel
def jaccard(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    """Size of the intersection over size of the union of two sorted sets; 0 where both are empty."""
    left = right = shared = 0
    while left < len(one) and right < len(other):
        if one[left] == other[right]:
            shared += 1
            left += 1
            right += 1
        elif one[left] < other[right]:
            left += 1
        else:
            right += 1
    union = len(one) + len(other) - shared
    return shared / union if union else 0.0


@kernel
def jaccards(
    shingles: NDArray[np.uint64], starts: NDArray[np.int64], pairs: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Jaccard similarity of pairs of sets; set i is ``shingles[starts[i] : starts[i + 1]]``."""
    result = np.empty(len(pairs))
    for at in range(len(pairs)):
        one, other = pairs[at]
        result[at] = jaccard(
            shingles[starts[one] : starts[one + 1]], shingles[starts[other] : starts[other + 1]]
        )
    return result
