"""Counts that the quality rules ask for, of a whole column at once, by one numba kernel over Arrow's buffers.

Words are what `str.split` gives, each cut where `data_pipeline.core.words` has words meet that nothing parts: of
scripts that are written without spaces every letter is one (with what follows it), and lines are what stands between
line feeds; a line counts without the white space around it, and not at all where nothing else is in it. A paragraph is
a run of such lines. Texts are normal (see `data_pipeline.clean.normalise`), so a line feed alone ends a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.clean.sentences import ASCII_ENDS, CLOSING_QUOTES, OTHER_ENDS, unended_letters
from data_pipeline.clean.stop_words import STOP_WORDS as ALL_STOP_WORDS
from data_pipeline.core.kernels import MULTIPLIER, code_point, kernel
from data_pipeline.core.words import LETTER as WORD_LETTER
from data_pipeline.core.words import MARK, TABLE_SIZE, character_classes
from data_pipeline.core.words import UNSPACED as WORD_UNSPACED
from data_pipeline.documents import blocks, buffers

Counts = NDArray[np.int64]

STOP_WORDS = frozenset(ALL_STOP_WORDS["en"].split())
BULLETS = ("•", "‣", "●", "-", "*", "–", "・", "·", "◦", "■", "◆", "▪")
ELLIPSES = ("...", "…")
TERMINAL = (*ASCII_ENDS, *OTHER_ENDS, *CLOSING_QUOTES, "'", "’", "…", *unended_letters())
"""Characters that end a line for FineWeb's rule: its first code has the five of ASCII; these are their kin in all
scripts, and the letters of those that mark no end."""
FIRST_WIDE = 0x2E80
"""Characters from here on (Chinese, Japanese, Korean) are as wide as two, and say as much."""

SPACE, LETTER, NUMBER, UNSPACED, SIGN, DOTS, BULLET, TERMINATOR = (np.uint8(1 << bit) for bit in range(8))
PACKED = tuple(np.uint64(int.from_bytes(word.rjust(4).encode(), "little")) for word in sorted(STOP_WORDS))
"""In the last of four bytes, after spaces; the order is that of `LENGTHS`."""
LENGTHS = tuple(len(word) for word in sorted(STOP_WORDS))


@dataclass(frozen=True)
class TextStats:
    """Counts for each text of a column, shape (texts,) each. Characters are code points."""

    characters: Counts
    words: Counts
    word_characters: Counts
    alphabetic_words: Counts
    """Words that hold a letter (`str.isalpha`) or are of a script without spaces."""
    stop_words: Counts
    """How many different ones of `STOP_WORDS` occur, in any case."""
    hashes: Counts
    """``#`` signs."""
    ellipses: Counts
    """``...`` (not overlapping) and ``…``."""
    newlines: Counts
    lines: Counts
    line_characters: Counts
    bullet_lines: Counts
    """Lines that begin with one of `BULLETS`."""
    ellipsis_lines: Counts
    """Lines that end with one of `ELLIPSES`."""
    terminated_lines: Counts
    """Lines that end with one of `TERMINAL`."""
    duplicate_lines: Counts
    """Lines that equal an earlier one of the text."""
    duplicate_line_characters: Counts
    paragraphs: Counts
    duplicate_paragraphs: Counts
    duplicate_paragraph_characters: Counts
    """Characters of the lines of repeated paragraphs."""
    short_lines: Counts
    """Lines with fewer characters than `measure` was given; those from `FIRST_WIDE` on count twice."""
    unspaced_words: Counts
    """Words of scripts that are written without spaces."""
    spaced_length: Counts
    """Characters of all other words; those from `FIRST_WIDE` on count twice."""

    def take(self, rows: NDArray[np.int64]) -> TextStats:
        """Return the counts of some texts."""
        return TextStats(*(getattr(self, name)[rows] for name in TextStats.__dataclass_fields__))


def measure(texts: pa.Array, short: int = 30) -> TextStats:
    """Return the counts of a column of texts; ``short`` is the number of characters below which a line is short."""
    data, offsets = buffers(texts)
    counts = np.zeros((len(TextStats.__dataclass_fields__), len(texts)), np.int64)
    count_all(data, blocks(data), offsets, character_kinds(), short, counts)
    return TextStats(*counts)


def word_keys(texts: pa.Array, words: Counts) -> tuple[Counts, NDArray[np.uint64], NDArray[np.int32]]:
    """Return a key for each word of a column, equal for equal words of a text (see `hash_bytes`).

    Args:
        words: how many each text has, as `measure` counts them.

    Returns:
        Where each text's keys begin, shape (texts + 1,); the keys; and the characters of each word.
    """
    data, offsets = buffers(texts)
    begins = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(words, out=begins[1:])
    keys, sizes = np.empty(begins[-1], np.uint64), np.empty(begins[-1], np.int32)
    hash_words(data, blocks(data), offsets, character_kinds(), keys, sizes)
    return begins, keys, sizes


