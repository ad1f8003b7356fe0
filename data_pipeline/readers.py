"""Files of text, JSON lines, JSON and Parquet, plain or compressed, as a stream of documents and rejected records.

A record that can't be used never ends the reading: it comes out as `Rejected` with a reason. So does the fault of
a whole file (a cut gzip, an unreadable Parquet), after the good records that stand before it.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.documents import MAX_DOCUMENT_BYTES, excerpt, first_line
from data_pipeline.sources import split_suffix

MAX_JSON_BYTES = 1 << 30
"""A ``.json`` file (which must be held in memory) above this is rejected; JSON lines have no such bound."""

BLOCK_BYTES = 1 << 24
BLANK_LINES = re.compile(r"\n[ \t\r]*\n\s*")


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
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault: reading again may go well. A codec's fault has no number.
        yield Rejected(None, "unreadable_file", first_line(error))


def open_stream(path: Path, compression: str | None) -> BinaryIO:
    """A file as bytes, decompressed on the way."""
    if compression is None:
        return open(path, "rb")
    return io.BufferedReader(pa.input_stream(str(path), compression=compression))


def read_text(stream: BinaryIO, split_chars: int | None) -> Iterator[Record]:
    try:
        if split_chars is None:
            yield read_whole(stream)
            return
        row = -1
        for row, part in enumerate(split_paragraphs(decoded(stream), split_chars)):
            yield whole(row, part)
        if row < 0:
            yield whole(None, "")
    except UnicodeDecodeError as error:
        yield Rejected(None, "not_utf8", error.reason)


def read_whole(stream: BinaryIO) -> Record:
    """A text file as one document."""
    blocks, size = [], 0
    for block in decoded(stream):
        blocks.append(block)
        size += len(block.encode())
        if size > MAX_DOCUMENT_BYTES:
            advice = "a local source's split_chars cuts it at paragraphs"
            return Rejected(None, "too_large", f"more than {MAX_DOCUMENT_BYTES} bytes; {advice}")
    return whole(None, "".join(blocks))


def decoded(stream: BinaryIO) -> Iterator[str]:
    """The text of a file in blocks, without a byte order mark.

    Raises:
        UnicodeDecodeError: it isn't UTF-8; the reason says which byte of the file.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    end = 0
    while True:
        block = stream.read(BLOCK_BYTES)
        end += len(block)
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = end - len(error.object) + error.start
            error.reason = f"byte 0x{error.object[error.start]:02x} at offset {offset}"
            raise
        if not block:
            return


def split_paragraphs(blocks: Iterable[str], characters: int) -> Iterator[str]:
    """Cut a text, which comes in blocks, at blank lines into parts of at least ``characters``.

    The parts add up to the text and don't depend on the blocks, but where a paragraph is longer than a document
    may be.
    """
    text = ""
    for block in blocks:
        text += block
        start = 0
        for gap in BLANK_LINES.finditer(text):
            # A gap that reaches the end of what is there may go on in the next block.
            if gap.end() - start >= characters and gap.end() < len(text):
                yield text[start : gap.end()]
                start = gap.end()
        text = text[start:]
        if len(text) > MAX_DOCUMENT_BYTES:
            yield text
            text = ""
    if text:
        yield text


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
            yield from rows(values_of(batch.column(0)), row, text_field)
            row += batch.num_rows


def values_of(column: pa.Array) -> list[object]:
    """A column's values as Python's; a string that isn't UTF-8, which Arrow doesn't check, as the error it gives."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [value_of(scalar) for scalar in column]


def value_of(scalar: pa.Scalar) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def rows(values: Iterable[object], first: int, text_field: str) -> Iterator[Record]:
    for row, value in enumerate(values, first):
        if isinstance(value, str):
            yield whole(row, value)
        elif isinstance(value, UnicodeDecodeError):
            byte = value.object[value.start]
            yield Rejected(row, "not_utf8", f"byte 0x{byte:02x} at offset {value.start} of the text")
        else:
            yield Rejected(row, "field_not_text", f"{text_field!r} holds {type(value).__name__}")
