"""Files of text, JSON lines, JSON, CSV, Parquet, HTML and WARC, plain, packed or in archives, as a stream of records.

A record that can't be used never ends the reading: it comes out as `Rejected` with a reason. So does the fault of
a whole file (a cut gzip, an unreadable Parquet, a decompression bomb), after the good records that stand before it.
Memory is bounded by `MAX_DOCUMENT_BYTES` and not by the size of a file. Text is UTF-8 unless its source sets
another ``encoding``; none is ever guessed.
"""

from __future__ import annotations

import codecs
import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

from data_pipeline.core.text import excerpt, first_line
from data_pipeline.documents import MAX_DOCUMENT_BYTES
from data_pipeline.download.archives import Member, members
from data_pipeline.download.columns import read_parquet
from data_pipeline.download.formats import is_archive, split_suffix
from data_pipeline.download.html import MAX_PAGE_BYTES, HtmlRules, read_page, with_main_text
from data_pipeline.download.json_values import TooLarge, json_values, not_utf8, refuse_many_values
from data_pipeline.download.lines import TextLines, TooLong
from data_pipeline.download.paragraphs import split_paragraphs
from data_pipeline.download.records import Record, Rejected, not_in, pick, whole
from data_pipeline.download.slices import Slice, lines_of
from data_pipeline.download.streams import (
    CODEC_FAULTS,
    ExpandsTooFar,
    Limits,
    Recoded,
    advice,
    buffered,
    decompressed,
    is_fault_of_disk,
    looks_like,
)
from data_pipeline.download.tables import read_table
from data_pipeline.download.warc import read_warc

BLOCK_BYTES = 1 << 20
FIELDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""Formats whose texts are fields of records."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Reading:
    """How the files of a source are read."""

    text_field: str = "text"
    """The field or column that holds the text, in JSON and Parquet."""
    meta_fields: tuple[str, ...] = ()
    """Fields or columns that are kept of each document."""
    split_chars: int | None = None
    """Cut ``.txt`` at ends of paragraphs into documents of at least this many characters."""
    split: str = "none"
    """Cut ``.txt`` at every one of these: ``lines`` or ``paragraphs``."""
    delimiter: str | None = None
    """Between the fields of CSV and TSV; None: by the suffix."""
    quotes: bool = True
    """Whether a field of CSV and TSV may stand in double quotes."""
    format: str | None = None
    """Format of files whose names have none."""
    text_format: str = "plain"
    """``html`` where fields and columns hold pages."""
    html: HtmlRules = field(default_factory=HtmlRules)
    """How the main text of pages is taken out."""
    encoding: str = "utf-8"
    max_expansion: float = 200
    max_unpacked_bytes: int = 1 << 40
    spool: Path | None = None
    """A folder for the temporary copy of a Parquet file that stands in another file; None: the system's."""

    def limits(self, stored: int) -> Limits:
        """Fresh limits for a file of ``stored`` bytes."""
        return Limits(stored, self.max_expansion, self.max_unpacked_bytes)


def read_file(
    path: Path, reading: Reading, within: Slice | None = None, passed_over: Counter[str] | None = None
) -> Iterator[Record]:
    """Yield the documents of a file, its format taken from its name. Rows count from 0 (in archives: in each member).

    Args:
        within: read this slice of JSON lines or Parquet only.
        passed_over: counts the members of an archive that are passed over.

    Raises:
        OSError: of the disk; what is wrong with the content comes out as `Rejected`.
    """
    suffix, compression = split_suffix(path.name, reading.format)
    within = within if within and within.count > 1 else None
    limits = reading.limits(path.stat().st_size)

    def records() -> Iterator[Record]:
        with decompressed(path, compression, limits.of("file")) as stream:
            if is_archive(path.name):
                skipped = Counter[str]() if passed_over is None else passed_over
                yield from read_archive(stream, suffix, reading, limits, skipped)
            else:
                yield from read_stream(stream, suffix, reading, limits, within)

    yield from judged(records(), reading)


