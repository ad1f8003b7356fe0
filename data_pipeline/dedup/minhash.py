"""MinHash signatures of word shingles, computed by numba over Arrow's text buffers in place.

A document is its set of shingles: hashes of n consecutive lower-cased words, each with the signs behind it that count.
They are thrown into bins, and each bin keeps its smallest hash (Li, Owen, Zhang 2012, "One Permutation Hashing"). While
bins are empty, as with short documents, all shingles are thrown again with new hashes, into empty bins only (Dahlgaard,
Knudsen, Thorup 2017, "Fast Similarity Sketching"). So two signatures agree in an entry with probability equal to the
Jaccard similarity, and the fraction of entries in which they agree varies no more than with independent permutations,
however short the documents. Of each entry 16 bits are kept (Li, Koenig 2010, "b-Bit Minwise Hashing").
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numba
import numpy as np
import pyarrow as pa
from llvmlite import ir
from numba.extending import intrinsic
from numpy.typing import NDArray

from data_pipeline.core.kernels import MULTIPLIER, code_point, kernel, mix
from data_pipeline.core.words import (
    IGNORED,
    LETTER,
    MARK,
    OTHER,
    UNSPACED,
    Signs,
    character_classes,
    lower_case,
    telling_signs,
)
from data_pipeline.documents import blocks, buffers

EMPTY = np.uint16(0xFFFF)
"""Every entry of a text without words. (An entry that would have this value is one less.)"""
NOTHING, NEVER = np.uint32(0xFFFFFFFF), 1 << 62
"""No value, no turn."""
SEVEN_BITS, EIGHTH_BIT = np.uint64(0x7F7F7F7F7F7F7F7F), np.uint64(0x8080808080808080)
CASE = np.uint64(0x2020202020202020)
"""The bit in which ASCII's upper and lower case differ, in each of eight bytes."""
UNDERSCORES = np.uint64(0x5F5F5F5F5F5F5F5F)
FROM_0, PAST_9, FROM_A, PAST_Z = (
    np.uint64((0x80 - code) * 0x0101010101010101) for code in (0x30, 0x3A, 0x61, 0x7B)
)
"""Addends that lift a byte's seven bits to 128 or more from these characters on."""
GATHER = np.uint64(0x0102040810204080)
"""Multiplying eight bytes of 0 or 1 by it puts them side by side into the highest byte."""


def word_tables(signs: Signs) -> tuple[NDArray[np.uint8], NDArray[np.uint32], NDArray[np.bool_]]:
    """Class and lower case of each code point, and which signs distinguish words.

    The underscore is a letter, as it is in the names of source code.
    """
    return character_classes("_"), lower_case(), telling_signs(signs)


@intrinsic
def trailing_zeros(typing: Any, value: Any) -> Any:
    """Count how many bits of a number other than 0 are zero below its lowest one: one instruction."""

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return numba.uint64(numba.uint64), generate


@kernel(inline="always")
def run_bits(block: np.uint64) -> np.uint64:
    """Find which of 8 bytes, the first lowest, belong to a run: an ASCII letter, digit or underscore, or beyond ASCII.

    All eight are compared at once, each within its own seven bits, so no carry reaches a neighbour: adding 128 - x
    sets the eighth bit of what is at least x.
    """
    low = block & SEVEN_BITS
    folded = low | CASE
    digit = (low + FROM_0) & ~(low + PAST_9)
    letter = (folded + FROM_A) & ~(folded + PAST_Z)
    underscore = ~((low ^ UNDERSCORES) + SEVEN_BITS)
    flags = (digit | letter | underscore | block) & EIGHTH_BIT
    return ((flags >> np.uint64(7)) * GATHER) >> np.uint64(56)


@kernel(inline="always")
def block_at(blocks: NDArray[np.uint64], at: int) -> np.uint64:
    """Return the eight bytes from ``at`` on, with zeros for those behind the last of the buffer."""
    last = len(blocks) - 1
    if at <= last:
        return blocks[at]
    return blocks[last] >> np.uint64(8 * (at - last))


@kernel(inline="always")
def fold(hashed: np.uint64, block: np.uint64) -> np.uint64:
    """Return the hash of a word to which another eight bytes (or the last few) are added."""
    hashed = (hashed ^ block) * MULTIPLIER
    return hashed ^ (hashed >> np.uint64(32))


