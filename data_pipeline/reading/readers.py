"""Files of text, JSON lines, JSON, Parquet and WARC, plain, compressed or in archives, as a stream of records.

A record that can't be used never ends the reading: it comes out as `Rejected` with a reason. So does the fault of
a whole file (a cut gzip, an unreadable Parquet, a decompression bomb), after the good records that stand before it.
Memory is bounded by `MAX_DOCUMENT_BYTES` and not by the size of a file. Text is UTF-8 unless its source says
another ``encoding``; none is ever guessed.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from data_pipeline.documents import MAX_DOCUMENT_BYTES, excerpt, first_line
from data_pipeline.reading.archives import Member, members
from data_pipeline.reading.columns import read_parquet
from data_pipeline.reading.formats import is_archive, split_suffix
from data_pipeline.reading.json_values import json_values
from data_pipeline.reading.paragraphs import split_paragraphs
from data_pipeline.reading.records import Record, Rejected, pick, whole
from data_pipeline.reading.slices import Slice, lines_of
from data_pipeline.reading.streams import (
    CODEC_FAULTS,
    ExpandsTooFar,
    Limit,
    Recoded,
    buffered,
    decompressed,
    is_fault_of_disk,
)
from data_pipeline.reading.warc import read_warc

BLOCK_BYTES = 1 << 20
ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[")


@dataclass(frozen=True)
class Reading:
    """How the files of a source are read."""

    text_field: str = "text"
    """The field or column that holds the text, in JSON and Parquet."""
    meta_fields: tuple[str, ...] = ()
    """Fields or columns that are kept of each document."""
    split_chars: int | None = None
    """Cut ``.txt`` at ends of paragraphs into documents of at least this many characters."""
    encoding: str = "utf-8"
    max_expansion: float = 200
    max_unpacked_bytes: int = 1 << 40
    spool: Path | None = None
    """A folder for the temporary copy of a Parquet file that stands in another file; None: the system's."""

    def limit(self, stored: int) -> Limit:
        """A fresh limit for a file of ``stored`` bytes."""
        return Limit(stored, self.max_expansion, self.max_unpacked_bytes)


def read_file(path: Path, reading: Reading, part: Slice | None = None) -> Iterator[Record]:
    """The documents of a file, its format taken from its name. Rows count from 0 (in archives: in each member).

    Args:
        part: read this slice of JSON lines or Parquet only.

    Raises:
        OSError: of the disk; what is wrong with the content comes out as `Rejected`.
    """
    suffix, compression = split_suffix(path.name)
    size = path.stat().st_size

    def records() -> Iterator[Record]:
        with decompressed(path, compression, lambda: reading.limit(size)) as stream:
            if part and suffix == ".jsonl":
                yield from read_jsonl(stream, reading, part.row, lines_of(stream, part))
            elif is_archive(path.name):
                yield from read_archive(stream, suffix, reading, reading.limit(size))
            else:
                yield from read_stream(stream, suffix, reading, size, part)

    yield from judged(records(), reading)


def read_archive(stream: BufferedReader, suffix: str, reading: Reading, limit: Limit) -> Iterator[Record]:
    """The documents of an archive's members, each as if it were a file; every record says its member."""
    for name, member in members(stream, suffix, limit):
        if isinstance(member, Rejected):
            yield member
            continue
        for record in judged(read_member(name, member, reading), reading):
            record.member = name
            yield record
        if limit.exceeded:
            return


def read_member(name: str, member: Member, reading: Reading) -> Iterator[Record]:
    suffix, compression = split_suffix(name)
    stream = decompressed(member.stream, compression, lambda: reading.limit(member.size))
    yield from read_stream(stream, suffix, reading, member.size)


def read_stream(
    stream: BufferedReader, suffix: str, reading: Reading, stored: int, part: Slice | None = None
) -> Iterator[Record]:
    """The documents in a stream of one format; ``stored`` is the size of its file."""
    if suffix == ".parquet":
        yield from read_parquet(
            stream, reading.text_field, reading.meta_fields, reading.limit(stored), reading.spool, part
        )
    elif suffix in (".warc", ".wet"):
        yield from read_warc(stream)
    else:
        if codecs.lookup(reading.encoding).name != "utf-8":
            stream = buffered(Recoded(stream, reading.encoding))
        if suffix == ".jsonl":
            yield from read_jsonl(stream, reading)
        elif suffix == ".json":
            yield from read_json(stream, reading)
        else:
            yield from read_text(stream, reading.split_chars)