@cache
def character_kinds() -> NDArray[np.uint8]:
    """Return the flags of what each code point may be."""
    table = np.zeros(TABLE_SIZE, np.uint8)
    for code in range(TABLE_SIZE):
        one = chr(code)
        table[code] = (SPACE if one.isspace() else 0) | (LETTER if one.isalpha() else 0)
    classes = character_classes()
    table[classes == MARK] &= ~LETTER
    table[(classes == WORD_LETTER) & (table & LETTER == 0)] |= NUMBER
    table[classes == WORD_UNSPACED] |= UNSPACED | LETTER
    for flag, characters in ((SIGN, "#.…"), (DOTS, "…"), (BULLET, BULLETS), (TERMINATOR, TERMINAL)):
        for one in characters:
            table[ord(one)] |= flag
    return table


@kernel(inline="always")
def seen_letter(seen: np.uint8) -> np.uint8:
    """Return the kinds that begin another word, where one of two words is of a script without spaces."""
    return LETTER | NUMBER if seen & (LETTER | NUMBER) else np.uint8(0)


@kernel
def last_block(blocks: NDArray[np.uint64], at: int, end: int) -> np.uint64:
    """Return the one to eight bytes from ``at`` to ``end``, the first lowest, with zeros below them."""
    place = min(at, len(blocks) - 1)  # the last seven bytes are the end of the last block
    return (blocks[place] >> np.uint64(8 * (at - place))) << np.uint64(8 * (8 - (end - at)))


@kernel
def stop_word(blocks: NDArray[np.uint64], start: int, end: int) -> int:
    """Return the bit of the stop word that stands between these bytes, in any case; 0 for any other word."""
    if end - start > 4:
        return 0
    lower = (last_block(blocks, start, end) >> np.uint64(32)) | np.uint64(0x20202020)  # upper case to lower
    found = 0
    for word in range(8):
        found |= ((lower == PACKED[word]) & (end - start == LENGTHS[word])) << word
    return found


@kernel
def hash_bytes(blocks: NDArray[np.uint64], start: int, end: int) -> np.uint64:
    """Return a 64-bit hash of at least one byte: two others of one text that share it are beyond practice."""
    value = np.uint64(end - start)
    at = start
    while end - at > 8:
        value = (value ^ blocks[at]) * MULTIPLIER
        value ^= value >> np.uint64(32)
        at += 8
    value = (value ^ last_block(blocks, at, end)) * MULTIPLIER
    return value ^ (value >> np.uint64(32))


@kernel
def repeats(
    hashes: NDArray[np.uint64], sizes: Counts, count: int, table: NDArray[np.uint64]
) -> tuple[int, int]:
    """Count how many of the first ``count`` blocks equal an earlier one, and their sizes in all."""
    if count < 2:
        return 0, 0
    slots = 4
    while slots < 2 * count:
        slots *= 2
    table[:slots] = 0
    repeated = total = 0
    for at in range(count):
        key = max(hashes[at], np.uint64(1))  # 0 marks a free slot
        slot = np.int64(key & np.uint64(slots - 1))
        while table[slot] and table[slot] != key:
            slot = (slot + 1) & (slots - 1)
        if table[slot]:
            repeated += 1
            total += sizes[at]
        table[slot] = key
    return repeated, total


@kernel
def count_all(
    data: NDArray[np.uint8],
    blocks: NDArray[np.uint64],
    offsets: NDArray[np.int32],
    kinds: NDArray[np.uint8],
    short: int,
    counts: Counts,
) -> None:
    """Fill ``counts``, shape (fields of `TextStats`, texts)."""
    texts = len(offsets) - 1
    most = 0
    for row in range(texts):
        feeds = 0
        for at in range(offsets[row], offsets[row + 1]):
            feeds += data[at] == 10
        counts[7, row] = feeds
        most = max(most, feeds + 1)
    hashes = np.empty((2, most), np.uint64)
    sizes = np.empty((2, most), np.int64)
    table = np.empty(4 * most + 4, np.uint64)
    for row in range(texts):
        count_text(data, blocks, offsets[row], offsets[row + 1], kinds, short, hashes, sizes, counts[:, row])
        lines, paragraphs = counts[8, row], counts[15, row]
        counts[13, row], counts[14, row] = repeats(hashes[0], sizes[0], lines, table)
        counts[16, row], counts[17, row] = repeats(hashes[1], sizes[1], paragraphs, table)


