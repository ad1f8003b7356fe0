"""Which documents may be duplicates of which: locality-sensitive hashing, one partition of the keys at a time.

Documents with an equal key (that is, an equal band of their signatures) form a bucket (Leskovec, Rajaraman, Ullman,
"Mining of Massive Datasets", section 3.4). In each bucket documents are compared with preferred ones by their whole
signatures; those that agree enough become an edge from the less to the more preferred. Memory is bounded: a range of
keys with more entries than fit is halved, and a single key with too many goes through in chunks. Edges depend neither
on partitions nor on memory: every bucket is treated by the same rule, and a pair that meets several times gives one,
if possible from a bucket in which all are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data_pipeline.core.files import atomic_path
from data_pipeline.dedup.buckets import UNLIKELY, compare_buckets
from data_pipeline.dedup.minhash import band_hashes
from data_pipeline.dedup.signed import KEYS, Kind, Signed

EDGE = np.dtype([("loser", "<i8"), ("winner", "<i8"), ("tie", "<u8"), ("similarity", "<f8"), ("exact", "?")])
"""``loser`` repeats the preferred ``winner``. ``tie`` orders winners by a hash of their texts."""
NONE = -1
NO_KEYS, NO_ROWS, NO_EDGES = np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, EDGE)
EDGES_AT_ONCE = 1 << 20
FOUND_AT_ONCE = 1 << 17
"""Edges that are found before they are handed on."""
PARTITION_ENTRIES = 1 << 22
"""Entries in a partition, about, however much memory there is: so that there is work for many workers."""
ENTRY_BYTES = 80
"""Memory for an entry while a range is loaded, sorted and grouped."""
DOCUMENT_BYTES = 600
"""Memory for a document while buckets are compared, besides its signature: id, rank, row."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """How buckets are searched."""

    kind: Kind
    bands: int
    rows: int
    least: int
    """Entries of two signatures that must agree."""
    likely: int
    """Entries in agreement that make an edge likely to hold."""
    leaders: int
    """Documents of a bucket that less preferred ones are compared with, at most."""
    most: int
    """Likely edges that a document gets from a bucket, and `UNLIKELY` times as many others: to the most preferred."""
    memory: int
    """Bytes to stay below."""

    @property
    def most_entries(self) -> int:
        """Entries that are loaded at once, at most (but for one key)."""
        return max(self.memory // ENTRY_BYTES, 2)

    def partitions(self, documents: float) -> int:
        """Into how many partitions to divide the keys; no result depends on it."""
        return max(1, ceil(documents * self.bands / min(self.most_entries, PARTITION_ENTRIES)))

    @property
    def most_members(self) -> int:
        """Members of buckets that are compared at once, at most."""
        chunk = self.memory // 2 // (DOCUMENT_BYTES + self.bands * (4 * self.rows + 8))
        return max(chunk, 2 * (self.leaders + 1))


@dataclass(frozen=True, kw_only=True)
class Again:
    """A second search, for the documents alone that the first kept without comparing them with all that it should.

    The bounds of the first search count what is likely. Documents that share much but are no duplicates can use them
    up, so what is left open is looked at once more, by exact similarities and without those bounds.
    """

    seekers: Path
    """``.npy``, by row: which documents are compared with those preferred to them."""
    kept: Path
    """``.npy``, by row: which documents the first search left; only these lead a crowd."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The documents that are searched, and what is known of them. Small: it travels to every task."""

    signed: Signed
    copies: Path | None = None
    """``.npy``, by row: all documents but those with `NONE` are left out."""
    crowds: NDArray[np.uint64] = field(default_factory=lambda: NO_KEYS)
    """Keys of all crowds, ascending: a pair gets its edge from another bucket if it shares one."""
    again: Again | None = None


def find_crowds(search: Search, corpus: Corpus, partition: tuple[int, int]) -> list[int]:
    """Find the keys of a partition that more documents have than may be leaders: a pair may go unnoticed there."""
    number, partitions = partition
    finder = Finder.of(search, corpus)
    return [key for keys in finder.count_keys(*partition_bounds(number, partitions)) for key in keys.tolist()]


def partition_bounds(number: int, partitions: int) -> tuple[int, int]:
    """Return the first key of a partition, and the end of its keys."""
    return KEYS * number // partitions, KEYS * (number + 1) // partitions


Check = Callable[[NDArray[np.void]], NDArray[np.void]]
"""Which of some edges hold."""


def search_partition(
    search: Search, corpus: Corpus, folder: Path, check: Check | None, partition: tuple[int, int]
) -> int:
    """Write the edges (`EDGE`) and the rows whose search was cut short of a partition (number, of how many) of keys.

    Returns the number of edges: those that hold, where there is a ``check``.
    """
    number, partitions = partition
    path = folder / f"{number:05d}-of-{partitions:05d}.edges"
    if not path.exists():
        finder = Finder.of(search, corpus)
        with (
            atomic_path(path) as edges_path,
            atomic_path(path.with_suffix(".cut")) as cut_path,
            open(edges_path, "wb") as file,
            open(cut_path, "wb") as cut,
        ):
            for edges, cut_rows in finder.find(*partition_bounds(number, partitions)):
                (check(edges) if check and len(edges) else edges).tofile(file)
                cut_rows.tofile(cut)
    return path.stat().st_size // EDGE.itemsize


