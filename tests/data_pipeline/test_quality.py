"""The rules by hand, and the kernels against plain Python that says the same in a few lines."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from corpora import prose
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_words import cut_words
from pydantic import ValidationError

from data_pipeline.clean.c4 import C4Rules
from data_pipeline.clean.fineweb import FineWebRules
from data_pipeline.clean.quality import GopherRules
from data_pipeline.clean.repetition import ngram_characters
from data_pipeline.clean.stage import CleanConfig, clean_batch
from data_pipeline.clean.stop_words import STOP_WORDS as ALL_STOP_WORDS
from data_pipeline.clean.stop_words import of_languages
from data_pipeline.clean.text_stats import BULLETS, ELLIPSES, STOP_WORDS, TERMINAL, TextStats, measure
from data_pipeline.core.words import TABLE_SIZE, UNSPACED, character_classes, words_of
from data_pipeline.documents import SCHEMA

GOPHER_OFF = dict.fromkeys(GopherRules.model_fields)
FINEWEB_OFF = dict.fromkeys(FineWebRules.model_fields.keys() - {"short_line_characters"})


def gopher(**rules: object) -> CleanConfig:
    """Rules of Gopher's on, all others off."""
    return CleanConfig(gopher=GopherRules.model_validate(GOPHER_OFF | rules))


def fineweb(**rules: object) -> CleanConfig:
    return CleanConfig(gopher=None, fineweb=FineWebRules.model_validate(FINEWEB_OFF | rules))


def verdict(config: CleanConfig, text: str) -> str:
    batch = pa.RecordBatch.from_pylist([{"id": "1", "text": text, "source": "s", "meta": "{}"}], SCHEMA)
    return clean_batch(config.resolve(), batch).verdicts.reason(0)


@pytest.mark.parametrize(
    ("rule", "limit", "kept", "dropped"),
    [
        ("min_words", 3, "a b c", "a b"),
        ("max_words", 3, "a b c", "a b c d"),
        ("min_mean_word_length", 2, "aa bbb c", "aa b c"),
        ("max_mean_word_length", 2, "aa bbb c", "aa bbb cc"),
        ("max_symbols_per_word", 0.5, "# a b c", "# # a"),
        ("max_symbols_per_word", 0.5, "a... b", "a... b… c"),
        ("max_symbols_per_word", 0.5, "a#... b", "a...... b..."),
        ("max_bullet_lines", 0.5, "- a\nb", "- a\n• b\nc"),
        ("max_ellipsis_lines", 0.5, "a...\nb", "a...\nb…\nc"),
        ("min_alphabetic_words", 0.5, "a 1", "a 1 ²"),
        ("min_stop_words", 2, "The cat and", "the THE the"),
        ("min_stop_words", 2, "that with", "thatwith the"),
        ("max_duplicate_lines", 0.5, "a\na\nb\nb", "a\na\na\nb\na"),
        ("max_duplicate_line_characters", 0.5, "aa\naa\nbbbb", "aaaa\naaaa\naaaa"),
        ("max_duplicate_paragraphs", 0.5, "a\n\nb\n\na", "a\n\na\n \t\na"),
        ("max_duplicate_paragraph_characters", 0.5, "aa\n\naa\n\nbb", "aa\n\naa\n\naa\n\nb"),
        ("max_top_ngram_characters", {2: 0.5}, "a b c d a b x y", "a b a b c"),
        ("max_top_ngram_characters", {1: 0.5}, "a a b c", "a a b"),
        # The three occurrences of "a a" cover four of the eight characters, though they have six between them.
        ("max_top_ngram_characters", {2: 0.5}, "a a a a b c d e", "a a a a b c d"),
        ("max_duplicate_ngram_characters", {2: 0.5}, "a b c d a b x y", "a b a b c"),
        ("max_duplicate_ngram_characters", {2: 0.5}, "a a a a b c d e", "a a a a b c d"),
    ],
)
def test_gophers_rules_keep_what_is_at_the_limit_and_drop_what_is_beyond(
    rule: str, limit: object, kept: str, dropped: str
) -> None:
    assert verdict(gopher(**{rule: limit}), kept) == "kept"
    assert verdict(gopher(**{rule: limit}), dropped) == rule
    assert verdict(gopher(), dropped) == "kept"


LONG = "a line of thirty characters --"


@pytest.mark.parametrize(
    ("rule", "limit", "kept", "dropped"),
    [
        ("min_terminated_lines", 0.5, "a.\nb!\n\nc", "a?\nb"),
        ("min_terminated_lines", 0.5, "a”\nb'\nc", 'a,\nb"'),
        ("max_duplicate_line_characters", 0.5, "aa\naa\nbbb", "aa\naa"),
        ("max_short_lines", 0.5, f"{LONG}\n{LONG}\nx", f"{LONG}\n{LONG[1:]}"),
    ],
)
def test_finewebs_rules_drop_what_is_at_the_limit(rule: str, limit: float, kept: str, dropped: str) -> None:
    assert verdict(fineweb(**{rule: limit}), kept) == "kept"
    assert verdict(fineweb(**{rule: limit}), dropped) == f"fineweb_{rule}"
    assert verdict(fineweb(), dropped) == "kept"


