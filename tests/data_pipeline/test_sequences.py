from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.clean.sequences import Sequences, fill_table
from data_pipeline.core.words import words_of


def column(texts: list[str]) -> pa.Array:
    return pa.array(["outside", *texts], pa.string()).slice(1)


@pytest.mark.parametrize(
    ("text", "joined", "separated"),
    [
        ("Don't STOP-me; 3.5 ok", "dont stopme 35 ok", "don t stop me 3 5 ok"),
        ("naïve ÉTÉ\tmañana", "naïve été mañana", "naïve été mañana"),
        ("At noon—and then", "at noon and then", "at noon and then"),
        ("a - b … “c”", "a b c", "a b c"),
        ("日本語 text漢字", "日 本 語 text 漢 字", "日 本 語 text 漢 字"),
        ("snake_case 👍 x\u0301", "snakecase x\u0301", "snake case x\u0301"),
    ],
)
def test_words_by_hand(text: str, joined: str, separated: str) -> None:
    assert words_of(text, True) == joined.split()
    assert words_of(text, False) == separated.split()


PIECES = [
    "the",
    "Cat",
    "sat",
    "SAT",
    " ",
    " ",
    " ",
    "-",
    "'",
    "é",
    "É",
    "日本",
    "\n",
    "…",
    "👍",
    "4",
    "\u3000",
    "ß",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


@given(
    st.lists(TEXTS, max_size=4), st.lists(TEXTS, max_size=4), st.sampled_from([None, 1, 2, 3]), st.booleans()
)
@settings(deadline=None, max_examples=300)
def test_the_kernel_finds_what_comparing_words_finds(
    items: list[str], texts: list[str], ngram: int | None, joined: bool
) -> None:
    wanted: dict[tuple[str, ...], int] = {}
    for item, text in enumerate(items):
        words = words_of(text, joined)
        width = len(words) if ngram is None else ngram
        for at in range(len(words) - width + 1 if words else 0):
            wanted.setdefault(tuple(words[at : at + width]), item)
    expected = []
    for row, text in enumerate(texts):
        words = words_of(text, joined)
        for width in sorted({len(window) for window in wanted}):
            windows = [tuple(words[at : at + width]) for at in range(len(words) - width + 1)]
            expected += [(row, wanted[one], " ".join(one)) for one in windows if one in wanted]
    assert [*Sequences(items, ngram=ngram, joined=joined).find(column(texts))] == expected


def test_a_collision_of_hashes_is_no_match() -> None:
    """One phrase's hash is made that of another: what the table finds by it is compared and refused."""
    phrases = Sequences(["red herring", "blue whale"], ngram=None, joined=False)
    other = Sequences(["green door"], ngram=None, joined=False)
    at = phrases.items.tolist().index(0)
    phrases._hashes[at] = other._hashes[0]
    phrases.items = phrases.items[np.argsort(phrases._hashes)]
    phrases._hashes.sort()
    fill_table(other._hashes, phrases._table, phrases._bits)
    hits = np.zeros(2, np.int64)
    texts = pa.array(["a blue whale", "a green door"])
    phrases._look_up(texts, hits, np.empty((0, 3), np.int64), np.empty(0, np.uint64))
    assert hits.tolist() == [1, 1]
    assert [(match.row, match.item, match.words) for match in phrases.find(texts)] == [(0, 1, "blue whale")]


def test_items_of_too_few_words_are_sought_nowhere() -> None:
    assert Sequences(["one two three", "one two", "", "..."], ngram=3, joined=True).windows.tolist() == [
        1,
        0,
        0,
        0,
    ]
    assert [*Sequences(["..."], ngram=None, joined=False).find(column(["...", "x"]))] == []
