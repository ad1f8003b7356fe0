"""Parquet files as a stream of records, by row group and page, in memory for a few megabytes of rows."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.download.records import MISSING, Record, Rejected, document, find, kept
from data_pipeline.download.slices import PARQUET_SEAM, Slice
from data_pipeline.download.streams import Limit

BATCH_BYTES = 1 << 23
REPEATED_BYTES = 1 << 27
SMALL_GROUP_BYTES = 1 << 22
LONG_ROW_BYTES = 1000
BUFFER_BYTES = 1 << 20


def read_parquet(
    stream: BinaryIO,
    text_field: str,
    meta_fields: Sequence[str],
    limit: Limit,
    spool: Path | None,
    within: Slice | None = None,
) -> Iterator[Record]:
    """Yield the rows of a Parquet file; one that can't be read from anywhere (it is compressed) is copied to disk
    first."""
    with ExitStack() as stack:
        if not stream.seekable():
            copy = stack.enter_context(tempfile.TemporaryFile(dir=spool))
            shutil.copyfileobj(stream, copy, 1 << 20)
            copy.seek(0)
            stream = copy
        if within is None and is_joined(stream):
            yield Rejected(
                None, "unreadable_file", "several Parquet files in one: keep each in a file of its own"
            )
            return
        # Set to off, or Arrow reads a column of a whole row group at once.
        file = stack.enter_context(pq.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False))
        names = file.schema_arrow.names
        leaves = [file.schema.column(number).path for number in range(len(file.schema.names))]
        columns = [name for name in (text_field, *meta_fields) if name in names or is_nested(name, leaves)]
        if text_field not in columns:
            yield Rejected(None, "missing_field", f"no column {text_field!r} among {names[:8]}"[:300])
            return
        twice = [name for name in columns if names.count(name) > 1]
        if twice:
            yield Rejected(None, "repeated_column", f"several columns are called {twice[0]!r}"[:300])
            return
        words = [leaf for leaf in leaves if any(is_nested(name, [leaf]) or name == leaf for name in columns)]
        folded = pq.ParquetFile(
            stream, metadata=file.metadata, read_dictionary=words, buffer_size=BUFFER_BYTES, pre_buffer=False
        )
        first, end = within.bounds(file.num_row_groups) if within else (0, file.num_row_groups)
        row = sum(file.metadata.row_group(group).num_rows for group in range(first))
        for group in range(first, end):
            size = rows_at_once(file, folded, group, columns)
            for batch in file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
                batch = unfolded(batch)
                limit.take(batch.nbytes)
                yield from read_batch(batch, row, text_field, columns[1:])
                row += batch.num_rows


MAGIC = b"PAR1"


def is_joined(stream: BinaryIO) -> bool:
    """Return whether several Parquet files follow one another: Arrow would take pages of the first for the last's."""
    stream.seek(0)
    start, before = 0, b""
    while block := stream.read(BUFFER_BYTES):
        text = before + block
        at = text.find(PARQUET_SEAM)
        while at >= 0:
            if is_footer(stream, start - len(before) + at):
                return True
            at = text.find(PARQUET_SEAM, at + 1)
        start, before = start + len(block), text[-len(PARQUET_SEAM) + 1 :]
        stream.seek(start)
    return False


def is_footer(stream: BinaryIO, end: int) -> bool:
    """Return whether the footer of a Parquet file ends before ``end`` (and is not a text that looks like it)."""
    stream.seek(max(0, end - 4))
    size = int.from_bytes(stream.read(4), "little")
    if not 0 < size <= end - 8:
        return False
    stream.seek(end - 4 - size)
    footer = stream.read(size + 4)
    try:
        pq.read_metadata(pa.BufferReader(MAGIC + footer + MAGIC))
    except (pa.ArrowException, OSError):
        return False
    return True


def is_nested(name: str, leaves: Sequence[str]) -> bool:
    """Return whether there is something at the dotted path ``name``."""
    return any(leaf == name or leaf.startswith(f"{name}.") for leaf in leaves)


def longest(folded: pq.ParquetFile, group: int, columns: Sequence[str]) -> int:
    """Count the bytes of the longest strings in the dictionaries of a row group: each of its rows may repeat them.

    Args:
        folded: the file, opened so that strings stay numbers of words in a dictionary.
    """
    first = next(folded.iter_batches(1, row_groups=[group], columns=columns, use_threads=False), None)
    return sum(longest_word(column) for column in first.columns) if first else 0


def longest_word(column: pa.Array) -> int:
    if pa.types.is_struct(column.type):
        return sum(map(longest_word, column.flatten()))
    if not pa.types.is_dictionary(column.type) or not len(column.dictionary):
        return 0
    return int(pc.max(pc.binary_length(column.dictionary)).as_py() or 0)


def unfolded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return ``batch`` with columns that are dictionaries by their type as they read: what they hold counts, not
    how."""
    if not any(map(pa.types.is_dictionary, batch.schema.types)):
        return batch
    columns = [one.dictionary_decode() if pa.types.is_dictionary(one.type) else one for one in batch.columns]
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def rows_at_once(file: pq.ParquetFile, folded: pq.ParquetFile, group: int, columns: Sequence[str]) -> int:
    """Return so many rows of a row group that all columns together hold about `BATCH_BYTES` as stored, and no more than
    `REPEATED_BYTES` if each repeats what is longest in its dictionaries.

    The sizes of single columns would be more exact, but Arrow aborts the process where a damaged file lies in these.
    """
    found = file.metadata.row_group(group)
    stored = max(1, found.total_byte_size)
    rows = max(16, min(1024, BATCH_BYTES * found.num_rows // stored))
    if stored < SMALL_GROUP_BYTES and stored > LONG_ROW_BYTES * found.num_rows:
        return min(
            rows, REPEATED_BYTES // stored
        )  # to look at the dictionaries would cost more than to take less
    return max(1, min(rows, REPEATED_BYTES // max(1, longest(folded, group, columns))))


def read_batch(
    batch: pa.RecordBatch, first: int, text_field: str, meta_fields: Sequence[str]
) -> Iterator[Record]:
    """Yield the documents of some rows, the first of which has number ``first``."""
    values = {name: values_at(batch, name) for name in dict.fromkeys([text_field, *meta_fields])}
    for offset, value in enumerate(values[text_field]):
        meta = None
        if meta_fields and isinstance(value, str | bytes):
            meta = kept({name: values[name][offset] for name in meta_fields}, meta_fields)
        yield document(first + offset, value, text_field, meta)


def values_at(batch: pa.RecordBatch, name: str) -> list[Any]:
    """Return the values of a column, or of what stands at a dotted path in one; None where there is none."""
    if name in batch.schema.names:
        return values_of(batch.column(name))
    root = next(one for one in batch.schema.names if name.startswith(f"{one}."))
    found = [
        one if isinstance(one, UnicodeDecodeError) else find({root: one}, name)
        for one in values_of(batch.column(root))
    ]
    return [None if one is MISSING else one for one in found]


def values_of(column: pa.Array) -> list[Any]:
    """Return a column's values as Python's; None where it has none (a day in the year 90000, an unknown time zone).

    A string that isn't UTF-8, which Arrow doesn't check, becomes the error that it gives.
    """
    try:
        return list(column.to_pylist())
    except Exception:  # of any type: time zones have their own
        return [value_of(scalar) for scalar in column]


def value_of(scalar: pa.Scalar) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error
    except Exception:  # as above
        return None
