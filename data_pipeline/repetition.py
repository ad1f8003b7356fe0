"""How much of a text is repetition: lines, paragraphs and n-grams of words that occur more than once.

N-grams are counted by numba over the words' numbers, since there are as many of them as words, for each n.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numba
import numpy as np
from numpy.typing import NDArray

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


def repeats(blocks: Sequence[str]) -> tuple[int, int]:
    """How many of ``blocks`` equal an earlier one, and their characters."""
    if len(set(blocks)) == len(blocks):
        return 0, 0
    counts = Counter(blocks)
    return len(blocks) - len(counts), sum((count - 1) * len(block) for block, count in counts.items())


def number_words(words: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A number for each word, equal for equal words alone (by Python's 64-bit hash), and its characters."""
    ids = np.fromiter(map(hash, words), np.int64, len(words))
    return ids, np.fromiter(map(len, words), np.int64, len(words))


@numba.njit(nogil=True, cache=True)
def ngram_slots(ids: NDArray[np.int64], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count n-grams in a hash table with linear probing.

    Returns:
        The slot of each n-gram in order, shape (words - n + 1,), and the count of each slot. Grams are told apart
        by 64 bits: that two of a text's different ones share them is beyond practice.
    """
    grams = max(0, len(ids) - n + 1)
    size = 1
    while size < 2 * grams:
        size *= 2
    hashes = np.zeros(size, np.uint64)
    counts = np.zeros(size, np.int64)
    slots = np.empty(grams, np.int64)
    for at in range(grams):
        gram = np.uint64(0)
        for word in range(n):
            gram = (gram + np.uint64(ids[at + word])) * MULTIPLIER
            gram ^= gram >> np.uint64(32)
        slot = np.int64(gram & np.uint64(size - 1))
        while counts[slot] and hashes[slot] != gram:
            slot = (slot + 1) & (size - 1)
        hashes[slot] = gram
        counts[slot] += 1
        slots[at] = slot
    return slots, counts


@numba.njit(nogil=True, cache=True)
def top_ngram_characters(ids: NDArray[np.int64], lengths: NDArray[np.int64], n: int) -> int:
    """Characters that the most frequent n-gram covers, counted at each occurrence; 0 where none repeats.

    Of several that are the most frequent, the longest counts.
    """
    slots, counts = ngram_slots(ids, n)
    most = longest = 0
    for at in range(len(slots)):
        count = counts[slots[at]]
        if count >= max(2, most):
            characters = lengths[at : at + n].sum()
            longest = characters if count > most else max(longest, characters)
            most = count
    return most * longest


@numba.njit(nogil=True, cache=True)
def duplicate_ngram_characters(ids: NDArray[np.int64], lengths: NDArray[np.int64], n: int) -> int:
    """Characters of the words that stand in an n-gram which occurs more than once; each word counts once."""
    slots, counts = ngram_slots(ids, n)
    covered = end = 0
    for at in range(len(slots)):
        if counts[slots[at]] > 1:
            covered += lengths[max(at, end) : at + n].sum()
            end = at + n
    return covered
