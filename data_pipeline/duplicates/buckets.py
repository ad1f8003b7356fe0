"""The kernel that compares the documents of a bucket: each with those preferred to it, by their signatures.

Work and edges are bounded for each document, so that a bucket of a million costs a million times a constant. What the
bounds leave out is marked.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_pipeline.kernels import kernel

UNLIKELY = 8
"""Edges below the threshold by their estimate for each above it, at most. They take none of its places: documents that
share much but aren't duplicates must not hide those that are."""


@kernel
def agreement(one: NDArray[np.uint16], other: NDArray[np.uint16]) -> int:
    """In how many entries two signatures agree."""
    agreed = 0
    for entry in range(len(one)):
        agreed += one[entry] == other[entry]
    return agreed


@kernel
def meeting_band(one: NDArray[np.uint64], other: NDArray[np.uint64], crowded: NDArray[np.bool_]) -> int:
    """The band whose bucket gives the edge of a pair: the first that they share, if possible no crowd."""
    first = -1
    for band in range(len(one)):
        if one[band] == other[band]:
            if not crowded[band]:
                return band
            if first < 0:
                first = band
    return first


@kernel
def compare_buckets(
    keys: NDArray[np.uint64],
    starts: NDArray[np.int64],
    member: NDArray[np.int64],
    signatures: NDArray[np.uint16],
    hashes: NDArray[np.uint64],
    crowded: NDArray[np.bool_],
    least: int,
    likely: int,
    most: int,
    skip: int,
    place: NDArray[np.int64],
    leader: NDArray[np.int64],
    cut: NDArray[np.bool_],
    found: NDArray[np.int64],
) -> int:
    """Compare each document of each bucket with those of its leaders that precede it; see `Search`.

    All are leaders but those with ``most`` likely matches, which say no more, and those that come when ``leader`` is
    full.

    Args:
        starts: where each bucket begins in ``member``, and the end of the last.
        member: documents (rows of ``signatures``, of ``hashes``: the keys of their bands, and of ``crowded``: which of
            these are crowds'), those of a bucket in order of preference.
        skip: of the first documents of a bucket, how many are leaders that have been compared.
        place: how far this is, to go on when ``found`` is full: bucket (all of them at the end), member, leaders.
        leader: the leaders of the bucket.
        cut: set for each document whose search ended early, or that is no leader though it may be kept.
        found: filled with rows of (document, preferred document, entries in which they agree).

    Returns:
        How many were found.
    """
    used = 0
    bucket, at, led = place
    while bucket < len(starts) - 1:
        if at == starts[bucket]:
            leader[:skip] = member[at : at + skip]
            at, led = at + skip, skip
        while at < starts[bucket + 1] and used + (1 + UNLIKELY) * most <= len(found):
            mine = signatures[member[at]]
            matches = doubtful = 0
            other = 0
            while other < led and matches < most:
                agreed = agreement(mine, signatures[leader[other]])
                other += 1
                if agreed < least:
                    continue
                if agreed >= likely:
                    matches += 1
                elif doubtful < UNLIKELY * most:
                    doubtful += 1
                else:
                    cut[member[at]] = True
                    continue
                # Only one bucket that a pair shares gives its edge.
                one, two = member[at], leader[other - 1]
                if hashes[one, meeting_band(hashes[one], hashes[two], crowded[one])] != keys[starts[bucket]]:
                    continue
                found[used, 0], found[used, 1], found[used, 2] = member[at], leader[other - 1], agreed
                used += 1
            if matches >= most or led == len(leader):
                cut[member[at]] = True
            else:
                leader[led] = member[at]
                led += 1
            at += 1
        if at < starts[bucket + 1]:
            break
        bucket += 1
    place[0], place[1], place[2] = bucket, at, led
    return used
