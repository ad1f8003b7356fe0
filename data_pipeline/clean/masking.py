"""Mask personal data: e-mail addresses, public IP addresses and telephone numbers become placeholders.

Conservative by intent: a number that merely might be a telephone number stays. What is found: addresses as
``name@host.tld`` (not "name at host", nor a quoted one; letters of Latin, Greek and Cyrillic may stand in the host, and
at the end of the name); IPv4 in four decimal parts and IPv6 in any of its spellings, where the address is public
(`ipaddress`: globally routable), so that neither 127.0.0.1 nor 192.168.0.1 goes, but a version of four numbers does;
telephone numbers with ``+`` and a country code (8 to 15 digits, ITU-T E.164), North American ones in groups of 3, 3, 4
with brackets, dots or hyphens, French ones in five pairs, those of 10 or 11 digits in groups of which the first begins
with 0 (Britain, Germany, Japan, ...), Chinese mobile ones in groups of 3, 4, 4, and 8 to 15 digits in a row right after
a word that announces them (``tel:``, ``phone=``, and as much in Chinese and others). Not found: numbers without any of
these signs, other national forms, extensions, and numbers spelled out. Names and postal addresses are not looked for.

Only ASCII letters and digits beside it make something part of a longer word: Chinese, Japanese, Thai and others are
written without a space before an address, and so are accented letters and emoji now and then. Full-width characters,
the decimal digits of all scripts, and spaces and hyphens that don't break count as their ASCII kin.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import AfterValidator

from data_pipeline.clean.normalise import normalise
from data_pipeline.core.config import Config

# The patterns are ASCII's: ``[A-Za-z0-9]`` is a letter or digit. An underscore around a whole is Markdown's.
BEFORE = r"(?<![A-Za-z0-9])(?<![A-Za-z0-9]_)"
AFTER = r"(?![A-Za-z0-9]|_[A-Za-z0-9])"
LETTER = "À-ÖØ-öø-ɏͰ-ϿЀ-ԯ"
"""Letters beyond ASCII that addresses have: Latin, Greek, Cyrillic."""
EMAIL = re.compile(
    rf"{BEFORE}(?:[A-Za-z0-9+](?:[A-Za-z0-9._%+-]{{0,62}}[A-Za-z0-9_%+-])?"
    rf"|(?<![{LETTER}])[A-Za-z0-9{LETTER}][A-Za-z0-9._%+{LETTER}-]{{0,62}}(?<=[{LETTER}]))"
    rf"@(?:[A-Za-z0-9{LETTER}](?:[A-Za-z0-9{LETTER}-]{{0,61}}[A-Za-z0-9{LETTER}])?\.){{1,8}}"
    rf"(?:[Xx][Nn]--[A-Za-z0-9-]{{1,58}}[A-Za-z0-9]|[A-Za-z]{{2,24}}){AFTER}(?!@)",
    re.ASCII,
)
IN_ADDRESS = "".join(rf"(?<!\b[0-9A-Fa-f]{{{digits}}}:)" for digits in range(1, 5)) + "(?<!::)"
IP = re.compile(
    rf"{BEFORE}(?<![A-Za-z0-9]\.)(?:(?:\d{{1,3}}\.){{3}}\d{{1,3}}"
    rf"|{IN_ADDRESS}[23][0-9A-Fa-f]{{3}}:[0-9A-Fa-f:]{{1,34}}(?:(?<=[0-9A-Fa-f])|(?<=::))(?!:[0-9A-Fa-f:]))"
    rf"{AFTER}(?!\.[A-Za-z0-9])",
    re.ASCII,
)
COUNTRY = (
    r"(?:7|2(?:[07]|[1-69]\d)|3(?:[0-469]|[578]\d)|4(?:[013-9]|2[01])|5(?:[1-8]|[09]\d)"
    r"|6(?:[0-6]|[7-9]\d)|8(?:[1246]|[0578]\d)|9(?:[0-58]|[679]\d))"
)
"""Country codes as the ITU has given them out, but 1, whose numbers have a form of their own."""
LABEL = (
    r"(?i:tel|ＴＥＬ|telephone|telefon|telefono|telefone|téléphone|phone|cellphone|mobile|fax|ＦＡＸ|sms|callto|whatsapp"
    r"|gsm|тел|телефон)\.?[\"']?[ \t]?[:=：＝][ \t]?[\"']?(?://)?(?:%2[Bb])?"
    r"|(?:手机|手機|电话|電話|携帯|传真|傳真|전화|휴대폰|โทร|โทรศัพท์|هاتف|फ़ोन|फोन|मोबाइल)"
    r"(?:号码|號碼|番号|番號|번호)?[:=：＝是は为為 \t]{0,3}"
)
"""Words that announce a telephone number."""
# Possessive quantifiers: a long run of digits is read once, and a number is masked whole or not at all.
GAP = r"[ .\-/\u2012\u2013]"
PHONE = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    rf"(?P<label>{LABEL})\d{{8,15}}+"
    rf"|{BEFORE}(?<!\+)(?:\+{COUNTRY}(?:{GAP}?\(\d{{1,5}}\))?(?:{GAP}?\d{{2,}}+|{GAP}\d(?={GAP}\d\d))++"
    r"|\+1[ .-]?(?:\([2-9]\d\d\)|[2-9]\d\d)[ .-]?[2-9]\d\d[ .-]?\d{4}"
    r"|(?<![#-])(?<![^/]/)(?<!\d[.,:=])(?:"
    r"(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])[2-9]\d\d[ .-]\d{4}"
    r"|0[1-9]([ .-])\d\d(?:\2\d\d){3}"
    r"|(?:\(0\d{2,4}\)|0\d{2,4})[ /-]\d{3,4}[ -]\d{3,4}"
    r"|0[1-9]-\d{4}-\d{4}"
    r"|1[3-9]\d([ -])\d{4}\3\d{4}"
    r"))"
    rf"){AFTER}(?![@]|[.,:/=-]\d|[ .-]\d\d(?!\d))",
    re.ASCII,
)

UNICAST = ipaddress.ip_network("2000::/3")
"""All the IPv6 addresses that are given out for general use (IANA's registry; RFC 4291)."""


def keeps_texts_normal(placeholder: str) -> str:
    if not placeholder or placeholder != normalise(placeholder, None):
        raise ValueError("a placeholder can't be empty, nor hold space at its ends or control characters")
    return placeholder


Placeholder = Annotated[str, AfterValidator(keeps_texts_normal)]


class Masking(Config):
    """Placeholders that each kind is replaced by; None leaves it alone."""

    email: Placeholder | None = "<EMAIL>"
    """In place of e-mail addresses."""
    ip: Placeholder | None = "<IP_ADDRESS>"
    """In place of public IP addresses."""
    phone: Placeholder | None = "<PHONE_NUMBER>"
    """In place of telephone numbers."""

    def kinds(self) -> list[str]:
        """Return the kinds that are masked, in the order in which it is done."""
        return [kind for kind in KINDS if getattr(self, kind) is not None]

    def mask(self, kind: str, text: str) -> tuple[str, int]:
        """Return the text with placeholders for one kind, and how many were put in."""
        return replace(KINDS[kind], text, getattr(self, kind))

    def candidates(self, kind: str, texts: pa.Array) -> NDArray[np.int64]:
        """Return the rows that may hold something of a kind."""
        found = pc.match_substring_regex(texts, KINDS[kind].hint)
        return np.flatnonzero(found.to_numpy(zero_copy_only=False))


@dataclass(frozen=True)
class Kind:
    """How one kind of personal data is found."""

    hint: str
    """Where RE2 finds nothing of this there is nothing to mask, and most texts have nothing."""
    anchor: re.Pattern[str]
    """Stands in all that is found, and is searched quickly, for it begins with one of a few characters."""
    before: int
    """How many characters before an anchor a match begins at most."""
    after: int
    """How many characters after the anchor's end it may depend on."""
    pattern: re.Pattern[str]
    accept: Callable[[str], bool]
    """Whether to mask what `pattern` has found."""

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Find where each begins and ends that is to be masked; what `pattern` calls ``label`` is not."""
        done = at = 0
        while anchor := self.anchor.search(text, at):
            begin = max(done, anchor.start() - self.before)
            match = self.pattern.search(text, begin, anchor.end() + self.after)
            if not match:
                at = anchor.end()
                continue
            done = at = match.end()
            begin = max(match.start(), match.end("label") if "label" in self.pattern.groupindex else 0)
            if self.accept(text[begin:done]):
                yield begin, done


@cache
def ascii_kin() -> NDArray[np.uint32]:
    """Return, by code point, the ASCII character as which the patterns read it; itself where there is none."""
    table = np.arange(0x20000, dtype=np.uint32)  # no digit lies beyond
    for code in range(0x80, len(table)):
        if (digit := unicodedata.decimal(chr(code), None)) is not None:
            table[code] = ord("0") + digit
    table[0xFF01:0xFF5F] = range(0x21, 0x7F)  # full-width forms
    table[[0xA0, 0x2007, 0x202F, 0x3000]] = ord(" ")
    table[[0x2010, 0x2011]] = ord("-")
    return table


def with_ascii_kin(text: str) -> str:
    """Return a text as the patterns read it, a character for a character."""
    if text.isascii():
        return text
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    table = ascii_kin()
    return table[np.minimum(codes, len(table) - 1)].tobytes().decode("utf-32-le")


def replace(kind: Kind, text: str, placeholder: str) -> tuple[str, int]:
    """Replace what is found of a kind; returns how many too."""
    slices, done, replaced = [], 0, 0
    for begin, end in kind.find(with_ascii_kin(text)):
        slices += [text[done:begin], placeholder]
        done = end
        replaced += 1
    return "".join([*slices, text[done:]]), replaced


def any_match(found: str) -> bool:
    return True


def is_public(found: str) -> bool:
    """Return whether this is an IP address that anyone on the internet may have."""
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return False
    if address.version == 6 and address not in UNICAST:  # ``a::b`` is C++ and an address that nobody has
        return False
    return address.is_global and not address.is_multicast


def has_phone_digits(found: str) -> bool:
    """Return whether it has the digits of a telephone number: 8 to 15 with a country code or a label, else 10 or 11."""
    digits = sum(map(str.isdecimal, found))
    return 8 <= digits <= 15 if found.startswith("+") or found.isdecimal() else 10 <= digits <= 11


# Classes that RE2 reads as `with_ascii_kin` does.
DIGIT, DOT, PLUS, COLON = r"\p{Nd}", "[.．]", "[+＋]", "[:：]"
BREAK = r"[ .\-/．－／\x{a0}\x{2007}\x{202f}\x{3000}\x{2010}-\x{2013}]"
BRACKET = "[)）]"
WIDE = r"A-Za-z0-9Ａ-Ｚａ-ｚ\p{Nd}"
KINDS: dict[str, Kind] = {
    "email": Kind(
        hint=rf"[{WIDE}{LETTER}_%+＿％＋－-][@＠][{WIDE}{LETTER}－\x{{2010}}\x{{2011}}-]+{DOT}[A-Za-zＡ-Ｚａ-ｚ]",
        anchor=re.compile(rf"@(?=[A-Za-z0-9{LETTER}-]+\.[A-Za-z0-9{LETTER}])"),
        before=66,
        after=640,
        pattern=EMAIL,
        accept=any_match,
    ),
    "ip": Kind(
        hint=rf"{DIGIT}{DOT}{DIGIT}{{1,3}}{DOT}{DIGIT}{{1,3}}{DOT}{DIGIT}"
        rf"|(?:[23]|[^\x00-\x7f])[0-9A-Fa-fＡ-Ｆａ-ｆ\p{{Nd}}]{{3}}{COLON}",
        anchor=re.compile(
            r"[0-9](?:\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}|(?<=[23])[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{1,34})"
        ),
        before=3,
        after=3,
        pattern=IP,
        accept=is_public,
    ),
    "phone": Kind(
        hint=rf"{PLUS}{DIGIT}[^0-9A-Za-z]{{0,2}}{DIGIT}|{DIGIT}{BRACKET}?{BREAK}{DIGIT}{{3,4}}{BREAK}{DIGIT}{{3}}"
        rf"|{DIGIT}{BREAK}{DIGIT}{{2}}{BREAK}{DIGIT}{{2}}{BREAK}{DIGIT}{{2}}{BREAK}{DIGIT}|(?:{LABEL}){DIGIT}{{8}}",
        anchor=re.compile(rf"[0-9](?:[0-9()]|{GAP}){{7,}}+"),
        before=40,
        after=4,
        pattern=PHONE,
        accept=has_phone_digits,
    ),
}
