"""Pages of HTML as documents: their charset, main text, title and address.

The charset is what the page's byte order mark, its server or the page itself states, in this order, as in browsers;
where none states any, it is the source's ``encoding``. None is guessed. The main text is taken out by a library, in a
process of its own (`data_pipeline.download.html_child`): a page on which that hangs or breaks down costs itself only.
"""

from __future__ import annotations

import atexit
import codecs
import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from itertools import chain
from threading import Lock
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from data_pipeline.core.config import Config
from data_pipeline.download.records import Record, Rejected, Text, whole

HTML_TYPES = ("text/html", "application/xhtml+xml")
MAX_PAGE_BYTES = 1 << 25
"""Longer pages are rejected: a parsed one takes some thirty times its size in memory."""
PRESCAN_BYTES = 8192
"""From its beginning, in which a page may declare its charset."""
LENGTH = struct.Struct(">I")

BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
COMMENT = re.compile(rb"<!--.*?(-->|$)", re.DOTALL)
DECLARED = (
    re.compile(rb"\A\s*<\?xml[^>]*\sencoding\s*=\s*[\"']\s*([\w:.-]+)", re.IGNORECASE),
    re.compile(rb"<meta\b[^>]*?\bcharset\s*=\s*[\"']?\s*([\w:.-]+)", re.IGNORECASE),
)
READ_AS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
}
"""The larger encoding that the web means by a name (WHATWG's Encoding Standard)."""
OTHER_LABELS = {
    "x-sjis": "cp932",
    "x-euc-jp": "euc_jp",
    "iso-8859-8-i": "iso8859-8",
    "macintosh": "mac_roman",
    "x-mac-cyrillic": "mac_cyrillic",
    "x-cp1251": "cp1251",
    "ks_c_5601-1987": "cp949",
    "x-gbk": "gb18030",
    "x-x-big5": "big5hkscs",
    "dos-874": "cp874",
    "windows-874": "cp874",
    "unicode-1-1-utf-8": "utf-8",
}
"""Names that Python does not know."""
TOO_SLOW = (signal.SIGPROF, signal.SIGALRM)
BROKEN_DOWN = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


class HtmlRules(Config):
    """How the main text is taken out of pages."""

    extractor: Literal["resiliparse", "trafilatura"] = "resiliparse"
    """See ``benchmarks/results/html.md``. `trafilatura` needs ``pip install 'llmill[trafilatura]'``."""
    page_seconds: float = Field(default=10, gt=0)
    """Seconds of computing after which a page is given up and counted as ``too_slow``."""

    @model_validator(mode="after")
    def _installed(self) -> Self:
        if self.extractor != "resiliparse" and find_spec(self.extractor) is None:
            raise ValueError(f"{self.extractor} is not installed: pip install 'llmill[{self.extractor}]'")
        return self


class ExtractorGone(RuntimeError):
    """The process was killed from outside, or can't be started: no page is to blame."""


