from __future__ import annotations

import random
import string
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_words import plain_words

from data_pipeline.core.words import OTHER, TABLE_SIZE, Signs, character_classes, telling_signs
from data_pipeline.dedup import minhash
from data_pipeline.dedup.minhash import EMPTY, band_hashes
from data_pipeline.dedup.verify import jaccard

signatures = partial(minhash.signatures, signs="none")


def sets_of(*texts: str, ngram: int = 5, signs: Signs = "none") -> list[set[int]]:
    """Shingle hashes as Python sets."""
    column = pa.array(texts, pa.string())
    return [set(one.tolist()) for one in minhash.shingle_sets(column, ngram=ngram, seed=0, signs=signs)]


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


def words_of(text: str) -> list[str]:
    """The words of a text by the definition, a character at a time."""
    return [word for _, word in plain_words(text, letters="_")]


CHARACTERS = "aZ_ 09.`@[{/:^\x7f\n" + "éÉß“—ŞK" + "東ア" + "😀" + "ก\u0e34𐐀\u0301\u200d"
TEXTS = st.lists(
    st.one_of(st.text(CHARACTERS, max_size=12), st.text("abcXYZ_7", max_size=70), st.just(" ")), max_size=30
).map("".join)


@given(TEXTS, st.integers(0, 70), st.integers(0, 9))
@settings(deadline=None, max_examples=300)
def test_words_are_those_of_the_definition_wherever_a_text_lies(text: str, before: int, behind: int) -> None:
    """Words are read many bytes at a time: their hashes must not depend on where blocks begin and end."""
    words = words_of(text)
    vocabulary = sorted(set(words))
    hashes = [sets_of(word, ngram=1)[0].pop() for word in vocabulary]
    assert len(set(hashes)) == len(vocabulary)
    column = ["x" * before, text, "y" * behind]
    assert sets_of(*column, ngram=1)[1] == set(hashes)
    moved = pa.array([" " * before + text.upper().lower() + "." * behind, text], pa.string())
    if words_of(moved[0].as_py()) == words:
        one, other = signatures(moved, permutations=16, ngram=3, seed=0)
        assert np.array_equal(one, other)


@pytest.mark.parametrize(("one", "other"), [("東京", "京東"), ("a b c", "a c b"), ("ab", "a b")])
def test_different_words_give_different_shingles(one: str, other: str) -> None:
    first, second = sets_of(one, other)
    assert first
    assert not first & second


def signed_words(text: str, signs: Signs) -> list[str]:
    """The words of a text by the definition, each with the signs behind it that tell."""
    starts = [at for at, _ in plain_words(text, letters="_")]
    words = words_of(text)
    if starts[:1] != [0]:
        starts, words = [0, *starts], ["", *words]
    ends = [*starts[1:], len(text)]
    told = telling_signs(signs)
    behind = ["".join(one for one in text[a:b] if told[ord(one)]) for a, b in zip(starts, ends, strict=True)]
    return [word + sign for word, sign in zip(words, behind, strict=True) if word + sign]


SIGNED = st.lists(
    st.sampled_from([*"aB 1_<>+-=!?().,[]{}#\"'`ßé東กิ×≤“—👍€\u200b\n", "👍🏽", "->", "  "]), max_size=60
)


@given(SIGNED.map("".join), st.sampled_from(["none", "symbols", "all"]), st.integers(0, 70))
@settings(deadline=None, max_examples=300)
def test_signs_that_tell_belong_to_the_word_before_them(text: str, signs: Signs, before: int) -> None:
    words = signed_words(text, signs)
    alone = {word: sets_of(word, ngram=1, signs=signs)[0] for word in words}
    assert all(len(found) == 1 for found in alone.values())
    assert len(set.union(set(), *alone.values())) == len(alone)
    _, found = sets_of("x" * before, text, ngram=1, signs=signs)
    assert found == set.union(set(), *alone.values())


def test_every_character_is_part_of_a_word_or_a_sign_or_parts_words() -> None:
    none, symbols, every = (telling_signs(signs) for signs in ("none", "symbols", "all"))
    assert not none.any()
    assert (symbols <= every).all()
    assert (character_classes("_")[every] == OTHER).all()
    assert {one for one in map(chr, range(128)) if every[ord(one)]} == set(string.punctuation) - {"_"}
    assert {one for one in "+-<>=×÷≤€$👍→∑" if symbols[ord(one)]} == set("+-<>=×÷≤€$👍→∑")
    assert not {one for one in ".,:;()[]{}#\"'`“”—。、" if symbols[ord(one)]}
    assert len(every) == TABLE_SIZE


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


@pytest.mark.parametrize("size", [6, 40, 112, 300, 2000])
@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8])
def test_the_share_of_equal_entries_estimates_jaccard_without_bias(similarity: float, size: int) -> None:
    """Also for sets far smaller than the signature, with a variance of at most that of independent permutations.

    The mean over 1000 pairs must lie within four standard errors, the variance below s (1 - s) / entries but for
    what a sample of 1000 may exceed it (4 standard errors of a variance: a factor of 1 + 4 sqrt(2 / 1000)).
    """
    entries = 112
    pairs = [pair(similarity, size, seed) for seed in range(1000)]
    texts = pa.array([text for one, other, _ in pairs for text in (one, other)], pa.string())
    signed = signatures(texts, permutations=entries, ngram=1, seed=3)
    estimates = (signed[0::2] == signed[1::2]).mean(axis=1)
    exact = pairs[0][2]
    variance = exact * (1 - exact) / entries
    assert abs(estimates.mean() - exact) < 4 * np.sqrt(variance / len(pairs))
    assert estimates.var() < variance * (1 + 4 * np.sqrt(2 / len(pairs)))


def test_a_text_that_repeats_one_shingle_without_end_is_signed_like_that_shingle() -> None:
    texts = pa.array(["a " * 200_000, "a a a a a"], pa.string())
    long, short = signatures(texts, permutations=126, ngram=5, seed=0)
    assert np.array_equal(long, short)


@pytest.mark.parametrize("size", [10, 60, 600])
def test_lsh_finds_pairs_as_often_as_its_formula_says_however_short_they_are(size: int) -> None:
    """Over 1500 pairs the frequency must lie within 0.05 of 1 - (1 - s^rows)^bands (a standard error is 0.013)."""
    for similarity in (0.5, 0.7, 0.8):
        pairs = [pair(similarity, size, seed) for seed in range(1500)]
        texts = pa.array([text for one, other, _ in pairs for text in (one, other)], pa.string())
        signed = signatures(texts, permutations=112, ngram=1, seed=5)
        hashes = band_hashes(signed, 14, 8)
        found = (hashes[0::2] == hashes[1::2]).any(axis=1).mean()
        assert abs(found - (1 - (1 - pairs[0][2] ** 8) ** 14)) < 0.05


def test_equal_entries_in_different_bands_give_different_keys() -> None:
    signed = np.zeros((1, 12), np.uint16)
    assert len(set(band_hashes(signed, 4, 3)[0].tolist())) == 4
