"""The longest run of characters of one kind in each text of a column: where it is short, so are the words."""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.core.kernels import code_point, kernel
from data_pipeline.core.words import TABLE_SIZE

OTHER, SPACE, NUMBER, LETTER = (np.uint8(kind) for kind in range(4))


def longest_runs(texts: pa.Array) -> NDArray[np.int64]:
    """Return characters of the longest run of letters with their marks, of digits, of white space or of other signs, by
    text.

    Args:
        texts: of type large_string.
    """
    longest = np.zeros(len(texts), np.int64)
    if len(texts):
        _, offsets, data = texts.buffers()
        starts = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
        measure_runs(np.frombuffer(data or b"", np.uint8), starts, character_kinds(), longest)
    return longest


@cache
def character_kinds() -> NDArray[np.uint8]:
    """Kind of each code point."""
    by_category = {"L": LETTER, "M": LETTER, "N": NUMBER}
    kinds = [
        SPACE if chr(code).isspace() else by_category.get(unicodedata.category(chr(code))[0], OTHER)
        for code in range(TABLE_SIZE)
    ]
    return np.array(kinds, np.uint8)


@kernel
def measure_runs(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    kinds: NDArray[np.uint8],
    longest: NDArray[np.int64],
) -> None:
    for row in range(len(offsets) - 1):
        at, run, last = offsets[row], 0, np.uint8(255)
        while at < offsets[row + 1]:
            code, length = code_point(data, at)
            kind = kinds[code] if code < len(kinds) else OTHER
            run = run + 1 if kind == last else 1
            last = kind
            longest[row] = max(longest[row], run)
            at += length
