"""Web archives (WARC, and the WET files of extracted text), read with `warcio`.

Documents are records that are text already (``conversion``, what a WET file holds, and fetched pages of type
``text/plain`` or ``text/markdown``) and the main texts of fetched pages of HTML. Other types are rejected as
``not_plain_text``. Records about the crawl itself (requests, metadata) are passed over.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from warcio.archiveiterator import ArchiveIterator

from data_pipeline.core.text import first_line
from data_pipeline.documents import MAX_DOCUMENT_BYTES
from data_pipeline.download.html import HTML_TYPES, ExtractorGone, HtmlRules, read_page
from data_pipeline.download.records import Record, Rejected, not_in, whole
from data_pipeline.download.streams import (
    CODEC_FAULTS,
    ExpandsTooFar,
    Limit,
    Limited,
    Limits,
    Unpacked,
    advice,
    buffered,
)

logging.getLogger("warcio").setLevel(logging.ERROR)  # it warns of spaces in addresses
CHARSET = re.compile(r"\bcharset\s*=\s*[\"']?([^;\"'\s]+)", re.IGNORECASE)
TEXTS = ("text/plain", "text/markdown")
WITH_CONTENT = ("conversion", "resource", "response")


class QuietIterator(ArchiveIterator):
    """Counts records of wrong length without a word on stderr."""

    INC_RECORD = ""


BLOCK_BYTES = 1 << 20
GZIP = b"\x1f\x8b"


def unpacked(stream: BufferedReader, limit: Limit) -> BufferedReader:
    """Return ``stream``, unpacked if it is gzip although its name doesn't show it: `warcio` would do it without a
    limit."""
    if not stream.peek(2).startswith(GZIP):
        return stream
    stream = buffered(Limited(Unpacked(stream, "gzip"), limit))
    if stream.peek(2).startswith(GZIP):
        raise zlib.error("gzip within gzip")
    return stream


def read_warc(stream: BufferedReader, encoding: str, limits: Limits, html: HtmlRules) -> Iterator[Record]:
    """Yield the texts of a web archive, with ``url`` and ``date`` of each; a row is a record's number in the file.

    Args:
        encoding: of texts whose headers name none.
        html: how the main text of pages is taken out.
    """
    stream = unpacked(stream, limits.of("records"))
    row = -1
    errors = 0
    try:
        records = QuietIterator(stream)
        for row, record in enumerate(records):
            if records.err_count > errors:
                yield Rejected(row - 1, "bad_warc", "its Content-Length is not where it ends")
                errors = records.err_count
            if record.rec_type in WITH_CONTENT:
                yield read_record(row, record, encoding, limits.of("bodies"), html=html)
    except (ExpandsTooFar, ExtractorGone, *CODEC_FAULTS):
        raise
    except Exception as error:  # warcio trusts its input: damaged headers end in errors of any type
        yield Rejected(row + 1, "bad_warc", first_line(error))


def read_record(row: int, record: Any, encoding: str, limit: Limit, *, html: HtmlRules) -> Record:
    """One record with content."""
    headers = record.rec_headers
    answer = record.http_headers
    kind = (answer or headers).get_header("Content-Type") or ""
    media, _, parameters = kind.partition(";")
    if answer is not None and answer.get_statuscode() != "200":
        return Rejected(row, "http_status", f"the page answered {answer.get_statuscode()}")
    media = media.strip().lower()
    if media not in TEXTS and media not in HTML_TYPES:
        return Rejected(row, "not_plain_text", f"a record of type {media[:80] or 'unknown'}")
    packing = answer.get_header("Content-Encoding") if answer is not None else None
    try:
        content = record.content_stream()
        data = unpacked_body(content, limit) if packing else content.read(MAX_DOCUMENT_BYTES + 1)
    except (ExpandsTooFar, *CODEC_FAULTS):
        raise
    except Exception as error:  # of any type: some decompressors that `warcio` finds are not what it expects
        return Rejected(
            row, "bad_warc", f"sent as {packing or 'chunks'}, which can't be unpacked: {first_line(error)}"
        )
    if len(data) > MAX_DOCUMENT_BYTES:
        return Rejected(row, "too_large", f"more than {MAX_DOCUMENT_BYTES} bytes")
    match = CHARSET.search(parameters)
    charset = match[1] if match else ""
    pairs = (("url", headers.get_header("WARC-Target-URI")), ("date", headers.get_header("WARC-Date")))
    meta = {key: value for key, value in pairs if value}
    if media in HTML_TYPES:
        return read_page(row, data, html, served=charset, fallback=encoding, meta=meta)
    try:
        text = data.decode(charset or encoding)
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at offset {error.start} of the record"
        known = (
            f"which says that it is {charset[:80]}" if charset else f"which names no charset; {advice(data)}"
        )
        return Rejected(row, not_in(charset or encoding), f"{where}, {known}")
    except (LookupError, ValueError):  # no such name, or one that is no name at all
        return Rejected(row, "unknown_charset", charset[:80])
    return whole(row, text, meta)


def unpacked_body(content: Any, limit: Limit) -> bytes:
    """Return the content of a page that was sent packed, as far as a little more than a document's size."""
    blocks, size = [], 0
    while size <= MAX_DOCUMENT_BYTES and (block := content.read(BLOCK_BYTES)):
        limit.take(len(block))
        blocks.append(block)
        size += len(block)
    return b"".join(blocks)