class Extractor:
    """A process that answers for one page at a time."""

    def __init__(self, rules: HtmlRules) -> None:
        command = [sys.executable, "-m", "data_pipeline.download.html_child"]
        self._process = subprocess.Popen(
            [*command, rules.extractor, str(rules.page_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def ask(self, page: str) -> dict[str, str]:
        """Return ``text``, ``title`` and ``url`` of a page, or ``reason`` and ``fault``, after which this is dead.

        Raises:
            ExtractorGone: the process ended for a reason that is not the page's.
        """
        data = page.encode("utf-8", "replace")
        try:
            self._requests.write(LENGTH.pack(len(data)) + data)
            self._requests.flush()
        except BrokenPipeError:
            pass
        head = self._answers.read(LENGTH.size)
        data = self._answers.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""
        if data:
            answer: dict[str, str] = json.loads(data)
            return answer if "text" in answer else {"reason": "bad_html", **answer}
        status = self._process.wait()
        self.close()
        if -status in TOO_SLOW:
            return {"reason": "too_slow", "fault": "its main text was not found within page_seconds"}
        if -status in BROKEN_DOWN:
            return {"reason": "extractor_failed", "fault": signal.strsignal(-status) or str(status)}
        raise ExtractorGone(f"the process that reads HTML ended with status {status}")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Close our ends of its pipes; it ends when it finds that, and nobody waits for it."""
        with suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()
        self._process.returncode = self._process.returncode or 0


class Extractors:
    """Processes that wait for pages: as many as threads of this process have asked at once."""

    def __init__(self) -> None:
        self._idle: dict[HtmlRules, list[Extractor]] = {}
        self._lock = Lock()
        os.register_at_fork(after_in_child=self._forget)  # those are the parent's

    def _forget(self) -> None:
        self._lock = Lock()
        self.close()

    def close(self) -> None:
        """Let those go that wait."""
        with self._lock:
            for extractor in chain.from_iterable(self._idle.values()):
                extractor.close()
            self._idle.clear()

    def ask(self, page: str, rules: HtmlRules) -> dict[str, str]:
        with self._lock:
            waiting = [one for one in self._idle.pop(rules, []) if one.is_alive]
            extractor = waiting.pop() if waiting else Extractor(rules)
            self._idle[rules] = waiting
        answer = extractor.ask(page)
        if extractor.is_alive:
            with self._lock:
                self._idle.setdefault(rules, []).append(extractor)
        return answer


EXTRACTORS = Extractors()
atexit.register(EXTRACTORS.close)


def codec_of(label: str) -> str | None:
    """Find Python's name of the encoding that the web means by ``label``; None where it means none."""
    label = label.strip().lower()
    try:
        found = codecs.lookup(OTHER_LABELS.get(label, label))
    except (LookupError, ValueError):
        return None
    if not found._is_text_encoding or found.name in ("utf-7", "idna", "punycode") or "escape" in found.name:
        return None
    return READ_AS.get(found.name, found.name)


def declared(data: bytes) -> str:
    """Find the charset that a page itself declares; empty where it does not."""
    head = COMMENT.sub(b"", data[:PRESCAN_BYTES])
    for pattern in DECLARED:
        if match := pattern.search(head):
            label = match[1].decode("ascii", "replace")
            # It was read as ASCII, so it can't be true; browsers take it for UTF-8.
            return "utf-8" if label.lower().startswith("utf-16") else label
    return ""


def charset_of(data: bytes, served: str, fallback: str) -> tuple[str | None, str]:
    """Find the codec of a page (None: an unknown one) and who states it.

    Args:
        served: what its server states; may be empty.
        fallback: what its source sets.
    """
    for mark, codec in BOMS.items():
        if data.startswith(mark):
            return codec, "its byte order mark"
    labels = {"its server": served, "the page": declared(data)}
    for who, label in labels.items():
        if label and (found := codec_of(label)):
            return found, who
    named = [label for label in labels.values() if label]
    return (None, named[0]) if named else (codec_of(fallback), "no one: set the source's encoding")


def read_page(
    row: int | None,
    data: bytes,
    rules: HtmlRules,
    *,
    served: str = "",
    fallback: str = "utf-8",
    meta: Mapping[str, Any] | None = None,
) -> Record:
    """Turn a page as it was sent into a document; see `charset_of`. ``meta`` comes before what the page states."""
    if len(data) > MAX_PAGE_BYTES:
        return Rejected(row, "too_large", f"a page of more than {MAX_PAGE_BYTES} bytes")
    codec, who = charset_of(data, served, fallback)
    if codec is None:
        return Rejected(row, "unknown_charset", who[:80])
    try:
        page, fault = data.decode(codec), ""
    except UnicodeDecodeError as error:
        page = data.decode(codec, "replace")
        fault = (
            f"byte 0x{data[error.start]:02x} at offset {error.start} of the page; {codec} is said by {who}"
        )
    record = main_text(row, page.removeprefix("\ufeff"), rules, meta=meta)
    if (
        fault and isinstance(record, Text) and "\ufffd" in record.text
    ):  # elsewhere in the page it does no harm
        return Rejected(row, f"not_{codec.replace('utf-8', 'utf8')}", fault)
    return record


def main_text(
    row: int | None,
    page: str,
    rules: HtmlRules,
    *,
    meta: Mapping[str, Any] | None = None,
    member: str = "",
) -> Record:
    """Turn a page into a document of its main text; its title and address stand in ``meta`` where these are not."""
    answer = EXTRACTORS.ask(page, rules)
    if "reason" in answer:
        return Rejected(row, answer["reason"], answer["fault"], member=member)
    if not answer["text"]:
        return Rejected(row, "no_main_text", answer["title"] or "a page without title", member=member)
    stated = {name: answer[name] for name in ("title", "url") if answer[name]}
    record = whole(row, answer["text"], {**stated, **(meta or {})} or None)
    record.member = member
    return record


def with_main_text(records: Iterable[Record], rules: HtmlRules) -> Iterator[Record]:
    """Take the texts of records for pages, and turn them into their main texts."""
    for record in records:
        yield as_main_text(record, rules)


def as_main_text(record: Record, rules: HtmlRules) -> Record:
    """Turn one record's text, a page, into its main text."""
    if isinstance(record, Rejected):
        return record
    if record.size > MAX_PAGE_BYTES:
        return Rejected(record.row, "too_large", f"a page of {record.size} bytes", member=record.member)
    return main_text(record.row, record.text, rules, meta=record.meta, member=record.member)