ORDINARY: dict[str, str] = json.loads((Path(__file__).parents[1] / "ordinary_texts.json").read_text("utf-8"))
"""By language: a few sentences such as stand in any book."""


@pytest.mark.parametrize("language", ORDINARY)
def test_ordinary_texts_of_any_language_pass_by_default_and_with_c4_and_fineweb(language: str) -> None:
    text = ORDINARY[language]
    # Fifty words of Tamil and others with long ones are more than a few sentences.
    everything = {"c4": C4Rules(), "fineweb": FineWebRules(), "gopher": GopherRules(min_words=25)}
    assert verdict(CleanConfig(**everything), text) == "kept"
    assert verdict(CleanConfig(), text) == ("kept" if len(cut_words(text)) >= 50 else "min_words")
    assert verdict(CleanConfig(gopher=GopherRules(min_words=25)), "\n".join([text] * 4)).startswith("max_dup")


def test_stop_words_are_those_of_the_languages_or_of_the_list_that_the_recipe_names() -> None:
    german = ORDINARY["de"]
    assert verdict(gopher(min_stop_words=2, languages=("de",)), german) == "kept"
    assert verdict(gopher(min_stop_words=2, languages=("en", "ru")), german) == "min_stop_words"
    assert verdict(gopher(min_stop_words=2, languages=("de",)), ORDINARY["en"]) == "min_stop_words"
    own = {"min_stop_words": 2, "stop_words": ("Markt", "Brot", "Auto")}
    assert verdict(gopher(**own), german) == "kept"
    assert verdict(gopher(**own), "The markt of that and the brotlaib") == "min_stop_words"
    assert (
        verdict(gopher(min_stop_words=2), "x = foo(a, b)\nfor i in range(9): a is i or e") == "min_stop_words"
    )


