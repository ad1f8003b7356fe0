from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.minhash import EMPTY, band_hashes, shingle_sets, signatures
from data_pipeline.neighbours import buckets, jaccard


def sets_of(*texts: str, ngram: int = 5) -> list[set[int]]:
    """Shingle hashes as Python sets."""
    return [set(one.tolist()) for one in shingle_sets(pa.array(texts, pa.string()), ngram=ngram, seed=0)]


@given(st.lists(st.sampled_from(["a", "b", "cc", "dd", "É", "straße"]), max_size=30))
@settings(deadline=None)
def test_a_text_has_as_many_shingles_as_distinct_runs_of_five_words(words: list[str]) -> None:
    (found,) = sets_of(" ".join(words))
    runs = {tuple(words[at : at + 5]) for at in range(max(1, len(words) - 4))} if words else set()
    assert len(found) == len(runs)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The Quick brown FOX jumps", "the quick brown fox jumps"),
        ("ÉCOLE ДОМ ΣΟΦΙΑ", "école дом σοφια"),
        ("one, two — “three” (four)\n\nfive!", "one two three four five"),
        ("東京 大阪", "東京大阪"),
    ],
)
def test_case_punctuation_and_spacing_do_not_change_the_words(one: str, other: str) -> None:
    first, second = sets_of(one, other, ngram=2)
    assert first == second
    assert first


@pytest.mark.parametrize(
    ("one", "other"), [("東京", "京東"), ("a b c", "a c b"), ("😀 x", "😁 x"), ("ab", "a b")]
)
def test_different_words_give_different_shingles(one: str, other: str) -> None:
    first, second = sets_of(one, other)
    assert first
    assert not first & second


def test_slices_of_a_column_and_empty_columns_are_read_in_place() -> None:
    texts = pa.array(["zero", "one two", "", "three"], pa.string())
    whole = signatures(texts, permutations=16, ngram=5, seed=1)
    assert np.array_equal(signatures(texts[1:3], permutations=16, ngram=5, seed=1), whole[1:3])
    assert signatures(texts[:0], permutations=16, ngram=5, seed=1).shape == (0, 16)
    assert (whole[2] == EMPTY).all()
    assert not (whole[[0, 1, 3]] == EMPTY).any()


@given(st.sets(st.integers(0, 2**64 - 1)), st.sets(st.integers(0, 2**64 - 1)))
@settings(deadline=None)
def test_jaccard_of_sorted_arrays_is_that_of_sets(one: set[int], other: set[int]) -> None:
    expected = len(one & other) / len(one | other) if one | other else 0
    arrays = [np.array(sorted(each), np.uint64) for each in (one, other)]
    assert jaccard(*arrays) == expected


def pair(similarity: float, size: int, seed: int) -> tuple[str, str, float]:
    """Two texts of words that occur once, and the exact Jaccard similarity of their 1-word shingles."""
    union = [f"w{number}" for number in random.Random(seed).sample(range(10**9), size)]
    shared = round(similarity * size)
    middle = shared + (size - shared) // 2
    return " ".join(union[:middle]), " ".join(union[:shared] + union[middle:]), shared / size


@pytest.mark.parametrize("size", [6, 40, 112, 2000])
@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8])
def test_the_share_of_equal_entries_estimates_jaccard_without_bias(similarity: float, size: int) -> None:
    """Also for sets far smaller than the signature, whose empty bins are filled from others.

    The mean over 400 pairs must lie within four standard errors; an entry of a pair is a draw of variance
    s (1 - s), and a signature holds at least min(size, 112) / 2 independent ones.
    """
    pairs = [pair(similarity, size, seed) for seed in range(400)]
    texts = pa.array([text for one, other, _ in pairs for text in (one, other)], pa.string())
    signed = signatures(texts, permutations=112, ngram=1, seed=3)
    estimates = (signed[0::2] == signed[1::2]).mean(axis=1)
    exact = pairs[0][2]
    error = np.sqrt(exact * (1 - exact) / (min(size, 112) / 2) / len(pairs))
    assert abs(estimates.mean() - exact) < 4 * error


def test_lsh_finds_pairs_as_often_as_its_formula_says() -> None:
    """Over 1500 pairs the frequency must lie within 0.05 of 1 - (1 - s^rows)^bands (a standard error is 0.013)."""
    for similarity in (0.5, 0.7, 0.8):
        pairs = [pair(similarity, 600, seed) for seed in range(1500)]
        texts = pa.array([text for one, other, _ in pairs for text in (one, other)], pa.string())
        signed = signatures(texts, permutations=112, ngram=1, seed=5)
        hashes = band_hashes(signed, 14, 8)
        found = (hashes[0::2] == hashes[1::2]).any(axis=1).mean()
        assert abs(found - (1 - (1 - pairs[0][2] ** 8) ** 14)) < 0.05


def test_buckets_number_the_hashes_that_several_documents_share() -> None:
    hashes = np.array([[1, 7], [1, 8], [2, 7], [3, 9], [1, 9]], np.uint64)
    among = np.array([True, True, True, True, False])
    assert buckets(hashes, among).tolist() == [[0, 1], [0, -1], [-1, 1], [-1, -1], [-1, -1]]
