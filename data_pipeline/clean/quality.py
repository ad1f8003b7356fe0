"""The quality and repetition rules of Gopher, each a threshold that may be switched off.

Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", appendix A.1.1 and
table A1. The defaults are theirs; ``None`` switches a rule off. They are made for English; so that they mean the same
in other languages, what a word is depends on the script (see `data_pipeline.clean.text_stats`), the length of words
is asked of texts only of which at least half the words are of scripts with spaces, and over these, n-grams are of
twice as many words in the other texts, where a word is a letter, and stop words are those of any language that has a
list (`data_pipeline.clean.stop_words`). Where the paper leaves a choice: words are separated
by white space, as punctuation is not spoken of; a line or paragraph is a duplicate if it equals an earlier one; the
characters of n-grams are those of their words and are measured against those of all words; of the most frequent
n-gram, "characters contained within" it count once where its occurrences overlap, so that no fraction exceeds one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data_pipeline.clean.repetition import ngram_characters
from data_pipeline.clean.stop_words import STOP_WORDS, of_languages, of_list
from data_pipeline.clean.text_stats import TextStats
from data_pipeline.core.config import Config
from data_pipeline.core.words import words_of

Count = Annotated[int, Field(ge=0)]
Width = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def fraction_of(part: NDArray[Any], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return ``part / whole``, 0 where there is nothing.

    What stands exactly at a decimal limit is equal to it, which ``limit * whole`` is not: 0.67 * 1500 > 1005.
    """
    return part / np.maximum(1, whole)


LETTERS_A_WORD = 2
"""Letters of a word in scripts that are written without spaces, about."""

Broken = tuple[str, NDArray[np.bool_]]
"""The reason to drop for which a rule stands, and which texts of a column break it."""


