"""The document shard: Parquet files of (id, text, source, meta), and how they are written and read.

A stage that maps over shards writes one shard for each that it reads. Rejected records go beside them, with a
reason. Reading and writing stream by row group, so memory is bounded by `ROW_GROUP_CHARACTERS` and not by the size of
a shard; the bytes written depend on the rows alone, not on how they were handed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.core.text import first_line

SCHEMA = pa.schema(
    [("id", pa.string()), ("text", pa.string()), ("source", pa.string()), ("meta", pa.string())]
)
REJECTED = pa.schema([("id", pa.string()), ("reason", pa.string()), ("excerpt", pa.string())])
ROW_GROUP_CHARACTERS = 8 << 20
ROW_GROUP_ROWS = 1 << 16
MAX_DOCUMENT_BYTES = 1 << 28
"""Longer texts are rejected: a column of a row group holds at most 2 GiB of text."""
Rows = dict[str, list[str]]


class ShardWriter:
    """Streams rows into one Parquet file, starting a row group whenever `ROW_GROUP_CHARACTERS` are waiting."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.rows = 0
        self._schema = schema
        self._batches: list[pa.RecordBatch] = []
        self._columns: Rows = {name: [] for name in schema.names}
        self._waiting = 0
        self._characters = 0
        self._parquet = pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)

    def add(self, *values: str) -> None:
        """Append one row, its values in the order of the schema."""
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
            self._characters += len(value)
        self._waiting += 1
        self._write_if_full()

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Append the rows of ``batch``, as if one by one."""
        self._collect()
        sizes = sum(pc.utf8_length(column).to_numpy(zero_copy_only=False) for column in batch.columns)
        total = np.cumsum(sizes, dtype=np.int64)
        start = before = 0
        while start < batch.num_rows:
            reaches = int(np.searchsorted(total, before + ROW_GROUP_CHARACTERS - self._characters)) + 1
            end = min(reaches, start + ROW_GROUP_ROWS - self._waiting, batch.num_rows)
            self._batches.append(batch.slice(start, end - start))
            self._waiting += end - start
            self._characters += int(total[end - 1]) - before
            start, before = end, int(total[end - 1])
            self._write_if_full()

    def _collect(self) -> None:
        """Make a batch of the rows that were added one by one."""
        if self._columns["id"]:
            self._batches.append(pa.RecordBatch.from_pydict(self._columns, self._schema))
            self._columns = {name: [] for name in self._schema.names}

    def _write_if_full(self) -> None:
        if self._characters >= ROW_GROUP_CHARACTERS or self._waiting >= ROW_GROUP_ROWS:
            self._write()

    def _write(self) -> None:
        """Write what is waiting as a row group."""
        self._collect()
        if self._batches:
            self._parquet.write_table(pa.Table.from_batches(self._batches, self._schema).combine_chunks())
        self.rows += self._waiting
        self._batches = []
        self._waiting = self._characters = 0

    def close(self) -> None:
        self._write()
        self._parquet.close()


@contextmanager
def write_shard(path: Path, schema: pa.Schema = SCHEMA) -> Iterator[ShardWriter]:
    """Yield a `ShardWriter` whose file appears under ``path`` when the block ends well, and not at all otherwise."""
    with atomic_path(path) as temporary:
        writer = ShardWriter(temporary, schema)
        try:
            yield writer
        finally:
            writer.close()


def shard_paths(folder: Path, kind: str = "documents") -> list[Path]:
    """Return the shards ``<kind>-00000.parquet``, ... of a stage's folder, in order.

    Raises:
        UserError: there is none.
    """
    paths = sorted(folder.glob(f"{kind}-*.parquet"))
    if not paths:
        raise UserError(
            f"{folder} holds no {kind} shards ({kind}-00000.parquet, ...): is it a stage's output?"
        )
    return paths


def read_shard(path: Path, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a Parquet shard, one record batch a row group (in order).

    Raises:
        UserError: the file can't be read; the message names it.
    """
    wanted = list(columns) if columns else None
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                yield from (
                    file.read_row_group(group, columns=wanted, use_threads=False)
                    .combine_chunks()
                    .to_batches()
                )
    except (pa.ArrowException, OSError) as error:
        raise corrupt(path, error) from error


def count_rows(shard: Path) -> int:
    """Count the rows of a shard, from its footer."""
    try:
        return int(pq.read_metadata(shard).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise corrupt(shard, error) from error


def corrupt(path: Path, error: Exception) -> UserError:
    """Return the error for a shard that can't be read."""
    return UserError(
        f"corrupt shard {path}: {first_line(error)}\n"
        "run `llmill verify`, then build its stage again with --force <stage>"
    )


def buffers(texts: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Return bytes and offsets (documents + 1) of a column of strings without nulls, in place."""
    assert texts.type == pa.string(), f"expected string, found {texts.type}"
    assert texts.null_count == 0, "texts are never null"
    if not len(texts):
        return np.zeros(0, np.uint8), np.zeros(1, np.int32)
    _, offsets, data = texts.buffers()
    starts = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8), starts


def byte_lengths(column: pa.Array) -> NDArray[np.int64]:
    """UTF-8 bytes of every string in a column."""
    return pc.binary_length(column).to_numpy(zero_copy_only=False).astype(np.int64)


def hash_ids(ids: Iterable[str], salt: str) -> NDArray[np.uint64]:
    """Return a uniform 64-bit hash of every id, the same everywhere and for ever: what splits, samples and orders
    use."""
    seed = blake2b(salt.encode(), digest_size=16).digest()
    digests = b"".join(blake2b(one.encode(), digest_size=8, key=seed).digest() for one in ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as ``.npy``."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def add_up(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sum of several tallies, its keys in order."""
    total: dict[str, int] = {}
    for one in counts:
        for key, value in one.items():
            total[key] = total.get(key, 0) + value
    return dict(sorted(total.items()))


def blocks(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the eight bytes from each byte on as one little-endian number, in place; for all bytes but the last seven.

    There is always one: fewer than eight bytes are followed by zeros.
    """
    if len(data) < 8:
        data = np.concatenate([data, np.zeros(8 - len(data), np.uint8)])
    return np.ndarray((len(data) - 7,), "<u8", data, strides=(1,))
