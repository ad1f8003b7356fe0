"""Words, by script: the one definition for duplicates, repeated spans, searched phrases and quality rules.

Of a script that is written with spaces, a word is a run of letters and digits. Of one that is written without (Han,
kana, Thai, Lao, Khmer, Burmese, Tibetan, ...) every letter is a word: no dictionary is needed, and runs of them tell
texts apart as runs of words do elsewhere. Marks (accents, vowel signs, tones, variation selectors) belong to the letter
before them, so they neither part a word nor begin one. Format characters that nobody sees (joiners, soft hyphens, marks
of direction) are as if they were not there.

Kernels take the classes as a table by code point (`character_classes`) and go from word to word by this rule:

====================  ==================================================
`LETTER`              continues a word of letters, or begins one
`UNSPACED`            begins a word
`MARK`                continues any word; begins none
`IGNORED`             changes nothing
`SPACE`, `OTHER`      end a word
====================  ==================================================
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from itertools import groupby
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.core.kernels import code_point, kernel

OTHER, SPACE, LETTER, UNSPACED, MARK, IGNORED = range(6)
TABLE_SIZE = 0x40000
"""Code points below this have a class in the tables: those beyond are `OTHER`. No letter is among them."""
UNSPACED_BLOCKS = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x3005, 0x303C),  # Han: signs of repetition, numerals
    (0x3041, 0x30FF),  # kana
    (0x3100, 0x312F),  # Bopomofo
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),  # kana
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xA000, 0xA4CF),  # Yi
    (0xA980, 0xA9FF),  # Javanese, Burmese
    (0xAA60, 0xAADF),  # Burmese, Tai Viet
    (0xF900, 0xFAFF),  # Han
    (0xFF66, 0xFF9F),  # kana of half width
    (0x116D0, 0x116FF),  # Burmese
    (0x11700, 0x1174F),  # Ahom
    (0x16FE0, 0x18DFF),  # Tangut, Khitan
    (0x1AFF0, 0x1B2FF),  # kana, Nushu
    (0x20000, 0x3FFFF),  # Han
)
"""Scripts that are written without spaces between words. Of their characters the digits are as all digits are."""
SOUND_MARKS = "\uff9e\uff9f"
"""Marks of sound by their use, letters by Unicode: those of half-width kana."""
DASHES = "\u2013\u2014\u2015\u2e3a\u2e3b"
"""Punctuation that parts words even where other punctuation is as if it were not there: ``noon—and``."""
ZERO_WIDTH_SPACE = "\u200b"
"""Parts words where it stands, unlike the other format characters: Khmer and Thai have it between words."""

Signs = Literal["none", "symbols", "all"]
"""Signs that distinguish words beside their letters: none; operators, currencies, emoji and other symbols; or
punctuation, too."""
OPERATORS = "!$%&*+-/<=>?@^|~"
"""Characters of ASCII that source code computes with. Brackets, quotes, ``#`` and what parts clauses is punctuation."""


@cache
def character_classes(letters: str = "") -> NDArray[np.uint8]:
    """Return the class of each code point below `TABLE_SIZE`; of ``letters`` it is `LETTER`, whatever they are."""
    if letters:
        table = character_classes().copy()
        table[[ord(one) for one in letters]] = LETTER
        return table
    categories = np.array([unicodedata.category(chr(code)) for code in range(TABLE_SIZE)])
    major = categories.astype("U1")
    table = np.full(TABLE_SIZE, OTHER, np.uint8)
    table[(major == "L") | (major == "N")] = LETTER
    unspaced = np.zeros(TABLE_SIZE, np.bool_)
    for first, last in UNSPACED_BLOCKS:
        unspaced[first : last + 1] = True
    table[unspaced & ((major == "L") | (categories == "Nl"))] = UNSPACED
    table[categories == "Cf"] = IGNORED
    table[major == "M"] = MARK
    table[[ord(one) for one in SOUND_MARKS]] = MARK
    table[ord(ZERO_WIDTH_SPACE)] = OTHER
    table[[code for code in range(TABLE_SIZE) if chr(code).isspace()]] = SPACE
    return table