def read_archive(
    stream: BufferedReader, suffix: str, reading: Reading, limits: Limits, passed_over: Counter[str]
) -> Iterator[Record]:
    """Yield the documents of an archive's members, each as if it were a file; every record names its member."""
    for name, member in members(stream, suffix, limits.of("archive"), passed_over, reading.format):
        if isinstance(member, Rejected):
            yield member
            continue
        for record in judged(read_member(name, member, reading, limits), reading):
            record.member = name
            yield record
        if limits.exceeded:
            return


def read_member(name: str, member: Member, reading: Reading, limits: Limits) -> Iterator[Record]:
    suffix, compression = split_suffix(name, reading.format)
    stream = decompressed(member.stream, compression, limits.of("member"))
    yield from read_stream(stream, suffix, reading, limits)


def read_stream(
    stream: BufferedReader, suffix: str, reading: Reading, limits: Limits, within: Slice | None = None
) -> Iterator[Record]:
    """Yield the documents in a stream of one format."""
    if suffix in FIELDS and reading.text_format == "html":
        plain = replace(reading, text_format="plain")
        yield from with_main_text(read_stream(stream, suffix, plain, limits, within), reading.html)
    elif suffix == ".parquet":
        yield from read_parquet(
            stream, reading.text_field, reading.meta_fields, limits.of("rows"), reading.spool, within
        )
    elif suffix in (".warc", ".wet"):
        yield from read_warc(stream, reading.encoding, limits, reading.html)
    elif suffix == ".html":
        yield read_page(None, stream.read(MAX_PAGE_BYTES + 1), reading.html, fallback=reading.encoding)
    else:
        if codecs.lookup(reading.encoding).name != "utf-8":
            stream = buffered(Recoded(stream, reading.encoding))
        elif fault := other_encoding(stream):
            if within is None or within.index == 0:
                raise fault
            return  # reported once, by the first slice
        yield from read_characters(stream, suffix, reading, within)


def read_characters(
    stream: BufferedReader, suffix: str, reading: Reading, within: Slice | None
) -> Iterator[Record]:
    """Yield the documents in a stream of UTF-8."""
    if suffix == ".jsonl" and within:
        yield from read_jsonl(stream, reading, within.row, lines_of(stream, within))
    elif suffix == ".jsonl" and not has_old_line_ends(stream):
        yield from read_jsonl(stream, reading)
    elif suffix in (".json", ".jsonl"):
        yield from read_json(stream, reading)
    elif suffix in DELIMITERS:
        delimiter = reading.delimiter or DELIMITERS[suffix]
        yield from read_table(stream, reading.text_field, reading.meta_fields, delimiter, reading.quotes)
    elif reading.split == "lines":
        yield from read_lines(stream)
    else:
        yield from read_text(stream, reading.split_chars or (1 if reading.split == "paragraphs" else None))


def other_encoding(stream: BufferedReader) -> UnicodeDecodeError | None:
    """Return the fault of a stream whose first bytes show that it is not UTF-8."""
    head = stream.peek(8)[:8]
    if (b"\0" not in head and head[:1] < b"\xfe") or not looks_like(head):
        return None
    return UnicodeDecodeError("utf-8", head, 0, 1, f"byte 0x{head[0]:02x} at offset 0: {advice(head)}")


def has_old_line_ends(stream: BufferedReader) -> bool:
    """Return whether lines end with CR only, as on Macs of long ago."""
    head = stream.peek()
    return b"\r" in head and b"\n" not in head


def judged(records: Iterator[Record], reading: Reading) -> Iterator[Record]:
    """Yield ``records``, and what ended them early as the last one."""
    try:
        yield from records
    except UnicodeDecodeError as error:
        yield Rejected(None, not_in(reading.encoding), error.reason)
    except ExpandsTooFar as error:
        yield Rejected(None, "expands_too_far", str(error))
    except CODEC_FAULTS as error:
        if is_fault_of_disk(error):
            raise
        yield Rejected(None, "unreadable_file", first_line(error))


