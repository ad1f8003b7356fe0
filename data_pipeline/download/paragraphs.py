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
    """Cut a text, which comes in blocks, at blank lines into slices of at least ``characters``.

    The slices add up to the text and don't depend on the blocks, but where a paragraph is longer than a document
    may be.
    """
    cuts: list[str] = []
    size = 0
    for cut, is_paragraph in cut_at_gaps(with_whole_ends(blocks)):
        cuts.append(cut)
        size += len(cut)
        if (is_paragraph and size >= characters) or size > MAX_DOCUMENT_BYTES:
            yield "".join(cuts)
            cuts, size = [], 0
    if size:
        yield "".join(cuts)


def with_whole_ends(blocks: Iterable[str]) -> Iterator[str]:
    """Yield the text in blocks that don't cut a CR LF."""
    kept = ""
    for block in blocks:
        block = kept + block
        kept = "\r" if block.endswith("\r") else ""
        yield block.removesuffix("\r")
    yield kept


def cut_at_gaps(blocks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield the text in slices, and whether each ends a paragraph: with blank lines that something follows."""
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