def mark_partition(search: Search, corpus: Corpus, folder: Path, partition: tuple[int, int]) -> None:
    """Write the rows of all documents that `search_partition` finds edges of, without the edges."""
    number, partitions = partition
    path = folder / f"{number:05d}-of-{partitions:05d}.rows"
    if not path.exists():
        rows = NO_ROWS
        for edges, _ in Finder.of(search, corpus).find(*partition_bounds(number, partitions)):
            rows = np.unique(np.concatenate([rows, edges["loser"], edges["winner"]]))
        with atomic_path(path) as temporary:
            rows.tofile(temporary)


def read_raw(path: Path, dtype: np.dtype) -> NDArray[np.void]:
    """Return the records of a raw file, which stay on disk."""
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r")


def read_chunks(paths: Iterable[Path], at_once: int = EDGES_AT_ONCE) -> Iterator[NDArray[np.void]]:
    """Yield the edges of some files, ``at_once`` at a time; they stay on disk."""
    for path in paths:
        edges = read_raw(path, EDGE)
        for start in range(0, len(edges), at_once):
            yield edges[start : start + at_once]


Found = tuple[NDArray[np.void], NDArray[np.int64]]
"""Edges, and rows of documents whose search was cut short."""


@dataclass(frozen=True, kw_only=True)
class Finder:
    """Finds edges in ranges of keys."""

    search: Search
    signed: Signed
    copies: NDArray[np.int64] | None
    crowds: NDArray[np.uint64]
    seekers: NDArray[np.bool_] | None
    """Mask of the rows that seek, as in `Again`; None: all seek."""
    kept: NDArray[np.bool_] | None

    @classmethod
    def of(cls, search: Search, corpus: Corpus) -> Self:
        """Map into memory what is known of the documents."""
        again = corpus.again
        paths = (corpus.copies, again and again.seekers, again and again.kept)
        copies, seekers, kept = (np.load(path, mmap_mode="r") if path else None for path in paths)
        return cls(
            search=search,
            signed=corpus.signed,
            copies=copies,
            crowds=corpus.crowds,
            seekers=seekers,
            kept=kept,
        )

    def count_keys(self, low: int, high: int) -> Iterator[NDArray[np.uint64]]:
        """Yield the keys of crowds from ``low`` to below ``high``."""
        count = self.signed.count(self.search.kind, low, high)
        if count > self.search.most_entries and high - low > 1:
            middle = (low + high) // 2
            yield from self.count_keys(low, middle)
            yield from self.count_keys(middle, high)
        elif count > self.search.most_entries:
            if sum(map(len, self.chunks(low))) > self.search.leaders:
                yield np.array([low], np.uint64)
        elif count > self.search.leaders:
            keys, sizes = np.unique(self.shared(low, high)[0], return_counts=True)
            yield keys[sizes > self.search.leaders]

    def find(self, low: int, high: int) -> Iterator[Found]:
        """Edges, and rows whose search was cut short, of all buckets with keys from ``low`` to below ``high``."""
        count = self.signed.count(self.search.kind, low, high)
        if count > self.search.most_entries and high - low > 1:
            middle = (low + high) // 2
            yield from self.find(low, middle)
            yield from self.find(middle, high)
        elif count > self.search.most_entries:
            yield from self.find_in_crowd(low)
        elif count:
            yield from self.find_in_buckets(*self.shared(low, high))

    def find_in_buckets(self, keys: NDArray[np.uint64], rows: NDArray[np.int64]) -> Iterator[Found]:
        """Yield the same for buckets that are loaded: rows by ascending key."""
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))[: len(keys)]
        sizes = np.diff(starts, append=len(keys))
        crowded = sizes > self.search.most_members
        for key in keys[starts[crowded]].tolist():
            yield from self.find_in_crowd(key)
        among = np.repeat(~crowded, sizes)
        keys, rows, ends = keys[among], rows[among], np.cumsum(sizes[~crowded])
        some = np.flatnonzero(np.diff(ends // self.search.most_members, prepend=0))
        for start, end in pairwise([0, *(ends[some] - sizes[~crowded][some]).tolist(), len(keys)]):
            if start < end:
                yield from self.compare(keys[start:end], rows[start:end])

    def find_in_crowd(self, key: int) -> Iterator[Found]:
        """Yield the same for one key that more documents have than fit: the most preferred first, then ever less so."""
        if self.seekers is not None and not any(self.seekers[rows].any() for rows in self.chunks(key)):
            return
        leaders = last = np.zeros(0, np.int64)
        passed = 0
        while len(leaders) < self.search.leaders:
            best = np.zeros(0, np.int64)
            for rows in self.chunks(key):
                best = self.in_order(np.union1d(best, self.beyond(last, rows)))[
                    : self.search.most_members // 2
                ]
            if not len(best):
                return
            leaders = yield from self.compare(key, best, leaders, passed)
            last, passed = best[-1:], passed + len(best)
        for rows in self.chunks(key):  # no order among them matters any more
            yield from self.compare(key, self.beyond(last, rows), leaders, passed)

    def in_order(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ascending rows in order of preference."""
        return rows[np.argsort(self.signed.rank(rows))]

    def beyond(self, last: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of some rows that are less preferred than ``last`` (all, where that is empty), ascending."""
        together = np.union1d(last, rows)
        rank = self.signed.rank(together)
        return together[rank > rank[np.searchsorted(together, last)]] if len(last) else together

    def chunks(self, key: int) -> Iterator[NDArray[np.int64]]:
        """Yield the rows that have a key, a bounded number at a time."""
        waiting, count = [], 0
        size = max(self.search.most_members // 2, 1)
        for _, rows in self.signed.slices(self.search.kind, key, key + 1):
            for start in range(0, len(rows), size):
                waiting.append(self.originals(rows[start : start + size]))
                count += len(waiting[-1])
                if count >= size:
                    yield np.concatenate(waiting)
                    waiting, count = [], 0
        if count:
            yield np.concatenate(waiting)

    def originals(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return rows if self.copies is None else rows[self.copies[rows] == NONE]

    def shared(self, low: int, high: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return keys that several documents have, ascending, and the rows that have them."""
        found = list(self.signed.slices(self.search.kind, low, high))
        keys = np.concatenate([keys for keys, _ in found])
        rows = np.concatenate([rows for _, rows in found])
        if self.copies is not None:
            among = self.copies[rows] == NONE
            keys, rows = keys[among], rows[among]
        if self.seekers is not None:
            sought = np.unique(keys[self.seekers[rows]])
            among = is_among(keys, sought)
            keys, rows = keys[among], rows[among]
        order = np.argsort(keys)
        keys, rows = keys[order], rows[order]
        same = keys[1:] == keys[:-1]
        shared = np.zeros(len(keys), np.bool_)
        shared[1:] |= same
        shared[:-1] |= same
        return keys[shared], rows[shared]

    def compare(
        self,
        keys: NDArray[np.uint64] | int,
        rows: NDArray[np.int64],
        leaders: NDArray[np.int64] = NO_ROWS,
        passed: int = 0,
    ) -> Generator[Found, None, NDArray[np.int64]]:
        """Yield edges of the documents of each bucket, and those cut short; returns the leaders of the last bucket.

        ``leaders`` are more preferred ones of the same bucket, which have been compared already; they are of the
        ``passed`` documents that came before.
        """
        skip, whole = len(leaders), not isinstance(keys, int)
        rows = np.append(leaders, rows)
        keys = np.full(len(rows), keys, np.uint64) if isinstance(keys, int) else keys
        search = self.search
        documents, member = np.unique(rows, return_inverse=True)
        order = np.lexsort((self.signed.rank(documents)[member], keys))
        keys, member = keys[order], member[order]
        starts = np.append(np.flatnonzero(np.append(True, keys[1:] != keys[:-1])), len(keys))
        signatures = self.signed.gather(f"{search.kind}-signatures", documents)
        hashes = band_hashes(signatures, search.bands, search.rows)
        crowded = np.isin(hashes, self.crowds)
        ties = self.signed.gather("text-signatures", documents)[:, :4].copy().view("<u8")[:, 0]
        leader = np.empty(min(search.leaders, len(member)), np.int64)
        found = np.empty((max(FOUND_AT_ONCE, min((1 + UNLIKELY) * search.most, len(leader))), 3), np.int64)
        everyone = np.ones(len(documents), np.bool_)
        seeks, leads = (everyone if one is None else one[documents] for one in (self.seekers, self.kept))
        cut = np.zeros(len(documents), np.bool_)
        place = np.zeros(3, np.int64)
        while place[0] < len(starts) - 1:
            used = compare_buckets(
                keys,
                starts,
                member,
                signatures,
                hashes,
                crowded,
                seeks,
                leads,
                self.seekers is not None,
                whole,
                search.least,
                search.likely,
                search.most,
                skip,
                passed,
                place,
                leader,
                cut,
                found,
            )
            edges = np.zeros(used, EDGE)
            edges["loser"], edges["winner"] = documents[found[:used, 0]], documents[found[:used, 1]]
            edges["tie"] = ties[found[:used, 1]]
            edges["similarity"] = found[:used, 2] / signatures.shape[1]
            yield edges, NO_ROWS
        yield NO_EDGES, documents[cut]
        return documents[leader[: place[2]]]


def is_among(values: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Find which of many values are among a few that are in order."""
    if not len(wanted):
        return np.zeros(len(values), np.bool_)
    at = np.minimum(np.searchsorted(wanted, values), len(wanted) - 1)
    return wanted[at] == values