@kernel(inline="always")
def add_sign(code: int, words: NDArray[np.uint64], count: int) -> int:
    """Add a sign to the hash of the last of ``count`` words; if there is none, it is the first. Returns the count."""
    count = max(count, 1)
    words[count - 1] = fold(words[count - 1], np.uint64(code))
    return count


@kernel
def add_signs(
    data: NDArray[np.uint8],
    start: int,
    end: int,
    signs: NDArray[np.bool_],
    words: NDArray[np.uint64],
    count: int,
) -> int:
    """Add the signs between two runs, all of them ASCII, to the word before; returns the count of words."""
    for at in range(start, end):
        if signs[data[at]]:
            count = add_sign(int(data[at]), words, count)
    return count


@kernel
def mixed_run(
    data: NDArray[np.uint8],
    start: int,
    end: int,
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint32],
    signs: NDArray[np.bool_],
    words: NDArray[np.uint64],
    count: int,
) -> int:
    """Hash the words of a run that holds characters beyond ASCII, from ``words[count]`` on; the new count.

    A hash is that of the word's lower-cased UTF-8, eight bytes at a time, as in `run_hash`.
    """
    hashed = packed = filled = np.uint64(0)
    word = OTHER  # class of the word that is open
    at = start
    while at < end:
        code, length = code_point(data, at)
        at += length
        kind = int(classes[code]) if code < len(classes) else OTHER
        if kind == IGNORED or (kind == MARK and word == OTHER):
            continue
        if word != OTHER and kind != MARK and not (word == LETTER and kind == LETTER):
            words[count] = mix(fold(hashed, packed) if filled else hashed)
            count += 1
            hashed = packed = filled = np.uint64(0)
            word = OTHER
        if kind in (LETTER, UNSPACED):
            word = kind
        elif kind != MARK:
            if kind == OTHER and code < len(signs) and signs[code]:
                count = add_sign(code, words, count)
            continue
        encoded, size = utf8(int(lower[code]))
        packed |= encoded << (np.uint64(8) * filled)
        filled += size
        if filled >= np.uint64(8):
            hashed = fold(hashed, packed)
            filled -= np.uint64(8)
            packed = encoded >> (np.uint64(8) * (size - filled)) if filled else np.uint64(0)
    if word != OTHER:
        words[count] = mix(fold(hashed, packed) if filled else hashed)
        count += 1
    return count


@kernel(inline="always")
def utf8(code: int) -> tuple[np.uint64, np.uint64]:
    """UTF-8 of a lower-cased code point, the first byte lowest, as `run_hash` takes it; and its length."""
    if code < 0x80:
        return np.uint64(code | 0x20), np.uint64(1)
    last = np.uint64(code & 0x3F | 0x80)
    if code < 0x800:
        return np.uint64(code >> 6 | 0xC0) | last << np.uint64(8), np.uint64(2)
    third = np.uint64((code >> 6) & 0x3F | 0x80)
    if code < 0x10000:
        first = np.uint64(code >> 12 | 0xE0)
        return first | third << np.uint64(8) | last << np.uint64(16), np.uint64(3)
    first, second = np.uint64(code >> 18 | 0xF0), np.uint64((code >> 12) & 0x3F | 0x80)
    return first | second << np.uint64(8) | third << np.uint64(16) | last << np.uint64(24), np.uint64(4)


@kernel(inline="always")
def run_hash(blocks: NDArray[np.uint64], start: int, end: int) -> tuple[np.uint64, np.uint64]:
    """Hash of a run as one lower-cased word; and bits that are 0 if all of it is ASCII, so that it is one.

    In a word of ASCII the bit of `CASE` is set in all but upper-case letters, where it makes them lower, and the
    underscore, which becomes a character that no word holds.
    """
    hashed = seen = np.uint64(0)
    at = start
    while end - at > 8:
        block = blocks[at] | CASE
        seen |= block
        hashed = fold(hashed, block)
        at += 8
    spare = np.uint64(8 * (8 - (end - at)))
    block = ((block_at(blocks, at) | CASE) << spare) >> spare
    return mix(fold(hashed, block)), (seen | block) & EIGHTH_BIT


