"""Mask personal data: e-mail addresses, public IP addresses and telephone numbers become placeholders.

Conservative by intent: a number that merely might be a telephone number stays. What is found: addresses as
``name@host.tld`` (not "name at host", nor a quoted or internationalised one); IPv4 in four decimal parts and IPv6 in
any of its spellings, where the address is public (`ipaddress`: globally routable), so that neither 127.0.0.1 nor
192.168.0.1 goes, but a version of four numbers does; telephone numbers with ``+`` and a country code (8 to 15 digits,
ITU-T E.164), North American ones in groups of 3, 3, 4 with brackets, dots or hyphens, French ones in five pairs, and
those of 10 or 11 digits in groups of which the first begins with 0 (Britain, Germany, ...). Not found: numbers
written without any separator or ``+``, other national forms, extensions, and numbers spelled out. Names and postal
addresses are not looked for.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import AfterValidator

from data_pipeline.context import Config
from data_pipeline.rules.normalise import normalise

EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_%+-])?"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![\w@-])"
)
IP = re.compile(
    r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}(?![\w:]|\.\w)|[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{1,34}(?![\w:]|\.\w))"
)
COUNTRY = (
    r"(?:7|2(?:[07]|[1-69]\d)|3(?:[0-469]|[578]\d)|4(?:[013-9]|2[01])|5(?:[1-8]|[09]\d)"
    r"|6(?:[0-6]|[7-9]\d)|8(?:[1246]|[0578]\d)|9(?:[0-58]|[679]\d))"
)
"""Country codes as the ITU has given them out, but 1, whose numbers have a form of their own."""
# Possessive quantifiers: a long run of digits is read once, and a number is masked whole or not at all.
GAP = r"[ .\-/\u2010-\u2013\u00a0]"
PHONE = re.compile(
    r"(?<![\w+.,:/=#-])(?:"
    rf"\+{COUNTRY}(?:{GAP}?\(\d{{1,5}}\))?(?:{GAP}?\d{{2,}}+|{GAP}\d(?={GAP}\d\d))++"
    r"|\+1[ .-]?(?:\([2-9]\d\d\)|[2-9]\d\d)[ .-]?[2-9]\d\d[ .-]?\d{4}"
    r"|(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])[2-9]\d\d[ .-]\d{4}"
    r"|0[1-9]([ .-])\d\d(?:\1\d\d){3}"
    r"|(?:\(0\d{2,4}\)|0\d{2,4})[ /-]\d{3,4}[ -]\d{3,4}"
    r")(?![\w@]|[.,:/=-]\d|[ .-]\d\d(?!\d))"
)

UNICAST = ipaddress.ip_network("2000::/3")
"""All the IPv6 addresses that are given out for general use (IANA's registry; RFC 4291)."""


def keeps_texts_normal(placeholder: str) -> str:
    if not placeholder or placeholder != normalise(placeholder, None):
        raise ValueError("a placeholder can't be empty, nor hold space at its ends or control characters")
    return placeholder


Placeholder = Annotated[str, AfterValidator(keeps_texts_normal)]


class Masking(Config):
    """What each kind is replaced by; None leaves it alone."""

    email: Placeholder | None = "<EMAIL>"
    ip: Placeholder | None = "<IP_ADDRESS>"
    phone: Placeholder | None = "<PHONE_NUMBER>"

    def kinds(self) -> list[str]:
        """The kinds that are masked, in the order in which it is done."""
        return [kind for kind in KINDS if getattr(self, kind) is not None]

    def mask(self, kind: str, text: str) -> tuple[str, int]:
        """The text with placeholders for one kind, and how many were put in."""
        _, pattern, accept = KINDS[kind]
        return replace(pattern, text, getattr(self, kind), accept)

    def candidates(self, kind: str, texts: pa.Array) -> NDArray[np.int64]:
        """The rows that may hold something of a kind."""
        hint, _, _ = KINDS[kind]
        return np.flatnonzero(pc.match_substring_regex(texts, hint).to_numpy(zero_copy_only=False))


def replace(
    pattern: re.Pattern[str], text: str, placeholder: str, accept: Callable[[str], bool]
) -> tuple[str, int]:
    """Replace the matches that are accepted; returns how many too."""
    replaced = 0

    def put(match: re.Match[str]) -> str:
        nonlocal replaced
        if not accept(match[0]):
            return match[0]
        replaced += 1
        return placeholder

    return pattern.sub(put, text), replaced


def any_match(found: str) -> bool:
    return True


def is_public(found: str) -> bool:
    """Whether this is an IP address that anyone on the internet may have."""
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return False
    if address.version == 6 and address not in UNICAST:  # ``a::b`` is C++ and an address that nobody has
        return False
    return address.is_global and not address.is_multicast


def has_phone_digits(found: str) -> bool:
    """Whether it has as many digits as a telephone number: 8 to 15 with a country code, else 10 or 11."""
    digits = sum(map(str.isdecimal, found))
    return 8 <= digits <= 15 if found.startswith("+") else 10 <= digits <= 11


KINDS: dict[str, tuple[str, re.Pattern[str], Callable[[str], bool]]] = {
    "email": (r"[A-Za-z0-9_%+-]@[A-Za-z0-9-]+\.[A-Za-z]", EMAIL, any_match),
    "ip": (r"\d\.\d{1,3}\.\d{1,3}\.\d|[23][0-9A-Fa-f]{3}:", IP, is_public),
    "phone": (
        r"\+\d[^0-9A-Za-z]{0,2}\d|\d\)?[ .-]\d{3}[ .-]\d{4}|0[1-9][ .-]\d\d[ .-]\d\d[ .-]\d\d[ .-]\d"
        r"|0\d{2,4}\)?[ /-]\d{3,4}[ -]\d",
        PHONE,
        has_phone_digits,
    ),
}
"""By kind: where RE2 finds nothing of this first there is nothing to mask, and most texts have nothing; what is found;
and which of that is masked.
"""