class GopherRules(Config):
    """Thresholds; a document beyond one is dropped for the reason that bears the field's name."""

    min_words: Count | None = 50
    """Shorter documents are dropped."""
    max_words: Count | None = 100_000
    """Longer documents are dropped."""
    min_mean_word_length: Ratio | None = 3
    """Characters; Korean and full-width ones count twice."""
    max_mean_word_length: Ratio | None = 10
    """Characters; as `min_mean_word_length`."""
    max_symbols_per_word: Ratio | None = 0.1
    """For hash signs and for ellipses, each on its own."""
    max_bullet_lines: Fraction | None = 0.9
    """Fraction of lines that begin with a bullet."""
    max_ellipsis_lines: Fraction | None = 0.3
    """Fraction of lines that end with an ellipsis."""
    min_alphabetic_words: Fraction | None = 0.8
    """Fraction of words that hold a letter."""
    min_stop_words: Count | None = 2
    """How many different stop words of one language must occur; of English: the, be, to, of, and, that, have, with."""
    languages: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Whose stop words count, by ISO 639-1 code; None: those of all languages that have a list."""
    stop_words: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """A list of one's own in place of these."""
    max_duplicate_lines: Fraction | None = 0.3
    """Fraction of lines that repeat an earlier one."""
    max_duplicate_paragraphs: Fraction | None = 0.3
    """Fraction of paragraphs that repeat an earlier one."""
    max_duplicate_line_characters: Fraction | None = 0.2
    """Fraction of the characters that stand in repeated lines."""
    max_duplicate_paragraph_characters: Fraction | None = 0.2
    """Fraction of the characters that stand in repeated paragraphs."""
    max_top_ngram_characters: dict[Width, Fraction] | None = Field(default={2: 0.2, 3: 0.18, 4: 0.16})
    """Fraction, by n, of the words' characters that the most frequent n-gram covers, if it occurs twice or more."""
    max_duplicate_ngram_characters: dict[Width, Fraction] | None = Field(
        default={5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
    )
    """Fraction, by n, of the words' characters that stand in n-grams which occur more than once."""

    @model_validator(mode="after")
    def _stop_words_can_be_found(self) -> Self:
        if unknown := set(self.languages or ()) - set(STOP_WORDS):
            raise ValueError(f"no stop words are known of {sorted(unknown)}: give your own as stop_words")
        if self.languages and self.stop_words:
            raise ValueError("languages and stop_words: one takes the place of the other")
        if many := [word for word in self.stop_words or () if len(words_of(word)) != 1]:
            raise ValueError(f"stop_words {many}: each must be one word, or it would never be found")
        if self.stop_words and len({*self.stop_words}) < (self.min_stop_words or 0):
            raise ValueError(f"min_stop_words {self.min_stop_words} is above the number of stop_words")
        return self

    def broken(self, texts: pa.Array, stats: TextStats) -> Iterator[Broken]:
        """Yield the rules that need only counts, and the texts that break each."""
        yield from self._by_words(stats)
        yield from self._by_lines(stats)
        yield from self._by_vocabulary(texts, stats)
        yield from self._by_repeated_blocks(stats)

    def _by_words(self, stats: TextStats) -> Iterator[Broken]:
        spaced = stats.words - stats.unspaced_words
        mean = fraction_of(stats.spaced_length, spaced)
        mostly_spaced = 2 * spaced >= stats.words
        if self.min_words is not None:
            yield "min_words", stats.words < self.min_words
        if self.max_words is not None:
            yield "max_words", stats.words > self.max_words
        if self.min_mean_word_length is not None:
            yield "min_mean_word_length", mostly_spaced & (mean < self.min_mean_word_length)
        if self.max_mean_word_length is not None:
            yield "max_mean_word_length", mostly_spaced & (mean > self.max_mean_word_length)
        if self.max_symbols_per_word is not None:
            symbols = np.maximum(stats.hashes, stats.ellipses)
            yield "max_symbols_per_word", fraction_of(symbols, stats.words) > self.max_symbols_per_word

    def _by_lines(self, stats: TextStats) -> Iterator[Broken]:
        if self.max_bullet_lines is not None:
            yield "max_bullet_lines", fraction_of(stats.bullet_lines, stats.lines) > self.max_bullet_lines
        if self.max_ellipsis_lines is not None:
            yield (
                "max_ellipsis_lines",
                fraction_of(stats.ellipsis_lines, stats.lines) > self.max_ellipsis_lines,
            )

    def _by_vocabulary(self, texts: pa.Array, stats: TextStats) -> Iterator[Broken]:
        if self.min_alphabetic_words is not None:
            yield (
                "min_alphabetic_words",
                fraction_of(stats.alphabetic_words, stats.words) < self.min_alphabetic_words,
            )
        if self.min_stop_words is not None:
            yield "min_stop_words", self._lacking_stop_words(texts, stats, self.min_stop_words)

    def _lacking_stop_words(self, texts: pa.Array, stats: TextStats, least: int) -> NDArray[np.bool_]:
        """Return the texts with fewer than ``least`` different stop words; those of English are counted already."""
        codes = self.languages or tuple(STOP_WORDS)
        english = "en" in codes and not self.stop_words
        lacking = stats.stop_words < least if english else np.ones(len(texts), np.bool_)
        rows = np.flatnonzero(lacking)
        words = of_list(self.stop_words) if self.stop_words else of_languages(codes)
        lacking[rows] = words.most(texts.take(pa.array(rows)), least) < least
        return lacking

    def _by_repeated_blocks(self, stats: TextStats) -> Iterator[Broken]:
        for name, limit, part, whole in (
            ("lines", self.max_duplicate_lines, stats.duplicate_lines, stats.lines),
            (
                "line_characters",
                self.max_duplicate_line_characters,
                stats.duplicate_line_characters,
                stats.line_characters,
            ),
            ("paragraphs", self.max_duplicate_paragraphs, stats.duplicate_paragraphs, stats.paragraphs),
            (
                "paragraph_characters",
                self.max_duplicate_paragraph_characters,
                stats.duplicate_paragraph_characters,
                stats.line_characters,
            ),
        ):
            if limit is not None:
                yield f"max_duplicate_{name}", fraction_of(part, whole) > limit

    def broken_by_ngrams(self, texts: pa.Array, stats: TextStats) -> Iterator[Broken]:
        """Yield the rules that count n-grams: the dearest, so ask them of what the others left."""
        tops, duplicates = self.max_top_ngram_characters or {}, self.max_duplicate_ngram_characters or {}
        if not tops and not duplicates:
            return
        of_top, of_duplicates = np.zeros((len(tops), len(texts))), np.zeros((len(duplicates), len(texts)))
        unspaced = 2 * stats.unspaced_words > stats.words
        for letters, chosen in ((1, ~unspaced), (LETTERS_A_WORD, unspaced)):
            rows = np.flatnonzero(chosen)
            if len(rows):
                of_top[:, rows], of_duplicates[:, rows] = ngram_characters(
                    texts if len(rows) == len(texts) else texts.take(pa.array(rows)),
                    stats.words[rows],
                    [letters * n for n in tops],
                    [letters * n for n in duplicates],
                )
        for found, limit in zip(of_top, tops.values(), strict=True):
            yield "max_top_ngram_characters", fraction_of(found, stats.word_characters) > limit
        for found, limit in zip(of_duplicates, duplicates.values(), strict=True):
            yield "max_duplicate_ngram_characters", fraction_of(found, stats.word_characters) > limit