@pytest.mark.parametrize(
    ("rules", "fault"),
    [
        ({"languages": ("english",)}, "no stop words are known"),
        ({"languages": ()}, "languages"),
        ({"stop_words": ("of the",)}, "one word"),
        ({"stop_words": ("--",)}, "one word"),
        ({"stop_words": ("the",)}, "min_stop_words 2 is above"),
        ({"stop_words": ("the", "of"), "languages": ("en",)}, "takes the place"),
    ],
)
def test_stop_words_that_could_never_be_found_are_refused(rules: dict, fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        GopherRules(**rules)


def test_every_stop_word_is_a_word_that_is_found() -> None:
    for code, words in ALL_STOP_WORDS.items():
        found = of_languages((code,)).most(pa.array([f"({words})", words.split()[0], ""]), 99)
        assert found.tolist() == [len({*words_of(words)}), 1, 0], code


def test_what_stands_exactly_at_a_decimal_limit_is_at_it() -> None:
    """As floating-point numbers 0.67 * 1500 > 1005 and 0.29 * 100 < 29, but the quotients are equal."""
    lines = [LONG] * 495 + ["short"] * 1005
    assert verdict(fineweb(max_short_lines=0.67), "\n".join(lines)) == "fineweb_max_short_lines"
    words = ["#"] * 29 + ["a"] * 71
    assert verdict(gopher(max_symbols_per_word=0.29), " ".join(words)) == "kept"


def test_line_breaks_are_dropped_beyond_their_limit_only() -> None:
    assert verdict(fineweb(max_newlines_per_word=0.5), "a b\nc d") == "kept"
    assert verdict(fineweb(max_newlines_per_word=0.5), "a\nb\nc d") == "kept"
    assert verdict(fineweb(max_newlines_per_word=0.5), "a\nb\nc") == "fineweb_max_newlines_per_word"


def test_the_papers_thresholds_are_the_defaults_and_keep_prose() -> None:
    assert FineWebRules().min_terminated_lines == 0.12
    assert FineWebRules().max_duplicate_line_characters == 0.1
    assert (FineWebRules().max_short_lines, FineWebRules().short_line_characters) == (0.67, 30)
    everything = CleanConfig(fineweb=FineWebRules())
    assert verdict(everything, prose(1)) == "kept"
    numbers = "\n".join(f"{n} {n * 7919 % 1009}" for n in range(90))
    assert verdict(everything, numbers) == "min_mean_word_length"


def is_unspaced(character: str) -> bool:
    return ord(character) < TABLE_SIZE and character_classes()[ord(character)] == UNSPACED


def width(text: str) -> int:
    return len(text) + sum(one >= "\u2e80" for one in text)


def is_letter(one: str) -> bool:
    """Letters, and what stands for words in scripts without spaces: the numerals of merchants too."""
    return one.isalpha() or (ord(one) < TABLE_SIZE and character_classes()[ord(one)] == UNSPACED)


def reference(text: str, short: int) -> dict[str, int]:
    """`TextStats` of one text, by the book."""
    words = cut_words(text)
    unspaced = [word for word in words if any(is_unspaced(one) for one in word)]
    lines = [line for line in (line.strip() for line in text.split("\n")) if line]
    paragraphs: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            paragraphs[-1].append(line.strip())
        elif paragraphs[-1]:
            paragraphs.append([])
    blocks = [tuple(block) for block in paragraphs if block]

    def repeated(values: list) -> list:
        return [value for at, value in enumerate(values) if value in values[:at]]

    return {
        "characters": len(text),
        "words": len(words),
        "word_characters": sum(map(len, words)),
        "alphabetic_words": sum(any(map(is_letter, word)) for word in words),
        "stop_words": len(STOP_WORDS & {word.lower() for word in words}),
        "hashes": text.count("#"),
        "ellipses": sum(text.count(one) for one in ELLIPSES),
        "newlines": text.count("\n"),
        "lines": len(lines),
        "line_characters": sum(map(len, lines)),
        "bullet_lines": sum(line.startswith(BULLETS) for line in lines),
        "ellipsis_lines": sum(line.endswith(ELLIPSES) for line in lines),
        "terminated_lines": sum(line.endswith(TERMINAL) for line in lines),
        "duplicate_lines": len(repeated(lines)),
        "duplicate_line_characters": sum(map(len, repeated(lines))),
        "paragraphs": len(blocks),
        "duplicate_paragraphs": len(repeated(blocks)),
        "duplicate_paragraph_characters": sum(len("".join(block)) for block in repeated(blocks)),
        "short_lines": sum(width(line) < short for line in lines),
        "unspaced_words": len(unspaced),
        "spaced_length": sum(map(width, words)) - sum(map(width, unspaced)),
    }


VISIBLE = [
    "the ",
    "THAT",
    "- ",
    "• ",
    "...",
    "…",
    "#",
    "a",
    "é",
    "日",
    "本語",
    "ที่นี่",
    "가나",
    "हिन्दी",
    "3",
    "²",
    "b.",
    "wi",
    "th",
    "!”",
    "👍",
    "𝔞",
]
BLANK = ["\n", "\n\n", " \n", "\u2003", "\u00a0", "\t", "\x1c", "\U000e0041"]
PIECES = st.sampled_from([*VISIBLE, *BLANK, "a long line, repeated\n"])
TEXTS = st.lists(PIECES, max_size=40).map("".join) | st.text(alphabet=st.characters(codec="utf-8"))


@given(st.lists(TEXTS, max_size=6), st.integers(0, 12))
@settings(deadline=None, max_examples=400)
def test_the_kernel_counts_as_plain_python_does(texts: list[str], short: int) -> None:
    stats = measure(pa.array(["outside", *texts], pa.string()).slice(1), short)
    for row, text in enumerate(texts):
        found = {name: int(getattr(stats, name)[row]) for name in TextStats.__dataclass_fields__}
        assert found == reference(text, short)


def reference_ngrams(words: list[str], n: int) -> tuple[int, int]:
    """Characters in the most frequent n-gram, and in all that occur more than once."""
    places: dict[tuple[str, ...], list[int]] = {}
    for at in range(len(words) - n + 1):
        places.setdefault(tuple(words[at : at + n]), []).append(at)
    counts = Counter({gram: len(found) for gram, found in places.items()})

    def covered(starts: list[int]) -> int:
        return sum(len(words[at]) for at in {start + k for start in starts for k in range(n)})

    most = max(counts.values(), default=0)
    top = max((covered(found) for found in places.values() if len(found) == most), default=0)
    return top if most > 1 else 0, covered(
        [at for found in places.values() if len(found) > 1 for at in found]
    )


def test_no_letter_and_no_space_lies_beyond_the_tables() -> None:
    beyond = map(chr, range(TABLE_SIZE, 0x110000))
    assert not any(one.isalpha() or one.isspace() for one in beyond)


WORDS = st.lists(
    st.sampled_from(
        ["a", "bb", "ccc", "é", "eight888", "nineteen characters", "nineteen charakters", "日本"]
    ),
    max_size=60,
)


@given(st.lists(WORDS, max_size=4))
@settings(deadline=None, max_examples=300)
def test_the_kernel_counts_ngrams_as_plain_python_does(texts: list[list[str]]) -> None:
    column = pa.array(["outside", *(" ".join(words) for words in texts)], pa.string()).slice(1)
    top, duplicate = ngram_characters(column, measure(column).words, range(1, 8), range(1, 8))
    for row, text in enumerate(column.to_pylist()):
        for n in range(1, 8):
            assert (top[n - 1, row], duplicate[n - 1, row]) == reference_ngrams(cut_words(text), n)


def test_counts_of_ngrams_by_hand() -> None:
    column = pa.array(["a bb a bb a bb c", "a b c", "a", ""], pa.string())
    top, duplicate = ngram_characters(column, measure(column).words, [2], [2, 5])
    # "a bb" stands three times and has three characters; "bb a" stands twice, between them.
    assert top.tolist() == [[9, 0, 0, 0]]
    assert duplicate.tolist() == [[9, 0, 0, 0], [0, 0, 0, 0]]
