from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from corpora import check_restarts, digests, prose, read_documents, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.clean import CleanConfig, clean, normalise
from data_pipeline.context import LocalContext, UserError
from data_pipeline.quality import GopherRules
from data_pipeline.repetition import (
    duplicate_ngram_characters,
    number_words,
    repeats,
    top_ngram_characters,
)

OFF = dict.fromkeys(GopherRules.model_fields)


def only(**rules: object) -> GopherRules:
    """One rule on, all others off."""
    return GopherRules.model_validate({**OFF, **rules})


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


@pytest.mark.parametrize(
    ("rule", "limit", "kept", "dropped"),
    [
        ("min_words", 3, "a b c", "a b"),
        ("max_words", 3, "a b c", "a b c d"),
        ("min_mean_word_length", 2, "aa bbb c", "aa b c"),
        ("max_mean_word_length", 2, "aa bbb c", "aa bbb cc"),
        ("max_symbols_per_word", 0.5, "# a b c", "# # a"),
        ("max_symbols_per_word", 0.5, "a... b", "a... b… c"),
        ("max_bullet_lines", 0.5, "- a\nb", "- a\n• b\nc"),
        ("max_ellipsis_lines", 0.5, "a...\nb", "a...\nb…\nc"),
        ("min_alphabetic_words", 0.5, "a 1", "a 1 2"),
        ("min_stop_words", 2, "The cat and", "the the the"),
        ("max_duplicate_lines", 0.5, "a\na\nb\nb", "a\na\na\nb\na"),
        ("max_duplicate_line_characters", 0.5, "aa\naa\nbbbb", "aaaa\naaaa\naaaa"),
        ("max_duplicate_paragraphs", 0.5, "a\n\nb\n\na", "a\n\na\n\na"),
        ("max_duplicate_paragraph_characters", 0.5, "aa\n\naa\n\nbb", "aa\n\naa\n\naa\n\nb"),
        ("max_top_ngram_characters", {2: 0.5}, "a b c d a b x y", "a b a b c"),
        ("max_duplicate_ngram_characters", {2: 0.5}, "a b c d a b x y", "a b a b c"),
    ],
)
def test_each_rule_keeps_what_is_at_its_limit_and_drops_what_is_beyond(
    rule: str, limit: object, kept: str, dropped: str
) -> None:
    assert only(**{rule: limit}).reason_to_drop(kept) is None
    assert only(**{rule: limit}).reason_to_drop(dropped) == rule
    assert only().reason_to_drop(dropped) is None


def test_gophers_defaults_keep_prose_and_drop_a_table_of_numbers() -> None:
    assert GopherRules().reason_to_drop(prose(1)) is None
    assert GopherRules().reason_to_drop("\n".join(f"{n} {n * 7919 % 1009}" for n in range(90))) is not None


def test_counts_of_repetition_by_hand() -> None:
    assert repeats(["ab", "c", "ab", "ab"]) == (2, 4)
    words = number_words(["a", "bb", "a", "bb", "a", "bb", "c"])
    assert words[1].tolist() == [1, 2, 1, 2, 1, 2, 1]
    # "a bb" stands three times and has three characters; "bb a" stands twice.
    assert top_ngram_characters(*words, 2) == 9
    assert top_ngram_characters(*number_words(["a", "b", "c"]), 2) == 0
    # All but the last word stand in a bigram that is repeated; overlaps count once.
    assert duplicate_ngram_characters(*words, 2) == 9
    assert duplicate_ngram_characters(*number_words(["a"]), 5) == 0
    assert duplicate_ngram_characters(*number_words([]), 5) == 0


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), max_size=60), st.integers(1, 6))
@settings(deadline=None)
def test_the_kernels_count_ngrams_as_counting_tuples_does(words: list[str], n: int) -> None:
    grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
    counts = Counter(grams)
    most = max(counts.values(), default=0)
    longest = max((len("".join(gram)) for gram in counts if counts[gram] == most), default=0)
    covered = {at + k for at, gram in enumerate(grams) if counts[gram] > 1 for k in range(n)}
    assert top_ngram_characters(*number_words(words), n) == (most * longest if most > 1 else 0)
    assert duplicate_ngram_characters(*number_words(words), n) == sum(len(words[at]) for at in covered)


def test_every_document_is_kept_or_rejected_with_its_reason(tmp_path: Path) -> None:
    texts = {f"s/{n}": prose(n) for n in range(20)}
    texts |= {"s/short": "x", "s/long": prose(50, 1000), "s/numbers": "1 2 3 4 5 6 7 8 9 10"}
    source, out = write_documents(tmp_path / "in", texts), tmp_path / "out"
    config = CleanConfig(min_chars=2, max_chars=3000, gopher=only(min_alphabetic_words=0.8))
    metrics = clean(config, {"download": source}, out, LocalContext())
    kept = read_documents(out)
    rejected = {
        row["id"]: row["reason"] for path in out.glob("rejected/*") for row in pq.read_table(path).to_pylist()
    }
    assert rejected == {
        "s/short": "min_chars",
        "s/long": "max_chars",
        "s/numbers": "min_alphabetic_words",
    }
    assert kept == {id: text for id, text in texts.items() if id not in rejected}
    assert (metrics["documents"], metrics["kept"], metrics["dropped/max_chars"]) == (23, 20, 1)
    assert "| s/numbers | 1 2 3 4 5 6 7 8 9 10 |" in (out / "report.md").read_text()


def test_a_shard_goes_out_for_each_that_comes_in_and_worker_count_changes_nothing(tmp_path: Path) -> None:
    source = write_documents(
        tmp_path / "in", {f"s/{n}": prose(n) for n in range(9)} | {"t/0": "x"}, shards=10
    )
    for workers in (1, 2):
        clean(CleanConfig(min_chars=5), {"download": source}, tmp_path / str(workers), LocalContext(workers))
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    names = [path.name for path in sorted(source.glob("*.parquet"))]
    assert [path.name for path in sorted((tmp_path / "1").glob("documents-*"))] == names


def test_a_killed_clean_ends_the_same_when_started_again(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "in", {f"s/{n}": prose(n, 30 + n) for n in range(30)})
    check_restarts(clean, CleanConfig(), {"download": source}, tmp_path)


def test_dropping_everything_is_a_mistake_that_names_the_reasons(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "in", {"s/1": "x", "s/2": "y"})
    with pytest.raises(UserError, match=r"clean dropped every document .dropped/min_chars 2.; loosen"):
        clean(CleanConfig(min_chars=5), {"download": source}, tmp_path / "out", LocalContext())


def test_length_bounds_out_of_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_chars 1 is below min_chars 5"):
        CleanConfig(min_chars=5, max_chars=1)
