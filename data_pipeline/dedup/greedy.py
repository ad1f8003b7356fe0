"""Decide which documents go: one is removed if a kept document, preferred to it, is its verified duplicate.

That is what a greedy pass in order of preference keeps: the lexicographically first maximal independent set of the
graph of duplicates. It is found without sorting documents, by passes over the edges from less to more preferred: a
loser of a kept winner goes, and one whose winners are all gone stays. Whatever order edges come in, the set is the
same, and on most graphs few passes suffice (Blelloch, Fineman, Shun 2012, "Greedy Sequential Maximal Independent Set
and Matching are Parallel on Average"). Edges stream from disk and drop out when decided; what is held for each document
lies in memory-mapped files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.core.files import atomic_path
from data_pipeline.core.kernels import kernel
from data_pipeline.dedup.candidates import EDGES_AT_ONCE, NONE, read_chunks

REPEATS = np.dtype([("of", "<i8"), ("jaccard", "<f8"), ("exact", "?")])
"""Row of the kept document that a document repeats (`NONE`: it is kept), and how much."""
STATE = np.dtype([("waiting", "<i8"), ("tie", "<u8"), ("decided", "u1")])
"""For each document: winners that may still be kept, tie of the best one, and what is decided."""
UNDECIDED, KEPT, REMOVED = 0, 1, 2


def decide(edges: Sequence[Path], documents: int, path: Path, at_once: int = EDGES_AT_ONCE) -> None:
    """Write what each document repeats (`REPEATS`, ``.npy``): of its kept winners the most similar one.

    Args:
        edges: files of `EDGE`, each pair once, without cycles.
        at_once: edges to hold in memory.
    """
    if path.exists():
        return
    with atomic_path(path) as temporary:
        repeats = np.lib.format.open_memmap(temporary, "w+", REPEATS, (documents,))
        state = np.memmap(path.with_suffix(".state"), STATE, "w+", shape=(max(documents, 1),))
        for start in range(0, documents, at_once):
            repeats["of"][start : start + at_once] = NONE
        settle(edges, state, path.parent, at_once)
        for chunk in read_chunks(edges, at_once):
            take_best(
                chunk["loser"],
                chunk["winner"],
                chunk["similarity"],
                chunk["exact"],
                chunk["tie"],
                state["decided"],
                state["tie"],
                repeats["of"],
                repeats["jaccard"],
                repeats["exact"],
            )
        repeats.flush()


def settle(edges: Sequence[Path], state: NDArray[np.void], folder: Path, at_once: int) -> None:
    """Decide every document in ``state``; undecided edges wait in two files of ``folder``, in turn."""
    for chunk in read_chunks(edges, at_once):
        count_winners(chunk["loser"], state["waiting"])
    for start in range(0, len(state), at_once):
        block = state[start : start + at_once]
        block["decided"][block["waiting"] == 0] = KEPT
    sources, turn = list(edges), 0
    while sources:
        left = folder / f"undecided-{turn % 2}.edges"
        with open(left, "wb") as file:
            for chunk in read_chunks(sources, at_once):
                chunk = chunk[np.argsort(chunk["winner"])]
                chunk = chunk[undecided(chunk["loser"], chunk["winner"], state["decided"], state["waiting"])]
                chunk.tofile(file)
        sources, turn = [left] if left.stat().st_size else [], turn + 1


@kernel
def count_winners(loser: NDArray[np.int64], waiting: NDArray[np.int64]) -> None:
    for edge in range(len(loser)):
        waiting[loser[edge]] += 1


@kernel
def undecided(
    loser: NDArray[np.int64],
    winner: NDArray[np.int64],
    decided: NDArray[np.uint8],
    waiting: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Decide all that some edges, by ascending winner, allow to decide; returns which of them are still needed.

    What is decided is spread from winners to losers at once, so that a chain takes no longer than as many pairs.
    """
    count = len(loser)
    spread = np.empty(count, np.int64)  # the first edge of each winner whose decision must be handed on
    last = 0
    for edge in range(count):
        if decided[winner[edge]] != UNDECIDED and (edge == 0 or winner[edge] != winner[edge - 1]):
            spread[last] = edge
            last += 1
    while last:
        last -= 1
        edge = spread[last]
        won = winner[edge]
        while edge < count and winner[edge] == won:
            lost = loser[edge]
            edge += 1
            if decided[lost] == REMOVED:
                continue
            if decided[won] == KEPT:
                decided[lost] = REMOVED
            else:
                waiting[lost] -= 1
                if waiting[lost]:
                    continue
                decided[lost] = KEPT
            first = np.searchsorted(winner, lost)
            if first < count and winner[first] == lost:
                spread[last] = first
                last += 1
    needed = np.empty(count, np.bool_)
    for edge in range(count):
        needed[edge] = decided[winner[edge]] == UNDECIDED and decided[loser[edge]] == UNDECIDED
    return needed


@kernel
def take_best(
    loser: NDArray[np.int64],
    winner: NDArray[np.int64],
    similarity: NDArray[np.float64],
    exact: NDArray[np.bool_],
    tie: NDArray[np.uint64],
    decided: NDArray[np.uint8],
    best_tie: NDArray[np.uint64],
    best_of: NDArray[np.int64],
    best_jaccard: NDArray[np.float64],
    best_exact: NDArray[np.bool_],
) -> None:
    """Note for each removed loser its kept winner of highest similarity; of equals, the one of lower ``tie``."""
    for edge in range(len(loser)):
        lost = loser[edge]
        if decided[lost] != REMOVED or decided[winner[edge]] != KEPT:
            continue
        if (
            best_of[lost] == NONE
            or similarity[edge] > best_jaccard[lost]
            or (similarity[edge] == best_jaccard[lost] and tie[edge] < best_tie[lost])
        ):
            best_of[lost] = winner[edge]
            best_jaccard[lost] = similarity[edge]
            best_exact[lost] = exact[edge]
            best_tie[lost] = tie[edge]