def read_lines(stream: BufferedReader) -> Iterator[Record]:
    """One document a line that isn't blank; rows are lines."""
    lines = TextLines(stream)
    while True:
        row = lines.read
        try:
            line = next(lines)
        except StopIteration:
            break
        except TooLong as error:
            yield Rejected(row, "too_large", str(error))
            continue
        if lines.fault:
            yield Rejected(row, "not_utf8", lines.take_fault())
        elif not line.isspace():
            yield whole(row, line.rstrip("\r\n"))
    if not lines.read:
        yield whole(None, "")


def read_text(stream: BufferedReader, split_chars: int | None) -> Iterator[Record]:
    if split_chars is None:
        yield read_whole(stream)
        return
    row = -1
    for row, text in enumerate(split_paragraphs(decoded(stream), split_chars)):
        yield whole(row, text)
    if row < 0:
        yield whole(None, "")


def read_whole(stream: BufferedReader) -> Record:
    """Return a text file as one document."""
    blocks, size = [], 0
    for block in decoded(stream):
        blocks.append(block)
        size += len(block)
        if size > MAX_DOCUMENT_BYTES:
            advice = "the source's split_chars cuts it at paragraphs"
            return Rejected(None, "too_large", f"more than {MAX_DOCUMENT_BYTES} bytes; {advice}")
    return whole(None, "".join(blocks))


def decoded(stream: BufferedReader) -> Iterator[str]:
    """Yield the text of a file, in blocks, without a byte order mark.

    Raises:
        UnicodeDecodeError: it isn't UTF-8; the reason names the byte of the file, after the text before it.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    end = 0
    while True:
        block = stream.read1(BLOCK_BYTES)  # `read` would lose what comes before a fault
        end += len(block)
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            rest = len(error.object) - error.start
            yield decoder.decode(block[: max(0, len(block) - rest)])
            error.reason = f"byte 0x{error.object[error.start]:02x} at offset {end - rest}; {advice(b'')}"
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
    """Return the document in one line of JSON."""
    try:
        text = line.decode()
        if text.startswith("\ufeff"):  # at the beginning, and where files were joined
            text = text[1:]
        refuse_many_values(text)
        return chosen(row, json.loads(text), reading)
    except TooLarge as error:
        return Rejected(row, "too_large", str(error))
    except UnicodeDecodeError as error:
        rejected = not_utf8(error, "line")
        rejected.row = row
        return rejected
    except (ValueError, RecursionError) as error:
        return Rejected(row, "bad_json", f"{error}: {excerpt(line[:400].decode('utf-8', 'replace'), 80)}")


def chosen(row: int | None, value: Any, reading: Reading) -> Record:
    """Return the document in a parsed value."""
    try:
        return pick(row, value, reading.text_field, reading.meta_fields)
    except RecursionError:
        return Rejected(row, "bad_json", "values nested too deeply to be kept")


def read_json(stream: BufferedReader, reading: Reading) -> Iterator[Record]:
    """Yield the values of a file one after the other, arrays opened: an array, one value, JSON lines, or several of
    these."""
    blocks = JsonBlocks(stream)
    for value in json_values(blocks, lambda: blocks.has_bad_bytes):
        if isinstance(value, Rejected):
            yield value
        else:
            yield chosen(*value, reading)


class JsonBlocks:
    """The text of a JSON file in blocks, without a byte order mark; bytes that are no UTF-8 become half surrogates.

    All line ends become LF, which changes no value: within a string they are escapes.
    """

    def __init__(self, stream: BufferedReader) -> None:
        self.has_bad_bytes = False
        self._read = stream.read1  # `read` would lose what comes before a fault
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._line_ends = io.IncrementalNewlineDecoder(None, translate=True)
        self._has_returns = self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        if self._ended:
            raise StopIteration
        block = self._read(BLOCK_BYTES)
        self._ended = not block
        text = self._decode(block)
        self._has_returns = self._has_returns or "\r" in text
        return self._line_ends.decode(text, final=self._ended) if self._has_returns else text

    def _decode(self, block: bytes) -> str:
        try:
            return self._utf8.decode(block, final=self._ended)
        except UnicodeDecodeError:
            self._utf8.errors, self.has_bad_bytes = "surrogateescape", True
            return self._utf8.decode(block, final=self._ended)  # its state is as before the fault
