"""How much of a text is n-grams of words that occur more than once, by a numba kernel over the words' hashes.

An n-gram can only repeat where the (n-1)-grams that it begins and ends with repeat. So each n looks at what n-1 left
over, which in prose is little from n = 3 on, and an n-gram's key is the exact pair of the number of its first
n-1 words and that of its last: no two different ones are ever taken for the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.clean.text_stats import word_keys
from data_pipeline.core.kernels import MULTIPLIER, kernel

Counts = NDArray[np.int64]


def ngram_characters(
    texts: pa.Array, words: Counts, top: Sequence[int], duplicate: Sequence[int]
) -> tuple[Counts, Counts]:
    """Return characters of the words that stand in repeated n-grams; a word counts once, in however many it stands.

    Args:
        words: how many words each text has (see `text_stats.measure`).
        top: the n for which the most frequent n-gram's occurrences are counted; of several, those of the one that
            covers most; none where no n-gram occurs twice.
        duplicate: the n for which all n-grams that occur more than once are counted, at each occurrence.

    Returns:
        Counts of shape (len(top), texts) and (len(duplicate), texts).
    """
    begins, keys, sizes = word_keys(texts, words)
    widest = max([*top, *duplicate, 0])
    of_top = np.zeros((widest + 1, len(texts)), np.int64)
    of_duplicates = np.zeros((widest + 1, len(texts)), np.int64)
    wanted = np.zeros(widest + 1, np.bool_)
    wanted[list(top)] = True
    count_ngrams(begins, keys, sizes, wanted, of_top, of_duplicates)
    return of_top[list(top)], of_duplicates[list(duplicate)]


@kernel
def number(
    keys: NDArray[np.uint64],
    count: int,
    held: NDArray[np.int32],
    numbers: NDArray[np.int32],
    times: NDArray[np.int32],
) -> None:
    """Number the first ``count`` keys by the position of the first one that equals them; count each number's ``times``.

    ``held`` is room for an open-addressing hash table of four times as many slots.
    """
    slots = 4
    while slots < 2 * count:
        slots *= 2
    mask = np.uint64(slots - 1)
    held[:slots] = -1
    for at in range(count):
        mixed = keys[at] * MULTIPLIER
        slot = (mixed ^ (mixed >> np.uint64(32))) & mask
        while held[slot] >= 0 and keys[held[slot]] != keys[at]:
            slot = (slot + np.uint64(1)) & mask
        if held[slot] < 0:
            held[slot] = at
            times[at] = 0
        numbers[at] = held[slot]
        times[held[slot]] += 1


@kernel
def covered(places: NDArray[np.int32], count: int, width: int, before: Counts) -> int:
    """Count the characters of the words in the windows of ``width`` words that begin at these positions (ascending)."""
    total, end = 0, np.int64(0)
    for at in range(count):
        place = np.int64(places[at])
        begin = place if place > end else end
        end = place + width
        total += int(before[end] - before[begin])
    return total


@kernel
def most_covered(
    places: NDArray[np.int32],
    numbers: NDArray[np.int32],
    count: int,
    times: NDArray[np.int32],
    width: int,
    before: Counts,
    ends: Counts,
    totals: Counts,
) -> int:
    """Count the characters of the words in the most frequent of the n-grams at these positions, each word counted
    once."""
    most = best = 0
    for at in range(count):
        most = max(most, times[numbers[at]])
        ends[numbers[at]] = totals[numbers[at]] = 0
    for at in range(count):
        gram = numbers[at]
        if times[gram] == most:
            place = np.int64(places[at])
            begin = place if place > ends[gram] else ends[gram]
            totals[gram] += before[place + width] - before[begin]
            ends[gram] = place + width
            best = max(best, totals[gram])
    return best


@kernel
def count_ngrams(
    begins: Counts,
    keys_of_words: NDArray[np.uint64],
    sizes: NDArray[np.int32],
    wanted: NDArray[np.bool_],
    of_top: Counts,
    of_duplicates: Counts,
) -> None:
    """Fill ``of_top`` (where ``wanted``) and ``of_duplicates``, shape (widest n + 1, texts) each."""
    most = 0
    for row in range(len(begins) - 1):
        most = max(most, begins[row + 1] - begins[row])
    keys, before = np.empty(most + 1, np.uint64), np.zeros(most + 1, np.int64)
    words, numbers = np.empty(most + 1, np.int32), np.empty(most + 1, np.int32)
    times, places = np.empty(most + 1, np.int32), np.empty(most + 1, np.int32)
    held = np.empty(4 * most + 4, np.int32)
    ends, totals = np.empty(most + 1, np.int64), np.empty(most + 1, np.int64)
    for row in range(len(begins) - 1):
        begin = begins[row]
        count = begins[row + 1] - begin
        for at in range(count):
            keys[at] = keys_of_words[begin + at]
            before[at + 1] = before[at] + sizes[begin + at]
        number(keys, count, held, words, times)
        for at in range(count):
            places[at] = at
        numbers[:count] = words[:count]
        for width in range(1, len(wanted)):
            if width > 1:  # extend by a word what repeats together with what follows
                longer = 0
                for at in range(count - 1):
                    place = places[at]
                    if places[at + 1] == place + 1:
                        last = words[place + width - 1]
                        keys[longer] = np.uint64(numbers[at]) << np.uint64(32) | np.uint64(last)
                        places[longer] = place
                        longer += 1
                count = longer
                number(keys, count, held, numbers, times)
            repeated = 0
            for at in range(count):
                if times[numbers[at]] > 1:
                    places[repeated], numbers[repeated] = places[at], numbers[at]
                    repeated += 1
            count = repeated
            if count == 0:
                break
            of_duplicates[width, row] = covered(places, count, width, before)
            if wanted[width]:
                of_top[width, row] = most_covered(places, numbers, count, times, width, before, ends, totals)
