"""Cutting a text at its blank lines, block by block: each character is looked at once, whatever lies between."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain

from data_pipeline.documents import MAX_DOCUMENT_BYTES

LINE_END = r"(?>\r\n|\r|\n)"
BLANK_LINES = re.compile(rf"{LINE_END}[ \t]*{LINE_END}\s*")
LF_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")
"""`BLANK_LINES` of a text without CR: many times as fast."""
AFTER_FEED = re.compile(rf"[ \t]*{LINE_END}\s*")
"""Pattern that makes `BLANK_LINES` with a line end that ended the block before."""
SPACE = re.compile(r"\s*")


def split_paragraphs(blocks: Iterable[str], characters: int) -> Iterator[str]:
    """Cut a text, which comes in blocks, at blank lines into parts of at least ``characters``.

    The parts add up to the text and don't depend on the blocks, but where a paragraph is longer than a document
    may be.
    """
    parts: list[str] = []
    size = 0
    for piece, is_paragraph in pieces(with_whole_ends(blocks)):
        parts.append(piece)
        size += len(piece)
        if (is_paragraph and size >= characters) or size > MAX_DOCUMENT_BYTES:
            yield "".join(parts)
            parts, size = [], 0
    if size:
        yield "".join(parts)


def with_whole_ends(blocks: Iterable[str]) -> Iterator[str]:
    """The text in blocks that don't cut a CR LF."""
    kept = ""
    for block in blocks:
        block = kept + block
        kept = "\r" if block.endswith("\r") else ""
        yield block.removesuffix("\r")
    yield kept


def pieces(blocks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The text in pieces, and whether each ends a paragraph: with blank lines that something follows."""
    # Whether blank lines, or the line end before one, reach the end of the block before.
    in_gap = after_feed = False
    for block in blocks:
        begun = SPACE.match(block) if in_gap else AFTER_FEED.match(block) if after_feed else None
        gaps = (BLANK_LINES if "\r" in block else LF_BLANK_LINES).finditer(block, begun.end() if begun else 0)
        in_gap = False
        start = 0
        for gap in chain([begun] if begun else [], gaps):
            in_gap = gap.end() == len(block)
            if not in_gap:
                yield block[start : gap.end()], True
                start = gap.end()
        yield block[start:], False
        line = block.rstrip(" \t")
        after_feed = line.endswith(("\n", "\r")) if line else after_feed
