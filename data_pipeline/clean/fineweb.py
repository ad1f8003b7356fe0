"""FineWeb's own rules, which it applies after Gopher's and C4's.

Penedo et al. 2024, "The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale" (custom heuristic
filters). The thresholds are the paper's; a document *at* one is dropped, as there. The code that made the dataset
differs: characters in duplicated lines at 0.01, lines of 30 characters short too, and the rule on line breaks, of
which the paper does not speak. Blank lines are no lines here, so that a blank line between paragraphs costs nothing.
They are made for the web, where a line is a paragraph: of books with wrapped lines they drop much that is good.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from data_pipeline.clean.quality import Broken, Count, Fraction, Ratio, fraction_of
from data_pipeline.clean.text_stats import TextStats
from data_pipeline.core.config import Config

PositiveFraction = Annotated[float, Field(gt=0, le=1)]
"""Never 0: what is at the limit is dropped, and every text is at 0."""


class FineWebRules(Config):
    """Thresholds; None switches a rule off."""

    min_terminated_lines: Fraction | None = 0.12
    """Fraction of lines that end with a full stop, a question or exclamation mark or a quotation mark."""
    max_duplicate_line_characters: PositiveFraction | None = 0.1
    """Fraction of the characters that stand in lines which repeat an earlier one."""
    max_short_lines: PositiveFraction | None = 0.67
    """Fraction of lines with fewer than ``short_line_characters`` characters."""
    short_line_characters: Count = 30
    """See `max_short_lines`."""
    max_newlines_per_word: Ratio | None = 0.3
    """Line feeds for each word; only more than this is dropped."""

    def broken(self, stats: TextStats) -> Iterator[Broken]:
        """Yield the rules, and the texts that break each. ``stats`` were made with ``short_line_characters``."""
        if self.min_terminated_lines is not None:
            yield (
                "fineweb_min_terminated_lines",
                fraction_of(stats.terminated_lines, stats.lines) <= self.min_terminated_lines,
            )
        if self.max_duplicate_line_characters is not None:
            duplicate = fraction_of(stats.duplicate_line_characters, stats.line_characters)
            yield "fineweb_max_duplicate_line_characters", duplicate >= self.max_duplicate_line_characters
        if self.max_short_lines is not None:
            yield (
                "fineweb_max_short_lines",
                fraction_of(stats.short_lines, stats.lines) >= self.max_short_lines,
            )
        if self.max_newlines_per_word is not None:
            broken = fraction_of(stats.newlines, stats.words) > self.max_newlines_per_word
            yield "fineweb_max_newlines_per_word", broken
