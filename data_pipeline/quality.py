"""The quality and repetition rules of Gopher, each a threshold that may be switched off.

Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", appendix A.1.1 and
table A1. The defaults are theirs; ``None`` switches a rule off. Words are separated by white space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from data_pipeline.context import Config
from data_pipeline.repetition import (
    duplicate_ngram_characters,
    number_words,
    repeats,
    top_ngram_characters,
)

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLETS = ("•", "‣", "●", "-", "*", "–")
ELLIPSES = ("...", "…")
HAS_LETTER = re.compile(r"[^\W\d_]")
PARAGRAPHS = re.compile(r"\n[^\S\n]*\n\s*")

Count = Annotated[int, Field(ge=0)]
Width = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class GopherRules(Config):
    """Thresholds; a document beyond one is dropped for the reason that bears the field's name."""

    min_words: Count | None = 50
    max_words: Count | None = 100_000
    min_mean_word_length: Ratio | None = 3
    """Characters."""
    max_mean_word_length: Ratio | None = 10
    max_symbols_per_word: Ratio | None = 0.1
    """For hash signs and for ellipses, each on its own."""
    max_bullet_lines: Fraction | None = 0.9
    """Fraction of lines that begin with a bullet."""
    max_ellipsis_lines: Fraction | None = 0.3
    """Fraction of lines that end with an ellipsis."""
    min_alphabetic_words: Fraction | None = 0.8
    """Fraction of words that hold a letter."""
    min_stop_words: Count | None = 2
    """How many different ones of the, be, to, of, and, that, have, with must occur."""
    max_duplicate_lines: Fraction | None = 0.3
    """Fraction of lines that repeat an earlier one."""
    max_duplicate_paragraphs: Fraction | None = 0.3
    max_duplicate_line_characters: Fraction | None = 0.2
    """Fraction of the characters that stand in repeated lines."""
    max_duplicate_paragraph_characters: Fraction | None = 0.2
    max_top_ngram_characters: dict[Width, Fraction] | None = Field(default={2: 0.2, 3: 0.18, 4: 0.16})
    """By n: fraction of the words' characters that the most frequent n-gram covers."""
    max_duplicate_ngram_characters: dict[Width, Fraction] | None = Field(
        default={5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
    )
    """By n: fraction of the words' characters that stand in n-grams which occur more than once."""

    def reason_to_drop(self, text: str) -> str | None:
        """The name of the first rule that ``text`` breaks, cheapest rules first; None where it keeps all."""
        words = text.split()
        lines = [line for line in (line.strip() for line in text.split("\n")) if line]
        return (
            self._by_words(words)
            or self._by_symbols(text, words)
            or self._by_lines(lines)
            or self._by_vocabulary(words)
            or self._by_repeated_blocks(text, lines)
            or self._by_repeated_ngrams(words)
        )

    def _by_words(self, words: Sequence[str]) -> str | None:
        count = len(words)
        mean = sum(map(len, words)) / max(1, count)
        if self.min_words is not None and count < self.min_words:
            return "min_words"
        if self.max_words is not None and count > self.max_words:
            return "max_words"
        if self.min_mean_word_length is not None and mean < self.min_mean_word_length:
            return "min_mean_word_length"
        if self.max_mean_word_length is not None and mean > self.max_mean_word_length:
            return "max_mean_word_length"
        return None

    def _by_symbols(self, text: str, words: Sequence[str]) -> str | None:
        if self.max_symbols_per_word is not None:
            allowed = self.max_symbols_per_word * len(words)
            if text.count("#") > allowed or sum(text.count(one) for one in ELLIPSES) > allowed:
                return "max_symbols_per_word"
        return None

    def _by_lines(self, lines: Sequence[str]) -> str | None:
        if self.max_bullet_lines is not None:
            bullets = sum([line.startswith(BULLETS) for line in lines])  # a list: faster than a generator
            if bullets > self.max_bullet_lines * len(lines):
                return "max_bullet_lines"
        if self.max_ellipsis_lines is not None:
            ellipses = sum([line.endswith(ELLIPSES) for line in lines])
            if ellipses > self.max_ellipsis_lines * len(lines):
                return "max_ellipsis_lines"
        return None

    def _by_vocabulary(self, words: Sequence[str]) -> str | None:
        if self.min_alphabetic_words is not None:
            least = self.min_alphabetic_words * len(words)
            # Words of nothing but letters are counted fast, and mostly suffice.
            if sum(map(str.isalpha, words)) < least and sum(map(bool, map(HAS_LETTER.search, words))) < least:
                return "min_alphabetic_words"
        if self.min_stop_words is not None:
            found = STOP_WORDS.intersection(map(str.lower, set(words)))
            if len(found) < self.min_stop_words:
                return "min_stop_words"
        return None

    def _by_repeated_blocks(self, text: str, lines: Sequence[str]) -> str | None:
        of_lines = (self.max_duplicate_lines, self.max_duplicate_line_characters)
        of_paragraphs = (self.max_duplicate_paragraphs, self.max_duplicate_paragraph_characters)
        for kind, (by_count, by_characters) in (("line", of_lines), ("paragraph", of_paragraphs)):
            if by_count is None and by_characters is None:
                continue
            blocks = lines if kind == "line" else [part for part in PARAGRAPHS.split(text.strip()) if part]
            repeated, characters = repeats(blocks)
            if by_count is not None and repeated > by_count * len(blocks):
                return f"max_duplicate_{kind}s"
            if by_characters is not None and characters > by_characters * sum(map(len, blocks)):
                return f"max_duplicate_{kind}_characters"
        return None

    def _by_repeated_ngrams(self, words: Sequence[str]) -> str | None:
        if not self.max_top_ngram_characters and not self.max_duplicate_ngram_characters:
            return None
        ids, lengths = number_words(words)
        total = lengths.sum()
        for n, limit in (self.max_top_ngram_characters or {}).items():
            if top_ngram_characters(ids, lengths, n) > limit * total:
                return "max_top_ngram_characters"
        for n, limit in (self.max_duplicate_ngram_characters or {}).items():
            if duplicate_ngram_characters(ids, lengths, n) > limit * total:
                return "max_duplicate_ngram_characters"
        return None