def judged(records: Iterator[Record], reading: Reading) -> Iterator[Record]:
    """``records``, and what ended them early as the last one."""
    try:
        yield from records
    except UnicodeDecodeError as error:
        yield Rejected(None, f"not_{reading.encoding.replace('utf-8', 'utf8')}", error.reason)
    except ExpandsTooFar as error:
        yield Rejected(None, "expands_too_far", str(error))
    except CODEC_FAULTS as error:
        if is_fault_of_disk(error):
            raise
        yield Rejected(None, "unreadable_file", first_line(error))


def read_text(stream: BufferedReader, split_chars: int | None) -> Iterator[Record]:
    if split_chars is None:
        yield read_whole(stream)
        return
    row = -1
    for row, part in enumerate(split_paragraphs(decoded(stream), split_chars)):
        yield whole(row, part)
    if row < 0:
        yield whole(None, "")


def read_whole(stream: BufferedReader) -> Record:
    """A text file as one document."""
    blocks, size = [], 0
    for block in decoded(stream):
        blocks.append(block)
        size += len(block)
        if size > MAX_DOCUMENT_BYTES:
            advice = "the source's split_chars cuts it at paragraphs"
            return Rejected(None, "too_large", f"more than {MAX_DOCUMENT_BYTES} bytes; {advice}")
    return whole(None, "".join(blocks))


def decoded(stream: BufferedReader, head: bytes = b"") -> Iterator[str]:
    """The text of a file, which begins with ``head``, in blocks, without a byte order mark.

    Raises:
        UnicodeDecodeError: it isn't UTF-8; the reason says which byte of the file, after the text before it.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    end = 0
    while True:
        block = head or stream.read1(BLOCK_BYTES)  # `read` would lose what comes before a fault
        head = b""
        end += len(block)
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            rest = len(error.object) - error.start
            yield decoder.decode(block[: max(0, len(block) - rest)])
            error.reason = f"byte 0x{error.object[error.start]:02x} at offset {end - rest}"
            if end == rest and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                error.reason += ": looks like UTF-16, so set the source's encoding to utf-16"
            raise
        if not block:
            return


def read_jsonl(
    stream: BufferedReader, reading: Reading, first: int = 0, most: float = math.inf
) -> Iterator[Record]:
    """One document a line; rows are lines, counted from ``first``. Ends with the line that reaches ``most`` bytes."""
    row = first
    while most > 0 and (line := stream.readline(MAX_DOCUMENT_BYTES + 1)):
        most -= len(line)
        if len(line) > MAX_DOCUMENT_BYTES:
            yield Rejected(row, "too_large", f"a line of more than {MAX_DOCUMENT_BYTES} bytes")
            while line and not line.endswith(b"\n"):
                line = stream.readline(BLOCK_BYTES)
                most -= len(line)
        elif not line.isspace():
            yield parse(row, line, reading)
        row += 1


def parse(row: int, line: bytes, reading: Reading) -> Record:
    """The document in one line of JSON."""
    try:
        return chosen(row, json.loads(line), reading)
    except UnicodeDecodeError as error:
        return Rejected(
            row, "not_utf8", f"byte 0x{line[error.start]:02x} at offset {error.start} of the line"
        )
    except (ValueError, RecursionError) as error:
        return Rejected(row, "bad_json", f"{error}: {excerpt(line[:400].decode('utf-8', 'replace'), 80)}")


def chosen(row: int | None, value: Any, reading: Reading) -> Record:
    """The document in a parsed value."""
    try:
        return pick(row, value, reading.text_field, reading.meta_fields)
    except RecursionError:
        return Rejected(row, "bad_json", "values nested too deeply to be kept")


def read_json(stream: BufferedReader, reading: Reading) -> Iterator[Record]:
    """The elements of an array, or one value; many call JSON lines ``.json`` too, which the first line shows."""
    line = stream.readline(MAX_DOCUMENT_BYTES + 1)
    try:
        # An array often stands in one line, which is not to be parsed as a whole.
        by_line = not ARRAY.match(line) and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        by_line = False
    if by_line:
        first = parse(0, line, reading)
        following = read_jsonl(stream, reading, first=1)
        second = next(following, None)
        first.row = None if second is None else 0
        yield first
        if second is not None:
            yield second
            yield from following
    else:
        for value in json_values(decoded(stream, line)):
            if isinstance(value, Rejected):
                yield value
            else:
                yield chosen(*value, reading)
