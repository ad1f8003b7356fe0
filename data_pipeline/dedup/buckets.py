"""The kernel that compares the documents of a bucket: each with those preferred to it, by their signatures.

Work and edges are bounded for each document, so that a bucket of a million costs a million times a constant. What the
bounds leave out is marked, and of that what is kept is searched for once more (see `candidates.Again`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_pipeline.core.kernels import kernel

UNLIKELY = 8
"""Edges below the threshold by their estimate for each above it, at most. They take none of its room: documents that
share much but aren't duplicates must not hide those that are."""


@kernel
def agreement(one: NDArray[np.uint16], other: NDArray[np.uint16]) -> int:
    """Count the entries in which two signatures agree."""
    agreed = 0
    for entry in range(len(one)):
        agreed += one[entry] == other[entry]
    return agreed


@kernel
def meeting_band(one: NDArray[np.uint64], other: NDArray[np.uint64], crowded: NDArray[np.bool_]) -> int:
    """Return the band whose bucket gives the edge of a pair: the first that they share, if possible no crowd."""
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
    seeks: NDArray[np.bool_],
    leads: NDArray[np.bool_],
    again: bool,
    whole: bool,
    least: int,
    likely: int,
    most: int,
    skip: int,
    passed: int,
    place: NDArray[np.int64],
    leader: NDArray[np.int64],
    cut: NDArray[np.bool_],
    found: NDArray[np.int64],
) -> int:
    """Compare each document of each bucket with those of its leaders that precede it; see `Search`.

    All are leaders, but for those that come when ``leader`` is full. A bucket with more documents than that is a crowd:
    there only those lead that differ. In a first search these are all but those with ``most`` likely matches; in a
    second one, which knows what the first left, those with ``leads``.

    Args:
        starts: where each bucket begins in ``member``, and the end of the last.
        member: documents (rows of ``signatures``, of ``hashes``: the keys of their bands, and of ``crowded``: which of
            these are crowds'), those of a bucket in order of preference.
        seeks: the documents that are compared with their leaders.
        again: whether this is a second search.
        whole: whether every bucket is here with all its documents; else it is a chunk of one crowd.
        skip: of the first documents of a bucket, how many are leaders that have been compared.
        passed: of a crowd in chunks, how many documents the chunks before had, leaders or not.
        place: how far this is, to continue when ``found`` is full: bucket (all of them at the end), member, leaders.
        leader: the leaders of the bucket.
        cut: set for each document that was not compared with all that differ among those preferred to it, or of which
            not every match was written.
        found: filled with rows of (document, preferred document, entries in which they agree).

    Returns:
        How many were found.
    """
    used = 0
    room = min((1 + UNLIKELY) * most, len(leader))
    bucket, at, led = place
    while bucket < len(starts) - 1:
        if at == starts[bucket]:
            leader[:skip] = member[at : at + skip]
            at, led = at + skip, skip
        crowd = not whole or starts[bucket + 1] - starts[bucket] > len(leader)
        while at < starts[bucket + 1] and used + room <= len(found):
            document = member[at]
            matches = doubtful = other = 0
            stop = led if seeks[document] else 0
            while other < stop and matches < most:
                agreed = agreement(signatures[document], signatures[leader[other]])
                other += 1
                if agreed < least:
                    continue
                if agreed >= likely:
                    matches += 1
                elif doubtful < UNLIKELY * most:
                    doubtful += 1
                else:
                    cut[document] = True
                    continue
                # Only one bucket that a pair shares gives its edge.
                two = leader[other - 1]
                if (
                    hashes[document, meeting_band(hashes[document], hashes[two], crowded[document])]
                    != keys[starts[bucket]]
                ):
                    continue
                found[used, 0], found[used, 1], found[used, 2] = document, two, agreed
                used += 1
            preferred = passed + at - starts[bucket] - skip
            left_out = led == len(leader) or (not again and led < preferred)
            cut[document] |= seeks[document] and (other < stop or left_out)
            differs = leads[document] if again else matches < most
            if led < len(leader) and (differs or not crowd):
                leader[led] = document
                led += 1
            at += 1
        if at < starts[bucket + 1]:
            break
        bucket += 1
    place[0], place[1], place[2] = bucket, at, led
    return used