@kernel
def word_hashes(
    data: NDArray[np.uint8],
    blocks: NDArray[np.uint64],
    start: int,
    end: int,
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint32],
    signs: NDArray[np.bool_],
    words: NDArray[np.uint64],
) -> int:
    """Hash the lower-cased words of one text into ``words``; returns how many there are.

    64 bytes at a time become bits that show where runs begin and end: jumping from edge to edge spares the branch a
    byte that a processor mispredicts at the end of each word, which cost more than all the rest.
    """
    count = 0
    words[0] = np.uint64(0)  # what signs at the beginning are added to
    begin, done = -1, start  # of the run that is open, and where the last one ended
    before = np.uint64(0)  # the bit of the byte before
    for base in range(start, end, 64):
        bits = np.uint64(0)
        if base + 64 <= end:
            for part in range(8):
                bits |= run_bits(blocks[base + 8 * part]) << np.uint64(8 * part)
        else:
            for part in range((end - base + 7) // 8):
                bits |= run_bits(block_at(blocks, base + 8 * part)) << np.uint64(8 * part)
            bits &= (np.uint64(1) << np.uint64(end - base)) - np.uint64(1)
        edges = bits ^ ((bits << np.uint64(1)) | before)
        before = bits >> np.uint64(63)
        while edges:
            at = base + int(trailing_zeros(edges))
            edges &= edges - np.uint64(1)
            if begin < 0:
                count = add_signs(data, done, at, signs, words, count)
                begin = at
                continue
            hashed, beyond_ascii = run_hash(blocks, begin, at)
            if beyond_ascii:
                count = mixed_run(data, begin, at, classes, lower, signs, words, count)
            else:
                words[count] = hashed
                count += 1
            begin, done = -1, at
    if begin < 0:
        return add_signs(data, done, end, signs, words, count)
    hashed, beyond_ascii = run_hash(blocks, begin, end)
    if beyond_ascii:
        return mixed_run(data, begin, end, classes, lower, signs, words, count)
    words[count] = hashed
    return count + 1


@kernel
def shingle_hashes(words: NDArray[np.uint64], count: int, ngram: int, seed: np.uint64) -> int:
    """Replace the hashes of ``count`` words by those of their shingles, in place; returns how many there are.

    A text of fewer than ``ngram`` words has one shingle, of all its words; one without words has none. The hash
    of a shingle is a polynomial of its words' hashes modulo 2^64, rolled along and then mixed.
    """
    if count == 0:
        return 0
    width = min(ngram, count)
    leaving = np.uint64(1)  # MULTIPLIER ** (width - 1): the weight of the word that leaves
    for _ in range(width - 1):
        leaving *= MULTIPLIER
    rolling = np.uint64(0)
    for at in range(width - 1):
        rolling = rolling * MULTIPLIER + words[at]
    shingles = count - width + 1
    for at in range(shingles):
        rolling = rolling * MULTIPLIER + words[at + width - 1]
        first = words[at]
        words[at] = mix(rolling ^ seed)
        rolling -= first * leaving
    return shingles


@kernel
def fill_signature(
    shingles: NDArray[np.uint64],
    count: int,
    signature: NDArray[np.uint16],
    least: NDArray[np.uint32],
    closed: NDArray[np.int64],
) -> None:
    """Fast similarity sketch of ``count`` shingle hashes; ``least`` and ``closed`` are room for an entry each.

    The upper half of a hash is the bin, the lower half is the value. A bin takes the least value of the first turn
    in which anything is thrown at it; from turn ``len(signature)`` on all is thrown at one bin a turn, so all get
    filled.
    """
    bins = len(signature)
    signature[:] = EMPTY
    if count == 0:
        return
    least[:] = NOTHING
    for at in range(count):
        into = ((shingles[at] >> np.uint64(32)) * np.uint64(bins)) >> np.uint64(32)
        least[into] = min(least[into], np.uint32(shingles[at] & np.uint64(0xFFFFFFFF)))
    left = 0
    for into in range(bins):
        closed[into] = 0 if least[into] != NOTHING else NEVER
        left += least[into] == NOTHING
    turn = 1
    while left:
        if turn == 8:  # so that a text that repeats a few shingles without end costs no more than they do
            distinct = np.unique(shingles[:count])
            count = len(distinct)
            shingles[:count] = distinct
        for at in range(count):
            hashed = mix(shingles[at] + np.uint64(turn) * MULTIPLIER)
            into = ((hashed >> np.uint64(32)) * np.uint64(bins)) >> np.uint64(32)
            if turn >= bins:
                into = np.uint64(turn % bins)
            if closed[into] >= turn:
                left -= closed[into] == NEVER
                closed[into] = turn
                least[into] = min(least[into], np.uint32(hashed & np.uint64(0xFFFFFFFF)))
        turn += 1
    for into in range(bins):
        signature[into] = min(np.uint16(least[into] & np.uint32(0xFFFF)), np.uint16(EMPTY - 1))


@kernel
def sign_all(
    data: NDArray[np.uint8],
    blocks: NDArray[np.uint64],
    offsets: NDArray[np.int32],
    ngram: int,
    seed: np.uint64,
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint32],
    signs: NDArray[np.bool_],
    signatures: NDArray[np.uint16],
) -> None:
    """Signature of every text; see `signatures`."""
    longest = 0
    for row in range(len(offsets) - 1):
        longest = max(longest, offsets[row + 1] - offsets[row])
    words = np.empty(longest + 1, np.uint64)
    least = np.empty(signatures.shape[1], np.uint32)
    closed = np.empty(signatures.shape[1], np.int64)
    for row in range(len(offsets) - 1):
        count = word_hashes(data, blocks, offsets[row], offsets[row + 1], classes, lower, signs, words)
        count = shingle_hashes(words, count, ngram, seed)
        fill_signature(words, count, signatures[row], least, closed)