@cache
def telling_signs(signs: Signs) -> NDArray[np.bool_]:
    """Find which characters below `TABLE_SIZE` that are no part of words distinguish words; see `Signs`."""
    other = character_classes("_") == OTHER
    if signs == "all":
        return other & np.array([unicodedata.category(chr(code))[0] in "SP" for code in range(TABLE_SIZE)])
    distinguishing = np.zeros(TABLE_SIZE, np.bool_)
    if signs == "symbols":
        distinguishing[128:] = [unicodedata.category(chr(code))[0] == "S" for code in range(128, TABLE_SIZE)]
        distinguishing[[ord(one) for one in OPERATORS]] = True
    return distinguishing & other


@cache
def lower_case() -> NDArray[np.uint32]:
    """Return the lower case of each code point below `TABLE_SIZE`; itself where that is more than one."""
    table = np.arange(TABLE_SIZE, dtype=np.uint32)
    for code in range(TABLE_SIZE):
        lowered = chr(code).lower()
        if len(lowered) == 1 and ord(lowered) < TABLE_SIZE:
            table[code] = ord(lowered)
    return table


@kernel
def next_word(data: NDArray[np.uint8], at: int, end: int, classes: NDArray[np.uint8]) -> tuple[int, int]:
    """Find where the first word from byte ``at`` on begins and where it ends; both at ``end`` where there is none."""
    kind = OTHER
    begin = end
    while at < end:
        code, length = code_point(data, at)
        kind = int(classes[code]) if code < len(classes) else OTHER
        if kind in (LETTER, UNSPACED):
            begin = at
            at += length
            break
        at += length
    run = kind == LETTER
    while at < end:
        code, length = code_point(data, at)
        kind = int(classes[code]) if code < len(classes) else OTHER
        if kind != MARK and kind != IGNORED and not (run and kind == LETTER):
            break
        at += length
    return begin, at


class Translation(dict[int, str]):
    """For `str.translate`: letters lower-cased, all else but marks gone, or a space in its place."""

    def __init__(self, joined: bool) -> None:
        self._by_class = {OTHER: "" if joined else " ", SPACE: " ", IGNORED: ""}

    def __missing__(self, code: int) -> str:
        kind = int(character_classes()[code]) if code < TABLE_SIZE else OTHER
        kind = SPACE if chr(code) in DASHES else kind
        self[code] = self._by_class[kind] if kind in self._by_class else chr(lower_case()[code])
        return self[code]


TRANSLATIONS = {joined: Translation(joined) for joined in (False, True)}


@cache
def word_pattern() -> re.Pattern[str]:
    """Return the pattern that finds the words in text of letters, marks and spaces."""
    classes = character_classes()
    letter, unspaced, mark = (one_of(np.flatnonzero(classes == kind)) for kind in (LETTER, UNSPACED, MARK))
    return re.compile(f"{letter}(?:{letter}|{mark})*|{unspaced}{mark}*")


def one_of(codes: NDArray[np.int64]) -> str:
    """Return a regular expression for one of some characters, given by ascending code points."""
    runs = [
        [code for _, code in run] for _, run in groupby(enumerate(codes.tolist()), lambda at: at[1] - at[0])
    ]
    return "[" + "".join(f"{re.escape(chr(run[0]))}-{re.escape(chr(run[-1]))}" for run in runs) + "]"


def words_of(text: str, joined: bool = False) -> list[str]:
    """Return the lower-cased words of a text, without format characters.

    Args:
        joined: whether punctuation but `DASHES` is as if it were not there (``don't`` is ``dont``); else it parts
            words.
    """
    return word_pattern().findall(text.translate(TRANSLATIONS[joined]))
