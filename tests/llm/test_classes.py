"""Classes of characters: each has one, and an emoji or a letter with its marks is never torn apart."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from llm.score.classes import CLASSES, URL, character_bytes, character_classes

TEXTS: list[str] = [
    *json.loads((Path(__file__).parents[1] / "ordinary_texts.json").read_text("utf-8")).values(),
    "def f(x):\r\n    return {x: 1.5e3}  # ½ \x00\x1b\ufeff\u2028\U000e0001\U0010ffff",
    "👩‍👩‍👧‍👦 1️⃣ 🇩🇪 👍🏽",
    "",
]


def by_hand(text: str) -> list[str]:
    """The class of each character, one at a time, by the table in the module's docstring."""
    inside = {place for match in URL.finditer(text) for place in range(*match.span())}
    found: list[str] = []
    last = "emoji and others"
    for place, one in enumerate(text):
        category = unicodedata.category(one)
        if category.startswith("M") or category == "Cf":
            pass
        elif one.isspace():
            last = "white space"
        elif one in "#$%&*+/<=>@[\\]^_`{|}~":
            last = "code symbols"
        elif category.startswith("L"):
            name = unicodedata.name(unicodedata.normalize("NFKD", one)[0], "")
            last = "Latin letters" if "LATIN" in name else "other letters"
        elif category.startswith("N"):
            last = "numbers"
        elif category.startswith("P"):
            last = "punctuation"
        else:
            last = "emoji and others"
        found.append("URLs" if place in inside else last)
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_each_character_has_the_class_that_the_table_says_and_its_own_bytes(text: str) -> None:
    assert [CLASSES[one] for one in character_classes(text)] == by_hand(text)
    assert character_bytes(text).tolist() == [len(one.encode()) for one in text]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("éÀßﬁＡʰª e\u0301x", "Latin letters"),
        ("нетنصहिन्दी ภาษาไทย 日本語カー한국어 ελ", "other letters"),
        ("می\u200cخواهم", "other letters"),
        ("0١२३Ⅳ²½1️⃣", "numbers"),
        ("!\"'(),-.:;?“»—。、؟।", "punctuation"),
        ("{}[]<>=+*/\\|&^%$#@~_`", "code symbols"),
        (" \t\r\n\u00a0\u3000\u2028", "white space"),
        ("👩‍👩‍👧‍👦🇩🇪👍🏽❤️€≤\x00\ue000", "emoji and others"),
        ("https://example.com/a_(b)?q=1#x", "URLs"),
        ("www.example.org/%E6%97%A5", "URLs"),
    ],
)
def test_text_of_all_kinds_falls_where_people_look_for_it(text: str, name: str) -> None:
    found = {CLASSES[one] for one in character_classes(text)}
    assert found - ({"white space"} if " " in text else set()) <= {name} <= found


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("see (https://example.com/a.b), or", "https://example.com/a.b"),
        ("見よhttps://example.com/日本", "https://example.com/"),
        ("<a href='http://x.y/z'>", "http://x.y/z"),
        ("At WWW.EXAMPLE.COM.", "WWW.EXAMPLE.COM"),
        ("xhttp://a.b http:// www. ftp.x", ""),
        ("مرحبا https://مثال.com", ""),
    ],
)
def test_an_address_ends_where_its_sentence_goes_on(text: str, address: str) -> None:
    classes = [CLASSES[one] for one in character_classes(text)]
    assert "".join(one for one, name in zip(text, classes, strict=True) if name == "URLs") == address
