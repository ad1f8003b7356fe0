"""A process that turns pages into text, one after the other, and is killed by the kernel where a page takes too long.

Parsers are native code, which no exception interrupts; so limits of time and memory are the process's. It reads a page
(its length in four bytes, then UTF-8) from standard input and answers on standard output (a length, then JSON with
``text``, ``title`` and ``url``, or ``fault``), and ends when nobody asks any more. It imports nothing of llmill.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin, urlsplit

LENGTH = struct.Struct(">I")
MEMORY_BYTES = 4 << 30
WALL_FACTOR = 10
"""A page that waits and does not compute gets so many times the limit: a machine may be busy with other things."""
TITLE_CHARACTERS = 1000
ADDRESS_CHARACTERS = 2000

Extract = Callable[[Any, str], str]
"""The main text of a page, given its parsed tree and its source."""


def resiliparse() -> Extract:
    """Load the extractor of the same name."""
    from resiliparse.extract.html2text import extract_plain_text

    def extract(tree: Any, page: str) -> str:
        return str(extract_plain_text(tree, main_content=True, alt_texts=False))

    return extract


def trafilatura() -> Extract:
    """Load the extractor of the same name."""
    from trafilatura import extract as main_text

    def extract(tree: Any, page: str) -> str:
        return main_text(page, include_comments=False, include_tables=True) or ""

    return extract


EXTRACTORS: dict[str, Callable[[], Extract]] = {"resiliparse": resiliparse, "trafilatura": trafilatura}


def address(tree: Any) -> str:
    """Find the address that a page states as its own; empty where it states none that could be one."""
    base = ""
    for selector, attribute in (
        ('link[rel="canonical"]', "href"),
        ('meta[property="og:url"]', "content"),
        ("base", "href"),
    ):
        element = tree.document.query_selector(selector)
        found = urljoin(base, (element.getattr(attribute) or "").strip()) if element else ""
        if urlsplit(found).scheme in ("http", "https") and len(found) <= ADDRESS_CHARACTERS:
            return found
    return ""


def answer(extract: Extract, page: str) -> dict[str, str]:
    """Turn one page into its main text, title and address."""
    from resiliparse.parse.html import HTMLTree

    try:
        tree = HTMLTree.parse(page)
        title = " ".join((tree.title or "").split())[:TITLE_CHARACTERS]
        url = address(tree)  # first: an extractor may change the tree
        return {"text": extract(tree, page).strip(), "title": title, "url": url}
    except Exception as error:  # of any type: what a parser raises on a page it can't read
        return {"fault": f"{type(error).__name__}: {error}"[:300]}


def limit_page(seconds: float) -> None:
    """Let the kernel end this process after so many seconds of computing; 0: no longer."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * seconds)


def main(extractor: str, seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks ends first, and we with him
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    extract = EXTRACTORS[extractor]()
    answer(extract, "<p>first")  # what is imported late is so before the clock runs
    while head := requests.read(LENGTH.size):
        page = requests.read(LENGTH.unpack(head)[0]).decode("utf-8", "replace")
        limit_page(seconds)
        data = json.dumps(answer(extract, page), allow_nan=False).encode()
        limit_page(0)
        answers.write(LENGTH.pack(len(data)) + data)
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
