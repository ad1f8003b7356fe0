"""The kernels of `data_pipeline.dedup.spans`: words with their positions, windows of words, and which words are cut.

A word (see `data_pipeline.core.words`; ``_`` is a letter) is taken together with the punctuation that follows it up to
the next one; it is hashed byte by byte as it stands, without white space. A window is a run of a given number of words.
Equal windows are found by hash: a polynomial of its words' hashes modulo 2^64, rolled along the text and then mixed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_pipeline.core.kernels import MULTIPLIER, code_point, kernel, mix
from data_pipeline.core.words import IGNORED, LETTER, MARK, OTHER, SPACE, UNSPACED, character_classes

ALONE, KEPT, REPEATED = 0, 1, 2
"""Kinds of window: the only one of its text, the one of several that stays, or one of the others."""


def classes() -> NDArray[np.uint8]:
    """Class of each code point."""
    return character_classes("_")


@kernel
def read_words(
    data: NDArray[np.uint8],
    start: int,
    end: int,
    classes: NDArray[np.uint8],
    words: NDArray[np.uint64],
    starts: NDArray[np.int32],
) -> int:
    """Write the hash and the first byte (from ``start``) of every word of one text; returns how many there are.

    What stands before the first word belongs to none. A text of n bytes has at most n / 2 + 1 words.
    """
    count = 0
    word = np.uint64(0)
    in_letters = False
    at = start
    while at < end:
        code, length = code_point(data, at)
        kind = int(classes[code]) if code < len(classes) else OTHER
        if kind == SPACE:
            in_letters = False
            at += length
            continue
        if kind == UNSPACED or (kind == LETTER and not in_letters):
            if count:
                words[count - 1] = mix(word)
            starts[count] = at - start
            count += 1
            word = np.uint64(0)
        if kind != MARK and kind != IGNORED:
            in_letters = kind == LETTER
        for byte in range(at, at + length):
            word = (word ^ (np.uint64(data[byte]) + np.uint64(1))) * MULTIPLIER
            word ^= word >> np.uint64(32)
        at += length
    if count:
        words[count - 1] = mix(word)
    return count


@kernel
def hash_runs(words: NDArray[np.uint64], count: int, width: int, hashes: NDArray[np.uint64]) -> int:
    """Hash every run of ``width`` of ``count`` words; returns how many there are.

    Two words in the order of the Thue-Morse sequence and its complement differ by (a - b) * the product of
    (MULTIPLIER^(2^i) - 1), which 2^64 divides from 1024 words on. Of 256 words it is 2^44 that does: they share a hash
    if a and b agree in their last 20 bits.
    """
    leaving = np.uint64(1)  # MULTIPLIER ** (width - 1): the weight of the word that leaves
    for _ in range(width - 1):
        leaving *= MULTIPLIER
    rolling = np.uint64(0)
    for at in range(count):
        rolling = rolling * MULTIPLIER + words[at]
        if at >= width - 1:
            first = at - width + 1
            hashes[first] = mix(rolling)
            rolling -= words[first] * leaving
    return max(0, count - width + 1)


@kernel
def find_anchors(
    hashes: NDArray[np.uint64],
    windows: int,
    within: int,
    anchors: NDArray[np.uint64],
    first: NDArray[np.int32],
) -> int:
    """Return the smallest of each ``within`` consecutive hashes, once for each position; returns how many there are.

    Window i spans ``hashes[i : i + within]``. ``first`` is the window from which on an anchor is the smallest. Of equal
    ones the last counts: so equal windows have their anchors at the same distance, in different positions even where
    the windows overlap.
    """
    count = 0
    at = -1
    for window in range(windows):
        last = window + within - 1
        if at < window:
            at = window
            for place in range(window + 1, last + 1):
                if hashes[place] <= hashes[at]:
                    at = place
        elif hashes[last] <= hashes[at]:
            at = last
        else:
            continue
        anchors[count] = hashes[at]
        first[count] = window
        count += 1
    return count


@kernel
def all_anchors(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int32],
    width: int,
    classes: NDArray[np.uint8],
) -> NDArray[np.uint64]:
    """Return the anchors of all texts of a column, in order: see `find_anchors`."""
    words, starts, short, anchors, first = room(offsets)
    found = np.empty((offsets[-1] - offsets[0]) // 2 + len(offsets), np.uint64)
    total = 0
    gram = (width + 1) // 2
    for row in range(len(offsets) - 1):
        count = read_words(data, offsets[row], offsets[row + 1], classes, words, starts)
        hash_runs(words, count, gram, short)
        here = find_anchors(short, count - width + 1, width - gram + 1, anchors, first)
        found[total : total + here] = anchors[:here]
        total += here
    return found[:total].copy()


@kernel
def all_windows(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int32],
    width: int,
    classes: NDArray[np.uint8],
    repeated: NDArray[np.bool_],
) -> tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.uint32], int]:
    """Hash, row and first word of all windows whose anchor is ``repeated``, and how many anchors there were.

    ``repeated`` speaks of the anchors in the order of `all_anchors`; more may follow than these texts have.
    """
    words, starts, short, anchors, first = room(offsets)
    long = np.empty(len(words), np.uint64)
    room_for = (offsets[-1] - offsets[0]) // 2 + len(offsets)
    hashes, rows, places = (
        np.empty(room_for, np.uint64),
        np.empty(room_for, np.uint32),
        np.empty(room_for, np.uint32),
    )
    total = used = 0
    gram = (width + 1) // 2
    for row in range(len(offsets) - 1):
        count = read_words(data, offsets[row], offsets[row + 1], classes, words, starts)
        windows = max(0, count - width + 1)
        hash_runs(words, count, gram, short)
        here = find_anchors(short, windows, width - gram + 1, anchors, first)
        if repeated[used : used + here].any():
            hash_runs(words, count, width, long)
        for anchor in range(here):
            if repeated[used + anchor]:
                end = first[anchor + 1] if anchor + 1 < here else windows
                for place in range(first[anchor], end):
                    hashes[total] = long[place]
                    rows[total] = row
                    places[total] = place
                    total += 1
        used += here
    return hashes[:total].copy(), rows[:total].copy(), places[:total].copy(), used


@kernel
def room(offsets: NDArray[np.int32]) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
    """Arrays for the words, starts, hashes, anchors and first windows of the longest text."""
    longest = 0
    for row in range(len(offsets) - 1):
        longest = max(longest, offsets[row + 1] - offsets[row])
    size = longest // 2 + 2
    return (
        np.empty(size, np.uint64),
        np.empty(size, np.int32),
        np.empty(size, np.uint64),
        np.empty(size, np.uint64),
        np.empty(size, np.int32),
    )


@kernel
def first_of_each(
    group: NDArray[np.int64],
    groups: int,
    documents: NDArray[np.uint64],
    shards: NDArray[np.uint32],
    rows: NDArray[np.uint32],
    places: NDArray[np.uint32],
) -> NDArray[np.int64]:
    """Return the index of each group's first member in the order of document hash, shard, row and position."""
    best = np.full(groups, -1, np.int64)
    for at in range(len(group)):
        other = best[group[at]]
        if other < 0:
            best[group[at]] = at
        elif documents[at] != documents[other]:
            if documents[at] < documents[other]:
                best[group[at]] = at
        elif shards[at] != shards[other]:
            if shards[at] < shards[other]:
                best[group[at]] = at
        elif rows[at] != rows[other]:
            if rows[at] < rows[other]:
                best[group[at]] = at
        elif places[at] < places[other]:
            best[group[at]] = at
    return best