def signatures(
    texts: pa.Array, *, permutations: int, ngram: int, seed: int, signs: Signs
) -> NDArray[np.uint16]:
    """MinHash signatures of a column of texts, shape (documents, permutations).

    A text without a word has `EMPTY` throughout.
    """
    data, offsets = buffers(texts)
    result = np.empty((len(texts), permutations), np.uint16)
    sign_all(data, blocks(data), offsets, ngram, np.uint64(seed), *word_tables(signs), result)
    return result


def has_words(signatures: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Find which texts have a word at all, by their signatures: those that don't are never near-duplicates."""
    return signatures[:, 0] != EMPTY


@kernel(inline="always")
def band_hash(signature: NDArray[np.uint16], band: int, rows: int) -> np.uint64:
    """Hash of one band of a signature; the band's number is part of what is hashed."""
    folded = np.uint64(band + 1) * MULTIPLIER
    for entry in range(band * rows, band * rows + rows):
        folded = mix(folded ^ np.uint64(signature[entry])) + np.uint64(1)
    return folded


@kernel
def fold_bands(signatures: NDArray[np.uint16], rows: int, result: NDArray[np.uint64]) -> None:
    for document in range(result.shape[0]):
        for band in range(result.shape[1]):
            result[document, band] = band_hash(signatures[document], band, rows)


def band_hashes(signatures: NDArray[np.uint16], bands: int, rows: int) -> NDArray[np.uint64]:
    """Hash of each band of each signature, shape (documents, bands)."""
    result = np.empty((len(signatures), bands), np.uint64)
    fold_bands(signatures, rows, result)
    return result


@kernel
def sets_all(
    data: NDArray[np.uint8],
    blocks: NDArray[np.uint64],
    offsets: NDArray[np.int32],
    ngram: int,
    seed: np.uint64,
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint32],
    signs: NDArray[np.bool_],
    shingles: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """Fill ``shingles`` with the hashes of all texts, one after another; returns where each begins (texts + 1)."""
    starts = np.zeros(len(offsets), np.int64)
    for row in range(len(offsets) - 1):
        into = shingles[starts[row] :]
        count = word_hashes(data, blocks, offsets[row], offsets[row + 1], classes, lower, signs, into)
        starts[row + 1] = starts[row] + shingle_hashes(into, count, ngram, seed)
    return starts


def shingle_sets(texts: pa.Array, *, ngram: int, seed: int, signs: Signs) -> list[NDArray[np.uint64]]:
    """Return the sorted distinct shingle hashes of every text of a column."""
    data, offsets = buffers(texts)
    if not len(texts):
        return []
    shingles = np.empty(int(offsets[-1]) - int(offsets[0]) + 1, np.uint64)  # room: a word has at least a byte
    starts = sets_all(data, blocks(data), offsets, ngram, np.uint64(seed), *word_tables(signs), shingles)
    return [np.unique(shingles[start:end]) for start, end in pairwise(starts.tolist())]
