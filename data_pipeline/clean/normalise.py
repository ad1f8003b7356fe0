"""Normalise texts: one Unicode form, line feeds alone as line ends, no control characters, no space at the ends.

Most texts are normal already. A numba kernel finds them over Arrow's buffers, and only the others become Python
strings.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.clean.text_columns import replace_rows, slices
from data_pipeline.core.kernels import code_point, kernel
from data_pipeline.core.words import TABLE_SIZE
from data_pipeline.documents import buffers

Form = Literal["NFC", "NFKC", "NFD", "NFKD"]

BREAKS = re.compile(r"\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
"""Line ends (those of `str.splitlines`) other than a line feed: form feed, next line, separators, ..."""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters (C0, DEL, C1) but line feed and tab."""

INNER, EDGE = np.uint8(1), np.uint8(2)
"""A character that normalising leaves alone anywhere, and one that it leaves alone at the ends of a text too."""


def normalise(text: str, form: Form | None) -> str:
    """Return ``text`` in a Unicode form, with line feeds alone as line ends, without control characters, stripped."""
    text = BREAKS.sub("\n", text)
    text = CONTROLS.sub("", text)  # before composing, which a control character in between would hinder
    if form and not text.isascii():
        text = unicodedata.normalize(form, text)
    return text.strip()


def normalise_column(texts: pa.Array, form: Form | None) -> pa.Array:
    """`normalise` of every text of a column; the column itself where nothing is to be done."""
    data, offsets = buffers(texts)
    begins, ends = np.empty(len(texts), np.int32), np.empty(len(texts), np.int32)
    find_stripped(data, offsets, stable_characters(form), begins, ends)
    unstable = np.flatnonzero(begins < 0)
    replacements = [normalise(one, form) for one in texts.take(pa.array(unstable)).to_pylist()]
    begins[unstable], ends[unstable] = offsets[unstable], offsets[unstable + 1]
    if not np.array_equal(begins, offsets[:-1]) or not np.array_equal(ends, offsets[1:]):
        texts = slices(data, begins, ends)
    return replace_rows(texts, unstable, replacements)


@cache
def stable_characters(form: Form | None) -> NDArray[np.uint8]:
    """Return `INNER` and `EDGE` by code point, or 0 where the text has to be looked at.

    A text of characters that are each their own normal form, none of which combines with another (marks and
    Hangul's letters do), is in normal form (Unicode Standard Annex 15, section 9).
    """
    table = np.zeros(TABLE_SIZE, np.uint8)
    for code in range(TABLE_SIZE):
        one = chr(code)
        if BREAKS.match(one) or CONTROLS.match(one) or 0xD800 <= code < 0xE000:
            continue
        if form and code > 0x7F and not composes_with_none(one, form):
            continue
        table[code] = INNER if one.isspace() else INNER | EDGE
    return table


def composes_with_none(one: str, form: Form) -> bool:
    hangul_letter = "\u1100" <= one <= "\u11ff"
    mark = unicodedata.category(one)[0] == "M"
    return not mark and not hangul_letter and unicodedata.is_normalized(form, one)


@kernel
def find_stripped(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int32],
    stable: NDArray[np.uint8],
    begins: NDArray[np.int32],
    ends: NDArray[np.int32],
) -> None:
    """Find where each text begins and ends without white space around it; begins at -1 where it may not be normal."""
    for row in range(len(offsets) - 1):
        begin, end = np.int64(offsets[row]), np.int64(offsets[row + 1])
        flags = INNER
        at = begin
        while at < end:
            code, length = code_point(data, at)
            flags &= stable[code] if code < len(stable) else np.uint8(0)
            at += length
        while begin < end:
            code, length = code_point(data, begin)
            if code < len(stable) and stable[code] & EDGE:
                break
            begin += length
        while end > begin:
            last = end - 1
            while data[last] & 0xC0 == 0x80:  # bytes inside a character
                last -= 1
            code, _ = code_point(data, last)
            if code < len(stable) and stable[code] & EDGE:
                break
            end = last
        begins[row] = begin if flags & INNER else -1
        ends[row] = end
