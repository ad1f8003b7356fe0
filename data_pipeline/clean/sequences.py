"""Find sequences of words in a column of texts, many at a time: phrases of a list, n-grams of evaluation sets.

A numba kernel hashes the words of every text over Arrow's buffers and looks each window up in a table; what it finds
is compared word by word before it counts, so no collision of hashes is ever taken for a match.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.core.kernels import MULTIPLIER, code_point, kernel, mix
from data_pipeline.core.words import (
    DASHES,
    IGNORED,
    LETTER,
    MARK,
    OTHER,
    SPACE,
    UNSPACED,
    character_classes,
    lower_case,
    words_of,
)
from data_pipeline.documents import buffers

ITEMS_IN_MEMORY = 4096


class Match(NamedTuple):
    """A window of words that stands both in a text and in an item: the first of its group."""

    row: int
    """Row of the text."""
    item: int
    words: str


class Sequences:
    """Sequences of words to look for.

    Args:
        items: the texts that hold them.
        ngram: every window of so many words is sought; None: each item as a whole.
        shortest: an item of fewer words than ``ngram``, but of so many, is sought as a whole; None: it is not.
        joined: punctuation inside a word is removed (``don't`` is ``dont``), but for dashes, as for evaluation sets;
            else it separates words, as for phrases. For words otherwise see `data_pipeline.core.words`.
        groups: to which group each item belongs, where a window is sought in each group; None: all to one.
    """

    def __init__(
        self,
        items: Sequence[str],
        *,
        ngram: int | None,
        shortest: int | None = None,
        joined: bool,
        groups: Sequence[int] | None = None,
    ) -> None:
        self._joined = joined
        self._groups = [0] * len(items) if groups is None else groups
        self._words = lru_cache(ITEMS_IN_MEMORY)(lambda item: words_of(items[item], joined))
        data, offsets = buffers(pa.array(items, pa.string()))
        counts = np.zeros(len(items), np.int64)
        count_words(data, offsets, *word_tables(), joined, counts)
        widths = counts if ngram is None else np.full(len(items), ngram)
        if ngram is not None and shortest is not None:
            widths = np.where((counts >= shortest) & (counts < ngram), counts, widths)
        self.windows = np.where(widths > 0, np.maximum(0, counts - widths + 1), 0)
        """How many windows each item has; none where it has too few words."""
        hashes = np.empty(self.windows.sum(), np.uint64)
        hash_items(data, offsets, *word_tables(), joined, widths, counts.max(initial=0), hashes)
        item = np.repeat(np.arange(len(items)), self.windows)
        at = np.arange(len(hashes)) - np.repeat(np.cumsum(self.windows) - self.windows, self.windows)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._at = hashes[order], at[order]
        self.items = item[order]
        """The item of each window."""
        self._widths = np.unique(widths[self.windows > 0])
        self._table, self._bits = room_for(len(hashes))
        fill_table(self._hashes, self._table, self._bits)

    def find(self, texts: pa.Array) -> Iterator[Match]:
        """Every window of the texts that stands in an item, once for each group of items, by row and position."""
        for row, window, same in self._windows(texts):
            for item in self._items_with(window, same):
                yield Match(row, item, " ".join(window))

    def mark(self, texts: pa.Array, seen: NDArray[np.bool_]) -> None:
        """Set ``seen``, shape (windows,) and in the order of `items`, for each window that stands in a text."""
        for _, window, same in self._windows(texts, seen):
            for entry in range(same.start, same.stop):
                seen[entry] |= self._has(entry, window)

    def _windows(
        self, texts: pa.Array, seen: NDArray[np.bool_] | None = None
    ) -> Iterator[tuple[int, list[str], slice]]:
        """Yield (row, words, the items' windows of the same hash), but where these are all ``seen``."""
        hits = np.zeros(len(texts), np.int64)
        none = np.empty((0, 3), np.int64)
        self._look_up(texts, hits, none, np.empty(0, np.uint64))
        rows = np.flatnonzero(hits)
        if not len(rows):
            return
        some = texts.take(pa.array(rows))
        found, hashes = np.empty((hits.sum(), 3), np.int64), np.empty(hits.sum(), np.uint64)
        self._look_up(some, np.zeros(len(rows), np.int64), found, hashes)
        firsts, ends = (np.searchsorted(self._hashes, hashes, side).tolist() for side in ("left", "right"))
        last, words = -1, []
        for (row, at, width), first, end in zip(found.tolist(), firsts, ends, strict=True):
            if seen is not None and seen[first:end].all():
                continue
            if row != last:
                last, words = row, words_of(some[row].as_py(), self._joined)
            yield int(rows[row]), words[at : at + width], slice(first, end)

    def _look_up(
        self, texts: pa.Array, hits: NDArray[np.int64], found: NDArray[np.int64], hashes: NDArray[np.uint64]
    ) -> None:
        data, offsets = buffers(texts)
        longest = int(np.diff(offsets).max(initial=0))
        look_up(
            data, offsets, *word_tables(), self._joined, self._widths, longest, self._table, self._bits,
            hits, found, hashes,
        )  # fmt: skip

    def _items_with(self, window: list[str], same: slice) -> list[int]:
        """Return the first item of each group that has this window."""
        items: dict[int, int] = {}
        for entry in range(same.start, same.stop):
            item = int(self.items[entry])
            group = self._groups[item]
            if group not in items and self._has(entry, window):
                items[group] = item
        return [*items.values()]

    def _has(self, entry: int, window: list[str]) -> bool:
        """Compare a window of an item with another, word by word."""
        at = self._at[entry]
        return self._words(int(self.items[entry]))[at : at + len(window)] == window


@cache
def word_tables() -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """Class and lower case of each code point."""
    classes = character_classes().copy()
    classes[[ord(dash) for dash in DASHES]] = SPACE
    return classes, lower_case()


def room_for(entries: int) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Return an empty hash table at most half full, and sixteen bits an entry that mostly show: not in it."""
    size = 1 << max(4, (2 * entries).bit_length())
    return np.zeros(size, np.uint64), np.zeros(size, np.uint8)


@kernel
def fill_table(hashes: NDArray[np.uint64], table: NDArray[np.uint64], bits: NDArray[np.uint8]) -> None:
    mask = np.uint64(len(table) - 1)
    for at in range(len(hashes)):
        key = hashes[at]
        bit = key >> np.uint64(32)
        bits[(bit >> np.uint64(3)) & mask] |= np.uint8(1) << np.uint8(bit & np.uint64(7))
        slot = key & mask
        while table[slot] and table[slot] != key:
            slot = (slot + np.uint64(1)) & mask
        table[slot] = key


@kernel
def word_hashes(
    data: NDArray[np.uint8],
    start: int,
    end: int,
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint32],
    joined: bool,
    words: NDArray[np.uint64],
) -> int:
    """Hash the words of one text into ``words`` (where there is room for any); returns how many there are."""
    count = 0
    hashed = np.uint64(0)
    word = OTHER  # class of the word that is open
    at = start
    while at <= end:
        kind, code, length = SPACE, 32, 1
        if at < end:
            code, length = code_point(data, at)
            kind = int(classes[code]) if code < len(classes) else OTHER
        at += length
        if kind == IGNORED or (kind == OTHER and joined) or (kind == MARK and word == OTHER):
            continue
        if word != OTHER and kind != MARK and not (word == LETTER and kind == LETTER):
            if len(words):
                words[count] = hashed
            count += 1
            hashed = np.uint64(0)
            word = OTHER
        if kind in (LETTER, UNSPACED):
            word = kind
        elif kind != MARK:
            continue
        hashed = (hashed ^ np.uint64(lower[code] + 1)) * MULTIPLIER
        hashed ^= hashed >> np.uint64(32)
    return count


@kernel
def window_hashes(words: NDArray[np.uint64], count: int, width: int, windows: NDArray[np.uint64]) -> int:
    """Hash every window of ``width`` words (at least 1) into ``windows``; returns how many there are.

    A polynomial of the words' hashes modulo 2^64, rolled along, then mixed with the width; never 0.
    """
    leaving = np.uint64(1)
    rolling = np.uint64(0)
    for at in range(min(width - 1, count)):
        leaving *= MULTIPLIER
        rolling = rolling * MULTIPLIER + words[at]
    for at in range(count - width + 1):
        rolling = rolling * MULTIPLIER + words[at + width - 1]
        windows[at] = max(mix(rolling + np.uint64(width)), np.uint64(1))
        rolling -= words[at] * leaving
    return max(0, count - width + 1)


@kernel
def count_words(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int32],
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint32],
    joined: bool,
    counts: NDArray[np.int64],
) -> None:
    nowhere = np.empty(0, np.uint64)
    for row in range(len(offsets) - 1):
        counts[row] = word_hashes(data, offsets[row], offsets[row + 1], classes, lower, joined, nowhere)


@kernel
def hash_items(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int32],
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint32],
    joined: bool,
    widths: NDArray[np.int64],
    most: int,
    hashes: NDArray[np.uint64],
) -> None:
    """Hash the windows of all items, each of its own width, one after the other into ``hashes``."""
    words = np.empty(most + 1, np.uint64)
    to = 0
    for row in range(len(offsets) - 1):
        count = word_hashes(data, offsets[row], offsets[row + 1], classes, lower, joined, words)
        if widths[row]:
            to += window_hashes(words, count, widths[row], hashes[to:])


@kernel
def look_up(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int32],
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint32],
    joined: bool,
    widths: NDArray[np.int64],
    longest: int,
    table: NDArray[np.uint64],
    bits: NDArray[np.uint8],
    hits: NDArray[np.int64],
    found: NDArray[np.int64],
    hashes: NDArray[np.uint64],
) -> None:
    """Count the windows of each text that are in the table into ``hits``.

    Where ``found`` has room they go there too, as (row, first word, width), in order of rows, and their hashes.
    """
    words = np.empty(longest + 1, np.uint64)
    windows = np.empty(longest + 1, np.uint64)
    mask = np.uint64(len(table) - 1)
    to = 0
    for row in range(len(offsets) - 1):
        count = word_hashes(data, offsets[row], offsets[row + 1], classes, lower, joined, words)
        for width in widths:
            for at in range(window_hashes(words, count, width, windows)):
                key = windows[at]
                bit = key >> np.uint64(32)
                if not (bits[(bit >> np.uint64(3)) & mask] >> np.uint8(bit & np.uint64(7))) & 1:
                    continue
                slot = key & mask
                while table[slot] and table[slot] != key:
                    slot = (slot + np.uint64(1)) & mask
                if table[slot]:
                    hits[row] += 1
                    if len(found):
                        found[to, 0], found[to, 1], found[to, 2] = row, at, width
                        hashes[to] = key
                        to += 1
