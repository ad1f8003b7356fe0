"""The shuffle between documents and token shards: sorted runs on disk, and one range of keys merged from all of them.

A sorted run is an Arrow file of record batches, each sorted by key (a hash of the document's id), mapped into memory.
Whoever writes the documents of a range of keys looks into every run; where there are more than `FAN_IN` runs, groups of
them are first gathered into fewer, cut by ranges of keys, so that no task ever opens more than `FAN_IN` files a range.
Tokens travel as bytes: Arrow copies a list of numbers element by element, and bytes as a block.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.core.files import atomic_path
from data_pipeline.hashing import HASHES
from data_pipeline.stage import StageContext

RUN_BYTES = 1 << 26
"""Ids and tokens that are held in memory to be sorted at once, while a run is written."""
GATHER_BYTES = 1 << 28
"""Ids and tokens, about, of one range of keys of gathered runs, which is held in memory."""
FAN_IN = 256
"""Runs that a range of keys is merged from at most."""
RUN = pa.schema([("id", pa.large_string()), ("key", pa.uint64()), ("data", pa.large_binary())])
"""``data`` is what is carried: the tokens of a document, or its text. Large: a shard's ids may pass 2 GiB."""


@dataclass(frozen=True)
class SortedRuns:
    """A set of sorted runs, each cut into the same ranges of keys (one file a range)."""

    folder: Path
    names: tuple[str, ...]
    firsts: tuple[int, ...] = (0,)
    """The smallest key of each range."""

    def path(self, name: str, index: int) -> Path:
        return self.folder / f"{name}-{index:05d}.arrow"

    def last(self, index: int) -> int:
        """Return the largest key of a range."""
        return (*self.firsts, HASHES)[index + 1] - 1

    def size(self) -> int:
        """Return the bytes on disk."""
        ranges = range(len(self.firsts))
        return sum(self.path(name, index).stat().st_size for name in self.names for index in ranges)

    def between(self, first: int, last: int) -> pa.RecordBatch:
        """Return the documents with a key in [first, last] of all runs, sorted within each slice of a batch only."""
        ranges = range(bisect_right(self.firsts, first) - 1, bisect_right(self.firsts, last))
        found = [pa.RecordBatch.from_pylist([], RUN)]
        for name in self.names:
            for index in ranges:
                found += slices(self.path(name, index), first, last)
        return pa.concat_batches(found)


def slices(path: Path, first: int, last: int) -> Iterator[pa.RecordBatch]:
    """Yield what each batch of a file holds of the keys in [first, last]; only that is read."""
    with pa.memory_map(str(path)) as file:  # what was read of it stays mapped
        reader = pa.ipc.open_file(file)
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    for batch in batches:
        keys = batch.column("key").to_numpy()
        start = int(np.searchsorted(keys, np.uint64(first), side="left"))
        end = int(np.searchsorted(keys, np.uint64(last), side="right"))
        if start < end:
            yield batch.slice(start, end - start)


class RunWriter:
    """Writer of a sorted run; holds `RUN_BYTES` and one addition at most."""

    def __init__(self, writer: pa.ipc.RecordBatchFileWriter) -> None:
        self._writer = writer
        self._waiting: list[pa.RecordBatch] = []
        self._bytes = 0

    def add(self, ids: pa.Array, keys: NDArray[np.uint64], data: pa.Array) -> None:
        """Append documents: their ids, keys, and data as large_binary."""
        batch = pa.record_batch([ids.cast(pa.large_string()), pa.array(keys), data], RUN)
        self._waiting.append(batch)
        self._bytes += batch.nbytes
        if self._bytes >= RUN_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            rows = pa.concat_batches(self._waiting)
            self._waiting, self._bytes = [], 0
            self._writer.write_batch(rows.take(pa.array(order_of(rows))))


@contextmanager
def open_run(path: Path) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """Open what writes batches into a file that appears under ``path`` when the block ends well."""
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, RUN) as writer,
    ):
        yield writer


@contextmanager
def write_run(path: Path) -> Iterator[RunWriter]:
    """Yield a `RunWriter` whose file appears under ``path`` when the block ends well."""
    with open_run(path) as writer:
        run = RunWriter(writer)
        yield run
        run.flush()


def order_of(rows: pa.RecordBatch) -> NDArray[np.int64]:
    """Return the order of rows by key, and by id where keys are equal (which two of 10^9 documents hardly ever are)."""
    keys = rows.column("key").to_numpy()
    order: NDArray[np.int64] = np.argsort(keys, kind="stable")
    ordered = keys[order]
    if (ordered[1:] == ordered[:-1]).any():
        by = [("key", "ascending"), ("id", "ascending")]
        return pc.sort_indices(rows, sort_keys=by).to_numpy().astype(np.int64)
    return order


def gather(runs: SortedRuns, context: StageContext) -> SortedRuns:
    """Merge ``runs`` until at most `FAN_IN` are left. Each level writes all they hold once more."""
    level = 0
    while len(runs.names) > FAN_IN:
        level += 1
        groups = [runs.names[start : start + FAN_IN] for start in range(0, len(runs.names), FAN_IN)]
        ranges = max(1, -(-runs.size() // (len(groups) * GATHER_BYTES)))
        names = tuple(f"gathered-{level}-{number:06d}" for number in range(len(groups)))
        gathered = SortedRuns(runs.folder, names, tuple(HASHES * index // ranges for index in range(ranges)))
        work = [
            (
                SortedRuns(runs.folder, group, runs.firsts),
                gathered.path(name, index),
                *bounds(gathered, index),
            )
            for group, name in zip(groups, names, strict=True)
            for index in range(ranges)
        ]
        context.map(gather_range, work, names=[path.stem for _, path, *_ in work])
        runs = gathered
    return runs


def bounds(runs: SortedRuns, index: int) -> tuple[int, int]:
    return runs.firsts[index], runs.last(index)


def gather_range(work: tuple[SortedRuns, Path, int, int]) -> None:
    """Write one range of keys of a group of runs as one sorted batch, unless it is there."""
    group, path, first, last = work
    if path.exists():
        return
    rows = group.between(first, last)
    with open_run(path) as writer:
        writer.write_batch(rows.take(pa.array(order_of(rows))))


def pack(offsets: NDArray[np.int64], tokens: NDArray[np.unsignedinteger]) -> pa.Array:
    """Pack documents ``tokens[offsets[i] : offsets[i + 1]]`` as bytes, sharing the buffer."""
    buffers = [None, pa.py_buffer(offsets * tokens.itemsize), pa.py_buffer(tokens)]
    return pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


def unpack(data: pa.Array, element: pa.DataType) -> pa.Array:
    """Return the lists of tokens that `pack` made bytes of, sharing the buffer."""
    size = element.bit_width // 8
    _, offsets, buffer = data.buffers()
    ends = np.frombuffer(offsets, np.int64)[data.offset : data.offset + len(data) + 1] // size
    values = pa.Array.from_buffers(element, int(ends[-1]), [None, buffer])
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), values)