@kernel
def count_text(
    data: NDArray[np.uint8],
    blocks: NDArray[np.uint64],
    start: int,
    end: int,
    kinds: NDArray[np.uint8],
    short: int,
    hashes: NDArray[np.uint64],
    sizes: Counts,
    counts: Counts,
) -> None:
    """Count one text into ``counts``; the hash and the characters of its lines and paragraphs into the arrays."""
    words = word_characters = alphabetic = found = number_signs = ellipses = spaces = 0
    unspaced_words = spaced_length = 0
    lines = line_characters = bullets = dotted = terminated = shorts = paragraphs = 0
    first = last = -1  # bytes of the line, without the space around it
    width = gap = wide = (
        0  # its characters up to the last word; those of the space since; those of twice the width
    )
    head = tail = np.uint8(0)  # kinds of its first and its last character
    block_hash, block_size, in_block = np.uint64(0), 0, False
    at = start
    while at <= end:
        code, length, kind = 10, 1, SPACE
        if at < end:
            code, length = code_point(data, at)
            kind = kinds[code] if code < len(kinds) else np.uint8(0)
        if kind & SPACE:
            spaces += 1
            gap += 1
            at += length
            if code != 10:
                continue
            if first >= 0:
                hashed = hash_bytes(blocks, first, last)
                hashes[0, lines], sizes[0, lines] = hashed, width
                lines += 1
                line_characters += width
                bullets += (head & BULLET) != 0
                terminated += (tail & TERMINATOR) != 0
                shorts += width + wide < short
                three = (
                    last - first >= 3
                    and data[last - 3] == 46
                    and data[last - 2] == 46
                    and data[last - 1] == 46
                )
                dotted += three or (tail & DOTS) != 0
                block_hash = (block_hash ^ hashed) * MULTIPLIER + np.uint64(1)
                block_size += width
                in_block = True
                first = -1
            elif in_block:
                hashes[1, paragraphs], sizes[1, paragraphs] = block_hash, block_size
                paragraphs += 1
                block_hash, block_size, in_block = np.uint64(0), 0, False
            continue
        begin, seen, letters, of_two = at, np.uint8(0), 0, int(code >= FIRST_WIDE)
        head_kind = kind
        while True:
            seen |= kind
            tail = kind
            letters += 1
            at += length
            if at >= end:
                break
            code = int(data[at])
            length = 1
            if code >= 0x80:
                code, length = code_point(data, at)
            kind = kinds[code] if code < len(kinds) else np.uint8(0)
            if kind & SPACE or ((kind | seen) & UNSPACED and kind & seen_letter(seen)):
                break
            if code >= FIRST_WIDE:
                of_two += 1
        words += 1
        word_characters += letters
        if seen & UNSPACED:
            unspaced_words += 1
        else:
            spaced_length += letters + of_two
        alphabetic += (seen & LETTER) != 0
        found |= stop_word(blocks, begin, at)
        if seen & SIGN:
            signs, dots = count_symbols(data, begin, at)
            number_signs += signs
            ellipses += dots
        if first < 0:
            first, width, wide, head = begin, 0, 0, head_kind
        else:
            width += gap
        width += letters
        wide += of_two
        gap = 0
        last = at
    if in_block:
        hashes[1, paragraphs], sizes[1, paragraphs] = block_hash, block_size
        paragraphs += 1
    stop_words = 0
    while found:
        stop_words += found & 1
        found >>= 1
    counts[0] = word_characters + spaces - 1  # the line feed that the end counted as
    counts[1], counts[2], counts[3], counts[4] = words, word_characters, alphabetic, stop_words
    counts[5], counts[6] = number_signs, ellipses
    counts[8], counts[9], counts[10], counts[11], counts[12] = (
        lines,
        line_characters,
        bullets,
        dotted,
        terminated,
    )
    counts[15], counts[18], counts[19], counts[20] = paragraphs, shorts, unspaced_words, spaced_length


@kernel
def count_symbols(data: NDArray[np.uint8], start: int, end: int) -> tuple[int, int]:
    """Return ``#`` signs and ellipses of one word."""
    signs = ellipses = run = 0
    for at in range(start, end):
        byte = data[at]
        signs += byte == 35
        run = run + 1 if byte == 46 else 0
        if run == 3:
            ellipses += 1
            run = 0
        if byte == 0xE2 and data[at + 1] == 0x80 and data[at + 2] == 0xA6:  # …
            ellipses += 1
    return signs, ellipses


@kernel
def hash_words(
    data: NDArray[np.uint8],
    blocks: NDArray[np.uint64],
    offsets: NDArray[np.int32],
    kinds: NDArray[np.uint8],
    keys: NDArray[np.uint64],
    sizes: NDArray[np.int32],
) -> None:
    """Hash the words of all texts, one after the other, into ``keys``, and their characters into ``sizes``."""
    to = 0
    for row in range(len(offsets) - 1):
        at, end = np.int64(offsets[row]), np.int64(offsets[row + 1])
        begin, letters, seen = at, 0, np.uint8(0)
        while at < end:
            code, length = code_point(data, at)
            kind = kinds[code] if code < len(kinds) else np.uint8(0)
            if kind & SPACE:
                if letters:
                    keys[to], sizes[to] = hash_bytes(blocks, begin, at), letters
                    to += 1
                begin, letters, seen = at + length, 0, np.uint8(0)
            elif (kind | seen) & UNSPACED and kind & seen_letter(seen):
                keys[to], sizes[to] = hash_bytes(blocks, begin, at), letters
                to += 1
                begin, letters, seen = at, 1, kind
            else:
                letters += 1
                seen |= kind
            at += length
        if letters:
            keys[to], sizes[to] = hash_bytes(blocks, begin, end), letters
            to += 1
