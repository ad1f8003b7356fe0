"""MinHash signatures of word shingles, computed by numba over Arrow's text buffers in place.

A document is its set of shingles: hashes of n consecutive lower-cased words. They are thrown into bins, and each bin
keeps its smallest hash (Li, Owen, Zhang 2012, "One Permutation Hashing"). While bins are empty, as with short
documents, all shingles are thrown again with new hashes, into empty bins only (Dahlgaard, Knudsen, Thorup 2017, "Fast
Similarity Sketching"). So two signatures agree in an entry with probability equal to the Jaccard similarity, and the
share of entries in which they agree varies no more than with independent permutations, however short the documents.
Of each entry 16 bits are kept (Li, Koenig 2010, "b-Bit Minwise Hashing").
"""

from __future__ import annotations

import unicodedata
from functools import cache
from itertools import pairwise

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.documents import buffers

# A kernel calls kernels of its own module only: numba's cache on disk doesn't notice a change elsewhere.

EMPTY = np.uint16(0xFFFF)
"""Every entry of a text without words. (An entry that would have this value is one less.)"""
NOTHING, NEVER = np.uint32(0xFFFFFFFF), 1 << 62
"""No value, no turn."""
SEPARATOR, LETTER, IDEOGRAPH = 0, 1, 2
IDEOGRAPHS = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF))
"""Scripts written without spaces between words: each character counts as a word."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""2^64 / golden ratio, odd: multiplying by it is a bijection that spreads low bits upward."""


@cache
def character_tables() -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Class and lower case of each code point below 2^16. Beyond, all count as letters without case."""
    classes = np.zeros(1 << 16, np.uint8)
    lower = np.arange(1 << 16, dtype=np.uint16)
    for code in range(1 << 16):
        character = chr(code)
        if unicodedata.category(character)[0] in "LMN" or character == "_":  # M: accents and vowel signs
            classes[code] = LETTER
            lowered = character.lower()
            if len(lowered) == 1 and ord(lowered) < 1 << 16:
                lower[code] = ord(lowered)
    for first, last in IDEOGRAPHS:
        classes[first : last + 1] = IDEOGRAPH
    return classes, lower


@numba.njit(nogil=True, cache=True, inline="always")
def mix(value: np.uint64) -> np.uint64:
    """A bijection of 64 bits in which every input bit reaches every output bit (splitmix64's finaliser)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@numba.njit(nogil=True, cache=True, inline="always")
def code_point(data: NDArray[np.uint8], at: int) -> tuple[int, int]:
    """The code point of valid UTF-8 at byte ``at``, and its length in bytes."""
    first = int(data[at])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return ((first & 0x1F) << 6) | (data[at + 1] & 0x3F), 2
    if first < 0xF0:
        return ((first & 0x0F) << 12) | ((data[at + 1] & 0x3F) << 6) | (data[at + 2] & 0x3F), 3
    return 0x10000, 4


@numba.njit(nogil=True, cache=True)
def word_hashes(
    data: NDArray[np.uint8],
    start: int,
    end: int,
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint16],
    words: NDArray[np.uint64],
) -> int:
    """Hash the lower-cased words of one text into ``words``; returns how many there are."""
    count = 0
    word = np.uint64(0)
    open_word = False
    at = start
    while at < end:
        code, length = code_point(data, at)
        kind = LETTER
        value = np.uint64(0)
        if code < 0x10000:
            kind = classes[code]
            value = np.uint64(lower[code])
        else:
            for byte in range(length):
                value = (value << np.uint64(8)) | np.uint64(data[at + byte])
        at += length
        if open_word and kind != LETTER:
            words[count] = mix(word)
            count += 1
            open_word = False
            word = np.uint64(0)
        if kind == LETTER:
            word = (word ^ (value + np.uint64(1))) * MULTIPLIER
            word ^= word >> np.uint64(32)
            open_word = True
        elif kind == IDEOGRAPH:
            words[count] = mix((value + np.uint64(1)) * MULTIPLIER)
            count += 1
    if open_word:
        words[count] = mix(word)
        count += 1
    return count


@numba.njit(nogil=True, cache=True)
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


@numba.njit(nogil=True, cache=True)
def fill_signature(
    shingles: NDArray[np.uint64],
    count: int,
    signature: NDArray[np.uint16],
    least: NDArray[np.uint32],
    closed: NDArray[np.int64],
) -> None:
    """Fast similarity sketch of ``count`` shingle hashes; ``least`` and ``closed`` are room for an entry each.

    The upper half of a hash says the bin, the lower half is the value. A bin takes the least value of the first turn
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


@numba.njit(nogil=True, cache=True)
def sign_all(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int32],
    ngram: int,
    seed: np.uint64,
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint16],
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
        count = word_hashes(data, offsets[row], offsets[row + 1], classes, lower, words)
        count = shingle_hashes(words, count, ngram, seed)
        fill_signature(words, count, signatures[row], least, closed)


def signatures(texts: pa.Array, *, permutations: int, ngram: int, seed: int) -> NDArray[np.uint16]:
    """MinHash signatures of a column of texts, shape (documents, permutations).

    A text without a word has `EMPTY` throughout.
    """
    data, offsets = buffers(texts)
    result = np.empty((len(texts), permutations), np.uint16)
    sign_all(data, offsets, ngram, np.uint64(seed), *character_tables(), result)
    return result


def has_words(signatures: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Which texts have a word at all, by their signatures: those that don't are never near-duplicates."""
    return signatures[:, 0] != EMPTY


@numba.njit(nogil=True, cache=True, inline="always")
def band_hash(signature: NDArray[np.uint16], band: int, rows: int) -> np.uint64:
    """Hash of one band of a signature; the band's number is part of what is hashed."""
    folded = np.uint64(band + 1) * MULTIPLIER
    for entry in range(band * rows, band * rows + rows):
        folded = mix(folded ^ np.uint64(signature[entry])) + np.uint64(1)
    return folded


@numba.njit(nogil=True, cache=True)
def fold_bands(signatures: NDArray[np.uint16], rows: int, result: NDArray[np.uint64]) -> None:
    for document in range(result.shape[0]):
        for band in range(result.shape[1]):
            result[document, band] = band_hash(signatures[document], band, rows)


def band_hashes(signatures: NDArray[np.uint16], bands: int, rows: int) -> NDArray[np.uint64]:
    """Hash of each band of each signature, shape (documents, bands)."""
    result = np.empty((len(signatures), bands), np.uint64)
    fold_bands(signatures, rows, result)
    return result


@numba.njit(nogil=True, cache=True)
def sets_all(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int32],
    ngram: int,
    seed: np.uint64,
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint16],
    shingles: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """Fill ``shingles`` with the hashes of all texts, one after another; returns where each begins (texts + 1)."""
    starts = np.zeros(len(offsets), np.int64)
    for row in range(len(offsets) - 1):
        into = shingles[starts[row] :]
        count = word_hashes(data, offsets[row], offsets[row + 1], classes, lower, into)
        starts[row + 1] = starts[row] + shingle_hashes(into, count, ngram, seed)
    return starts


def shingle_sets(texts: pa.Array, *, ngram: int, seed: int) -> list[NDArray[np.uint64]]:
    """The sorted distinct shingle hashes of every text of a column."""
    data, offsets = buffers(texts)
    if not len(texts):
        return []
    shingles = np.empty(int(offsets[-1]) - int(offsets[0]) + 1, np.uint64)  # room: a word has at least a byte
    starts = sets_all(data, offsets, ngram, np.uint64(seed), *character_tables(), shingles)
    return [np.unique(shingles[start:end]) for start, end in pairwise(starts.tolist())]
