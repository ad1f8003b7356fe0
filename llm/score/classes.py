"""Classes of a text's bytes, by which it is told where a model is good: each character is in exactly one.

====================  ==================================================================================
class                 its characters
====================  ==================================================================================
URLs                  all of an address: what begins with ``http://``, ``https://``, ``ftp://`` or ``www.``
Latin letters         letters (categories L) whose name, decomposed (NFKD), says LATIN
other letters         all other letters: Cyrillic, Arabic, Devanagari, Thai, Han, kana, ...
numbers               digits and numerals of any script (N)
code symbols          those of ASCII that prose hardly has: ``#$%&*+/<=>@[\\]^_`{|}~``
punctuation           all other punctuation (P), quotes, dashes and brackets of any script among them
white space           spaces, tabs, line breaks, as Python has it
emoji and others      other symbols (S), emoji above all; what is unassigned, private or a control character
====================  ==================================================================================

Marks (M: accents, vowel signs, variation selectors) and format characters (Cf: joiners, marks of direction) are of the
class of the character before them, so an emoji of several code points is of one class. At a text's beginning they are
among "emoji and others".
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

import numpy as np
from numpy.typing import NDArray

CLASSES = (
    "Latin letters",
    "other letters",
    "numbers",
    "punctuation",
    "code symbols",
    "white space",
    "URLs",
    "emoji and others",
)
LATIN, LETTERS, NUMBERS, PUNCTUATION, CODE, SPACE, URLS, OTHERS = range(len(CLASSES))
FOLLOWS = -1
"""In place of a class: that of the character before."""
CODE_SYMBOLS = frozenset("#$%&*+/<=>@[\\]^_`{|}~")
URL = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:https?|ftp)://|www\.)[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]*[A-Za-z0-9\-_~/#@$&*+=%]",
    re.IGNORECASE | re.ASCII,
)
"""An address as RFC 3986 writes it; what closes a sentence or a bracket behind one is not part of it."""


def character_classes(text: str) -> NDArray[np.int8]:
    """Return the place in `CLASSES` of each character of a text."""
    different, places = np.unique(code_points(text), return_inverse=True)
    found = np.array([class_of(chr(code)) for code in different.tolist()], np.int8)[places]
    before = np.maximum.accumulate(np.where(found == FOLLOWS, -1, np.arange(len(found))))
    found = np.where(before < 0, np.int8(OTHERS), found[before])
    for match in URL.finditer(text):
        found[match.start() : match.end()] = URLS
    return found


@cache
def class_of(character: str) -> int:
    """Return the class of a character by itself; `FOLLOWS` where it has none."""
    category = unicodedata.category(character)
    if category[0] == "M" or category == "Cf":
        return FOLLOWS
    if character.isspace():
        return SPACE
    if character in CODE_SYMBOLS:
        return CODE
    if category[0] == "L":
        plain = unicodedata.normalize("NFKD", character)[0]
        return LATIN if "LATIN" in unicodedata.name(plain, "") else LETTERS
    return {"N": NUMBERS, "P": PUNCTUATION}.get(category[0], OTHERS)


def character_bytes(text: str) -> NDArray[np.int64]:
    """Return how many bytes of UTF-8 each character of a text has."""
    codes = code_points(text)
    return np.ones(len(codes), np.int64) + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)


def code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
