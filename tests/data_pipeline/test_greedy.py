from __future__ import annotations

import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dedup.candidates import EDGE, NONE
from data_pipeline.dedup.greedy import decide

Pair = tuple[int, int]


def decided(edges: list[tuple[int, int, float]], documents: int, files: int, at_once: int) -> np.ndarray:
    """What `decide` writes for edges (loser, winner, similarity), shuffled into several files."""
    random.Random(1).shuffle(edges)
    with TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"{number}.edges" for number in range(files)]
        for number, path in enumerate(paths):
            rows = [(lost, won, won * 7919 % 101, s, False) for lost, won, s in edges[number::files]]
            np.array(rows, EDGE).tofile(path)
        decide(paths, documents, folder / "repeats.npy", at_once)
        return np.load(folder / "repeats.npy")


def greedy(edges: set[Pair], documents: int) -> set[int]:
    """What is kept, document after document, of documents in order of preference."""
    kept: set[int] = set()
    for document in range(documents):
        if not any((document, one) in edges for one in kept):
            kept.add(document)
    return kept


graphs = st.integers(1, 30).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.permutations(range(size)),
        st.dictionaries(
            st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)).filter(
                lambda pair: pair[0] > pair[1]
            ),
            st.sampled_from([0.8, 0.9, 1.0]),
        ),
    )
)


@given(graphs, st.integers(1, 3), st.sampled_from([1, 3, 1000]))
@settings(deadline=None, max_examples=150)
def test_what_is_kept_is_what_a_greedy_pass_in_order_of_preference_keeps(
    graph: tuple[int, list[int], dict[Pair, float]], files: int, at_once: int
) -> None:
    """Documents have ranks 0, 1, ... of preference and lie in rows of any order."""
    size, row, similar = graph
    rank = {row[one]: one for one in range(size)}
    repeats = decided([(row[lost], row[won], s) for (lost, won), s in similar.items()], size, files, at_once)
    kept = {rank[one] for one in np.flatnonzero(repeats["of"] == NONE).tolist()}
    assert kept == greedy(set(similar), size)
    for one in set(range(size)) - kept:
        found = repeats[row[one]]
        assert rank[found["of"]] in kept
        assert found["jaccard"] == similar[one, rank[found["of"]]]
        best = max(s for (lost, won), s in similar.items() if lost == one and won in kept)
        assert found["jaccard"] == best


def test_a_chain_of_thousands_is_decided_link_by_link() -> None:
    repeats = decided([(one + 1, one, 0.9) for one in range(5000)], 5001, 2, 1000)
    assert np.array_equal(repeats["of"] == NONE, np.arange(5001) % 2 == 0)


def test_a_chain_takes_no_longer_than_as_many_pairs() -> None:
    """Windows over one long text make such chains; passes over all edges for every link would take minutes."""
    links = 100_000
    started = time.perf_counter()
    repeats = decided([(one + 1, one, 0.9) for one in range(links)], links + 1, 1, links)
    assert time.perf_counter() - started < 60
    assert np.array_equal(repeats["of"] == NONE, np.arange(links + 1) % 2 == 0)


def test_without_documents_or_edges_nothing_is_removed() -> None:
    assert len(decided([], 0, 1, 10)) == 0
    assert (decided([], 3, 2, 10)["of"] == NONE).all()
