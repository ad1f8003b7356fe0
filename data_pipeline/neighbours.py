"""Locality-sensitive hashing: which documents are near-duplicates, and which of them to keep.

Signatures are cut into bands; documents that agree in all rows of a band fall into one bucket of it, and are
candidates (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4). `choose` then goes through the
documents in order of preference and compares each with kept ones that share a bucket.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

NONE = -1


def buckets(hashes: NDArray[np.uint64], among: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number of the bucket of each document in each band, shape (documents, bands), in the memory of ``hashes``.

    `NONE` where it is alone, and in all bands of a document that ``among`` leaves out.
    """
    result = hashes.view(np.int64)
    result[~among] = NONE
    used = 0
    for band in range(hashes.shape[1]):
        _, bucket, sizes = np.unique(hashes[among, band], return_inverse=True, return_counts=True)
        shared = sizes > 1
        number = np.full(len(sizes), NONE, np.int64)
        number[shared] = used + np.arange(shared.sum())
        used += int(shared.sum())
        result[among, band] = number[bucket]
    return result


@numba.njit(nogil=True, cache=True)
def jaccard(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    """Size of the intersection over size of the union of two sorted sets; 0 where both are empty."""
    left = right = shared = 0
    while left < len(one) and right < len(other):
        if one[left] == other[right]:
            shared += 1
            left += 1
            right += 1
        elif one[left] < other[right]:
            left += 1
        else:
            right += 1
    union = len(one) + len(other) - shared
    return shared / union if union else 0.0


@numba.njit(nogil=True, cache=True)
def choose(
    buckets: NDArray[np.int64],
    shingles: NDArray[np.uint64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    threshold: float,
    max_comparisons: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64], int]:
    """Keep or remove documents, which stand in order of preference.

    A document is removed when a kept document in one of its buckets has at least ``threshold`` Jaccard similarity;
    those kept last are tried first. Documents of very different numbers of shingles need no comparison: the ratio
    of the numbers bounds the similarity.

    Args:
        buckets: shape (documents, bands), from `buckets`.
        shingles: sorted sets of all documents; that of document i is ``shingles[starts[i] : ends[i]]``.
        max_comparisons: kept documents of one bucket that a document is compared with, at most.

    Returns:
        The kept document that each one repeats (`NONE`: it is kept), their similarity, and how many times
        ``max_comparisons`` cut a search short.
    """
    documents, bands = buckets.shape
    duplicate_of = np.full(documents, NONE, np.int64)
    similarity = np.zeros(documents)
    # The kept documents of a bucket are a linked list of entries; entry = document * bands + band.
    last_entry = np.full(buckets.max() + 1 if buckets.size else 0, NONE, np.int64)
    entry_before = np.full(documents * bands, NONE, np.int64)
    compared_by = np.full(documents, NONE, np.int64)
    cut_short = 0
    for document in range(documents):
        mine = shingles[starts[document] : ends[document]]
        for band in range(bands):
            if buckets[document, band] == NONE or duplicate_of[document] != NONE:
                continue
            comparisons = 0
            entry = last_entry[buckets[document, band]]
            while entry != NONE:
                other = entry // bands
                entry = entry_before[entry]
                if compared_by[other] == document:
                    continue
                if comparisons == max_comparisons:
                    cut_short += 1
                    break
                comparisons += 1
                compared_by[other] = document
                theirs = shingles[starts[other] : ends[other]]
                if min(len(mine), len(theirs)) < threshold * max(len(mine), len(theirs)):
                    continue
                found = jaccard(mine, theirs)
                if found >= threshold:
                    duplicate_of[document] = other
                    similarity[document] = found
                    break
        if duplicate_of[document] == NONE:
            for band in range(bands):
                bucket = buckets[document, band]
                if bucket != NONE:
                    entry_before[document * bands + band] = last_entry[bucket]
                    last_entry[bucket] = document * bands + band
    return duplicate_of, similarity, cut_short
