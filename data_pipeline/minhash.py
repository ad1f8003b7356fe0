"""MinHash signatures of 5-word shingles, computed by numba over Arrow's text buffers in place.

A document is its set of shingles: hashes of n consecutive lower-cased words. Its signature comes from one
permutation instead of one per entry (Li, Owen, Zhang 2012, "One Permutation Hashing"): shingles fall into bins, each
bin keeps its smallest hash, and an empty bin borrows that of another drawn at random ("optimal" densification,
Shrivastava 2017), after which two signatures agree in a bin with probability equal to the Jaccard similarity.
"""

from __future__ import annotations

import unicodedata
from functools import cache

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

# A kernel calls kernels of its own module only: numba's cache on disk doesn't notice a change elsewhere.

EMPTY = np.uint32(0xFFFFFFFF)
"""A bin that no shingle fell into. (A hash of this value is taken as one less.)"""
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
def fill_signature(shingles: NDArray[np.uint64], count: int, signature: NDArray[np.uint32]) -> None:
    """One-permutation MinHash of ``count`` shingle hashes into ``signature``, densified.

    The upper half of a hash says the bin, the lower half is the value.
    """
    bins = np.uint64(len(signature))
    signature[:] = EMPTY
    for at in range(count):
        into = ((shingles[at] >> np.uint64(32)) * bins) >> np.uint64(32)
        value = min(np.uint32(shingles[at] & np.uint64(0xFFFFFFFF)), np.uint32(EMPTY - 1))
        if value < signature[into]:
            signature[into] = value
    if count == 0:
        return
    filled = signature.copy()
    for empty in range(len(signature)):
        attempt = np.uint64(1)
        while signature[empty] == EMPTY:
            draw = mix((np.uint64(empty) << np.uint64(32)) + attempt * MULTIPLIER)
            signature[empty] = filled[((draw >> np.uint64(32)) * bins) >> np.uint64(32)]
            attempt += np.uint64(1)


@numba.njit(nogil=True, cache=True)
def sign_all(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int32],
    ngram: int,
    seed: np.uint64,
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint16],
    signatures: NDArray[np.uint32],
) -> None:
    """Signature of every text; see `signatures`."""
    longest = 0
    for row in range(len(offsets) - 1):
        longest = max(longest, offsets[row + 1] - offsets[row])
    words = np.empty(longest + 1, np.uint64)
    for row in range(len(offsets) - 1):
        count = word_hashes(data, offsets[row], offsets[row + 1], classes, lower, words)
        count = shingle_hashes(words, count, ngram, seed)
        fill_signature(words, count, signatures[row])


def buffers(texts: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Bytes and offsets (documents + 1) of a column of strings without nulls, in place."""
    assert texts.type == pa.string(), f"expected string, found {texts.type}"
    assert texts.null_count == 0, "texts are never null"
    _, offsets, data = texts.buffers()
    if not len(texts):
        return np.zeros(0, np.uint8), np.zeros(1, np.int32)
    starts = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8), starts


def signatures(texts: pa.Array, *, permutations: int, ngram: int, seed: int) -> NDArray[np.uint32]:
    """MinHash signatures of a column of texts, shape (documents, permutations).

    A text without a word has `EMPTY` throughout.
    """
    data, offsets = buffers(texts)
    result = np.empty((len(texts), permutations), np.uint32)
    sign_all(data, offsets, ngram, np.uint64(seed), *character_tables(), result)
    return result


def has_words(signatures: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Which texts have a word at all, by their signatures: those that don't are never near-duplicates."""
    return signatures[:, 0] != EMPTY


def band_hashes(signatures: NDArray[np.uint32], bands: int, rows: int) -> NDArray[np.uint64]:
    """Hash of each band of each signature, shape (documents, bands)."""
    result = np.empty((len(signatures), bands), np.uint64)
    fold_bands(signatures, rows, result)
    return result


@numba.njit(nogil=True, cache=True)
def fold_bands(signatures: NDArray[np.uint32], rows: int, result: NDArray[np.uint64]) -> None:
    for document in range(result.shape[0]):
        for band in range(result.shape[1]):
            folded = np.uint64(band)
            for row in range(rows):
                folded = mix(folded ^ np.uint64(signatures[document, band * rows + row])) + np.uint64(1)
            result[document, band] = folded


@numba.njit(nogil=True, cache=True)
def sorted_shingles(
    data: NDArray[np.uint8],
    start: int,
    end: int,
    ngram: int,
    seed: np.uint64,
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint16],
) -> NDArray[np.uint64]:
    """The distinct shingle hashes of one text, sorted."""
    words = np.empty(end - start + 1, np.uint64)
    count = word_hashes(data, start, end, classes, lower, words)
    count = shingle_hashes(words, count, ngram, seed)
    return np.unique(words[:count])


def shingle_sets(texts: pa.Array, *, ngram: int, seed: int) -> list[NDArray[np.uint64]]:
    """The sorted distinct shingle hashes of every text of a column."""
    data, offsets = buffers(texts)
    tables = character_tables()
    return [
        sorted_shingles(data, offsets[row], offsets[row + 1], ngram, np.uint64(seed), *tables)
        for row in range(len(texts))
    ]
