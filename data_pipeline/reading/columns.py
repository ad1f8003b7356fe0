"""Parquet files as a stream of records, by row group and page, in memory for a few megabytes of rows."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.reading.records import Record, Rejected, kept, whole
from data_pipeline.reading.slices import Slice
from data_pipeline.reading.streams import Limit

BATCH_BYTES = 1 << 23
BUFFER_BYTES = 1 << 20


def read_parquet(
    stream: BinaryIO,
    text_field: str,
    meta_fields: Sequence[str],
    limit: Limit,
    spool: Path | None,
    part: Slice | None = None,
) -> Iterator[Record]:
    """The rows of a Parquet file; one that can't be read from anywhere (it is compressed) is copied to disk first."""
    with ExitStack() as stack:
        if not stream.seekable():
            copy = stack.enter_context(tempfile.TemporaryFile(dir=spool))
            shutil.copyfileobj(stream, copy, 1 << 20)
            copy.seek(0)
            stream = copy
        # Said to be off, or Arrow reads a column of a whole row group at once.
        file = stack.enter_context(pq.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False))
        names = file.schema_arrow.names
        if text_field not in names:
            yield Rejected(None, "missing_field", f"no column {text_field!r} among {names[:8]}"[:300])
            return
        columns = [text_field, *(name for name in meta_fields if name in names)]
        twice = [name for name in columns if names.count(name) > 1]
        if twice:
            yield Rejected(None, "repeated_column", f"several columns are called {twice[0]!r}"[:300])
            return
        first, end = part.share(file.num_row_groups) if part else (0, file.num_row_groups)
        row = sum(file.metadata.row_group(group).num_rows for group in range(first))
        for group in range(first, end):
            size = rows_at_once(file, group)
            for batch in file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
                limit.take(batch.nbytes)
                yield from read_batch(batch, row, text_field, columns[1:])
                row += batch.num_rows


def rows_at_once(file: pq.ParquetFile, group: int) -> int:
    """So many rows of a row group that all columns together hold about `BATCH_BYTES`.

    The sizes of single columns would say more, but Arrow aborts the process where a damaged file lies in these.
    """
    found = file.metadata.row_group(group)
    return max(16, min(1024, BATCH_BYTES * found.num_rows // max(1, found.total_byte_size)))


def read_batch(
    batch: pa.RecordBatch, first: int, text_field: str, meta_fields: Sequence[str]
) -> Iterator[Record]:
    """The documents of some rows, the first of which has number ``first``."""
    values = {name: values_of(batch.column(name)) for name in dict.fromkeys([text_field, *meta_fields])}
    for offset, value in enumerate(values[text_field]):
        row = first + offset
        if isinstance(value, str):
            meta = kept({name: values[name][offset] for name in meta_fields}, meta_fields)
            yield whole(row, value, meta)
        elif isinstance(value, UnicodeDecodeError):
            byte = value.object[value.start]
            yield Rejected(row, "not_utf8", f"byte 0x{byte:02x} at offset {value.start} of the text")
        else:
            yield Rejected(row, "field_not_text", f"{text_field!r} holds {type(value).__name__}")


def values_of(column: pa.Array) -> list[Any]:
    """A column's values as Python's; None where it has none (a day in the year 90000, an unknown time zone).

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
