"""Match the keys of all shards in bounded memory: each shard sorts its own, ranges of key values are matched apart.

A shard writes each key once (the first of its equal ones), so a key that is everywhere costs one entry a shard. A
partition reads its range from every shard, and writes one answer an entry, which each shard then reads in its order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.span_kernels import first_of_each
from data_pipeline.documents import save_array
from data_pipeline.stage import StageContext

ENTRY = np.dtype([("key", "<u8"), ("document", "<u8"), ("row", "<u4"), ("place", "<u4")])
"""A key, where it first is in its shard (row and word), and the hash of that document's id."""
MATCHING_BYTES = 128
"""Memory that matching needs for an entry, at its peak."""
NONE = -1

Entries = NDArray[Any]
Solve = Callable[[Entries, NDArray[np.uint32]], NDArray[Any]]


@dataclass(frozen=True)
class Exchange:
    """The keys called ``name`` of a number of shards, matched in ``partitions`` ranges of keys."""

    scratch: Path
    name: str
    shards: int
    partitions: int

    @classmethod
    def run(
        cls,
        scratch: Path,
        name: str,
        entries: list[int],
        solve: Solve,
        context: StageContext,
        memory_mb: int,
    ) -> Exchange:
        """Match the keys that the shards have saved (`save_keys`), ``entries`` by shard.

        ``solve(entries, shards)`` gets entries in a range and the shard of each, and returns an answer for each; all
        workers together hold about ``memory_mb``.
        """
        room = max(1, memory_mb * 1_000_000 // context.workers // MATCHING_BYTES)
        partitions = max(min(context.workers, len(entries)), -(-sum(entries) // room))
        exchange = cls(scratch=scratch, name=name, shards=len(entries), partitions=partitions)
        context.map(
            Matching(exchange, solve),
            range(partitions),
            names=[f"match {name} {partition}" for partition in range(partitions)],
        )
        return exchange

    def keys(self, shard: int) -> Entries:
        """Map all entries of a shard, on disk."""
        entries: Entries = np.load(keys_path(self.scratch, self.name, shard), mmap_mode="r")
        return entries

    def load(self, shard: int, partition: int) -> Entries:
        """Return the entries of a shard that fall into a partition."""
        entries = self.keys(shard)
        limits = [(partition << 64) // self.partitions, ((partition + 1) << 64) // self.partitions - 1]
        start = np.searchsorted(entries["key"], np.uint64(limits[0]), side="left")
        end = np.searchsorted(entries["key"], np.uint64(limits[1]), side="right")
        return np.array(entries[start:end])

    def path(self, partition: int, kind: str) -> Path:
        return self.scratch / f"{self.name}-{kind}-{partition:05d}-of-{self.partitions:05d}.npy"

    def match(self, solve: Solve, partition: int) -> None:
        """Answer for one partition."""
        if self.path(partition, "answers").exists():
            return
        by_shard = [self.load(shard, partition) for shard in range(self.shards)]
        lengths = [len(one) for one in by_shard]
        entries = np.concatenate(by_shard)
        by_shard.clear()
        answers = solve(entries, np.repeat(np.arange(self.shards, dtype=np.uint32), lengths))
        save_array(self.path(partition, "ends"), np.cumsum([0, *lengths]))
        save_array(self.path(partition, "answers"), answers)

    def answers(self, shard: int) -> NDArray[Any]:
        """Return the answer for every entry that a shard has saved, in its order."""
        found = []
        for partition in range(self.partitions):
            start, end = np.load(self.path(partition, "ends"), mmap_mode="r")[shard : shard + 2]
            found.append(np.array(np.load(self.path(partition, "answers"), mmap_mode="r")[start:end]))
        return np.concatenate(found)


@dataclass(frozen=True)
class Matching:
    """`Exchange.match` as a function of the partition alone, that can travel to another process."""

    exchange: Exchange
    solve: Solve

    def __call__(self, partition: int) -> None:
        self.exchange.match(self.solve, partition)


def keys_path(scratch: Path, name: str, shard: int) -> Path:
    return scratch / f"{name}-keys-{shard:06d}.npy"


def group(
    keys: NDArray[np.uint64],
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct keys in order, the number of each key's group among them, and the sizes of the groups."""
    distinct, groups, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    return distinct, groups, sizes


def save_keys(path: Path, entries: Entries) -> int:
    """Save the keys of a shard, which are distinct and in order; returns how many."""
    save_array(path, entries)
    return len(entries)


def count_keys(path: Path) -> int:
    return len(np.load(path, mmap_mode="r"))


def rows_of(dtype: np.dtype[Any], count: int, **columns: NDArray[Any]) -> NDArray[Any]:
    """Return an array of records, from its columns."""
    rows = np.empty(count, dtype)
    for name, column in columns.items():
        rows[name] = column
    return rows


def firsts(
    groups: NDArray[np.int64], count: int, entries: Entries, shards: NDArray[np.uint32] | None = None
) -> NDArray[np.int64]:
    """Find the index of each group's first entry: by hash of the document's id, then by shard, row and position."""
    if shards is None:
        shards = np.zeros(len(entries), np.uint32)
    columns = [np.ascontiguousarray(entries[name]) for name in ("document", "row", "place")]
    result: NDArray[np.int64] = first_of_each(groups, count, columns[0], shards, columns[1], columns[2])
    return result


def seen_elsewhere(entries: Entries, shards: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Return whether another shard has the same key."""
    _, groups, sizes = group(entries["key"])
    return (sizes > 1)[groups]


def keeper_of_each(entries: Entries, shards: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return the document in which each key comes first, as ``shard << 32 | row``; `NONE` where no other shard has the
    key."""
    _, groups, sizes = group(entries["key"])
    first = firsts(groups, len(sizes), entries, shards)
    documents = shards[first].astype(np.int64) << 32 | entries["row"][first]
    return np.where(sizes > 1, documents, NONE)[groups]


def total_of_each(entries: Entries, shards: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Sum over all shards what each key has as ``place``."""
    _, groups, sizes = group(entries["key"])
    totals = np.zeros(len(sizes), np.int64)
    np.add.at(totals, groups, entries["place"].astype(np.int64))
    return totals[groups]