@kernel
def cut_words(
    places: NDArray[np.uint32], kinds: NDArray[np.uint8], width: int, count: int
) -> tuple[NDArray[np.bool_], int]:
    """Find which of the ``count`` words of a text are cut, and how many of its windows that should stay are broken.

    Cut are the words of `REPEATED` windows but not of `KEPT` ones; and all words of the `REPEATED` windows that would
    be whole after that. ``places`` (positions of words) ascend.
    """
    cut = cover(places, kinds, REPEATED, width, count)
    stays = cover(places, kinds, KEPT, width, count)
    before = np.zeros(count + 1, np.int64)
    for word in range(count):
        cut[word] &= not stays[word]
        before[word + 1] = before[word] + cut[word]
    whole = kinds.copy()
    for at in range(len(places)):
        if kinds[at] == REPEATED and before[places[at] + width] > before[places[at]]:
            whole[at] = ALONE
    cut |= cover(places, whole, REPEATED, width, count)
    for word in range(count):
        before[word + 1] = before[word] + cut[word]
    broken = 0
    for at in range(len(places)):
        broken += int(kinds[at] == KEPT and before[places[at] + width] > before[places[at]])
    return cut, broken


@kernel
def cover(
    places: NDArray[np.uint32], kinds: NDArray[np.uint8], kind: int, width: int, count: int
) -> NDArray[np.bool_]:
    """Find which words are in a window of this kind."""
    covered = np.zeros(count, np.bool_)
    end = np.int64(0)
    for at in range(len(places)):
        if kinds[at] == kind:
            place = np.int64(places[at])
            covered[max(end, place) : place + width] = True
            end = place + width
    return covered
