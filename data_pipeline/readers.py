"""Files of text, JSON lines, JSON and Parquet, plain or compressed, as a stream of documents and rejected records.

A record that can't be used never ends the reading: it comes out as `Rejected` with a reason. So does the fault of
a whole file (a cut gzip, an unreadable Parquet), after the good records that stand before it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.documents import MAX_DOCUMENT_BYTES, excerpt
from data_pipeline.sources import split_suffix

MAX_JSON_BYTES = 1 << 30
"""A ``.json`` file (which must be held in memory) above this is rejected; JSON lines have no such bound."""


@dataclass(frozen=True, slots=True)
class Text:
    """A document as read: its text and its row in the file (None where the file is the document)."""

    row: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record (or, where ``row`` is None, a file) that can't be used, and why."""

    row: int | None
    reason: str
    detail: str


Record = Text | Rejected


def read_file(path: Path, text_field: str, split_chars: int | None = None) -> Iterator[Record]:
    """The documents of a file, its format taken from its name. Rows count from 0.

    Args:
        text_field: the field or column that holds the text, in JSON and Parquet.
        split_chars: cut ``.txt`` at ends of paragraphs into documents of at least this many characters.
    """
    suffix, compression = split_suffix(path.name)
    try:
        with open_stream(path, compression) as stream:
            if suffix == ".jsonl":
                yield from read_jsonl(stream, text_field)
            elif suffix == ".json":
                yield from read_json(stream, text_field)
            elif suffix == ".parquet":
                yield from read_parquet(stream, text_field)
            else:
                yield from read_text(stream, split_chars)
    except (OSError, pa.ArrowException) as error:
        yield Rejected(None, "unreadable_file", str(error).splitlines()[0])


def open_stream(path: Path, compression: str | None) -> BinaryIO:
    """A file as bytes, decompressed on the way."""
    if compression is None:
        return open(path, "rb")
    return io.BufferedReader(pa.input_stream(str(path), compression=compression))


def read_text(stream: BinaryIO, split_chars: int | None) -> Iterator[Record]:
    data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        yield Rejected(None, "too_large", f"more than {MAX_DOCUMENT_BYTES} bytes")
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Rejected(None, "not_utf8", f"byte 0x{data[error.start]:02x} at offset {error.start}")
        return
    if split_chars is None or not text:
        yield whole(None, text)
    else:
        for row, part in enumerate(split_paragraphs(text, split_chars)):
            yield Text(row, part)


def split_paragraphs(text: str, characters: int) -> Iterator[str]:
    """Cut ``text`` at blank lines into parts of at least ``characters``; the parts add up to the text."""
    start = 0
    for gap in re.finditer(r"\n[ \t\r]*\n\s*", text):
        if gap.end() - start >= characters:
            yield text[start : gap.end()]
            start = gap.end()
    if start < len(text):
        yield text[start:]


def read_jsonl(stream: BinaryIO, text_field: str) -> Iterator[Record]:
    row = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        if len(line) > MAX_DOCUMENT_BYTES:
            yield Rejected(row, "too_large", f"a line of more than {MAX_DOCUMENT_BYTES} bytes")
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_DOCUMENT_BYTES)
        elif line.strip():
            yield parse(row, line, text_field)
        row += 1


def parse(row: int, line: bytes, text_field: str) -> Record:
    """The document in one line of JSON."""
    try:
        return pick(row, json.loads(line), text_field)
    except UnicodeDecodeError as error:
        return Rejected(
            row, "not_utf8", f"byte 0x{line[error.start]:02x} at offset {error.start} of the line"
        )
    except (ValueError, RecursionError) as error:
        return Rejected(row, "bad_json", f"{error}: {excerpt(line.decode('utf-8', 'replace'), 80)}")


def pick(row: int | None, value: Any, text_field: str) -> Record:
    """The text of one parsed record."""
    if not isinstance(value, dict):
        return Rejected(row, "not_an_object", f"found {type(value).__name__}")
    if text_field not in value:
        return Rejected(row, "missing_field", f"no field {text_field!r} among {sorted(value)[:8]}")
    text = value[text_field]
    if not isinstance(text, str):
        return Rejected(row, "field_not_text", f"{text_field!r} holds {type(text).__name__}")
    return whole(row, text)


def whole(row: int | None, text: str) -> Record:
    """``text`` as a document, if UTF-8 can hold it (half a surrogate pair can't be) and it isn't too large."""
    if not text:
        return Rejected(row, "empty", "")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        return Rejected(row, "not_utf8", f"lone surrogate at character {error.start}")
    if size > MAX_DOCUMENT_BYTES:
        return Rejected(row, "too_large", f"{size} bytes")
    return Text(row, text)


def read_json(stream: BinaryIO, text_field: str) -> Iterator[Record]:
    data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        yield Rejected(None, "too_large", f"more than {MAX_JSON_BYTES} bytes; use JSON lines")
        return
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        yield Rejected(None, "bad_json", str(error))
        return
    if isinstance(value, list):
        yield from (pick(row, one, text_field) for row, one in enumerate(value))
    else:
        yield pick(None, value, text_field)


def read_parquet(stream: BinaryIO, text_field: str) -> Iterator[Record]:
    source = stream if stream.seekable() else pa.BufferReader(stream.read())
    with pq.ParquetFile(source) as file:
        if text_field not in file.schema_arrow.names:
            yield Rejected(
                None, "missing_field", f"no column {text_field!r} among {file.schema_arrow.names[:8]}"
            )
            return
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=[text_field], use_threads=False):
            yield from rows(batch.column(0).to_pylist(), row, text_field)
            row += batch.num_rows


def rows(values: Iterable[object], first: int, text_field: str) -> Iterator[Record]:
    for row, value in enumerate(values, first):
        if isinstance(value, str):
            yield whole(row, value)
        else:
            yield Rejected(row, "field_not_text", f"{text_field!r} holds {type(value).__name__}")
