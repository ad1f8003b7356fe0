from __future__ import annotations

import unicodedata

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.clean.normalise import Form, composes_with_none, normalise, normalise_column
from data_pipeline.core.words import TABLE_SIZE

FORMS: tuple[Form, ...] = ("NFC", "NFKC", "NFD", "NFKD")
TEXTS = st.text(alphabet=st.characters(codec="utf-8")) | st.text(
    alphabet="ab \n\t\r\x00\x85\u00a0\u2028\u3000e\u0301é\u1100\u1161각ﬁ²Å\u0323\u09c7\u09be👍🏽"
)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("Cafe\u0301", "Café"),
        ("Cafe\x00\u0301", "Café"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("\x00a\x07\tb\x7f\x9fc\n", "a\tbc"),
        (
            "one\x0btwo\x0cthree\x1cfour\x85five\u2028six\u2029seven",
            "one\ntwo\nthree\nfour\nfive\nsix\nseven",
        ),
        ("  spaced \n\n", "spaced"),
        ("日本語 👍🏽", "日本語 👍🏽"),
    ],
)
def test_normalising_by_hand(text: str, normalised: str) -> None:
    assert normalise(text, "NFC") == normalised


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_normalising_twice_changes_nothing_and_leaves_no_control_character(text: str) -> None:
    once = normalise(text, "NFC")
    assert normalise(once, "NFC") == once
    assert all(unicodedata.category(one) != "Cc" or one in "\n\t" for one in once)


@given(st.lists(TEXTS, max_size=8), st.sampled_from([None, *FORMS]))
@settings(deadline=None, max_examples=300)
def test_a_column_is_normalised_as_its_texts_one_by_one(texts: list[str], form: Form | None) -> None:
    column = pa.array(["outside", *texts, "outside"], pa.string()).slice(1, len(texts))
    assert normalise_column(column, form).to_pylist() == [normalise(text, form) for text in texts]


def test_a_column_that_is_normal_is_handed_back_itself() -> None:
    column = pa.array(["plain", "naïve “quotes” – 日本語", ""], pa.string())
    assert normalise_column(column, "NFC") is column


def test_no_character_that_the_kernel_passes_composes_with_the_one_before_it() -> None:
    """What the second half of any canonical decomposition may be is left to Python."""
    for code in range(TABLE_SIZE):
        halves = unicodedata.decomposition(chr(code)).split()
        if len(halves) == 2 and not halves[0].startswith("<"):
            assert not composes_with_none(chr(int(halves[1], 16)), "NFC"), f"U+{code:04X}"
    for code in range(TABLE_SIZE):
        if unicodedata.combining(chr(code)):
            assert not composes_with_none(chr(code), "NFD"), f"U+{code:04X}"
