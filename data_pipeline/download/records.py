"""One record of a source: a document's text with what its file has on it, or the reason why it can't be used."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.core.text import finite
from data_pipeline.documents import MAX_DOCUMENT_BYTES

MAX_META_BYTES = 1 << 16
"""A document's ``meta`` stays below this, as JSON."""


@dataclass(slots=True)
class Text:
    """A document as read: its row in the file (None where the file is the document), text and fields kept of it."""

    row: int | None
    text: str
    meta: Mapping[str, Any] | None = None
    member: str = ""
    """The file's path within its archive, if it is in one."""
    size: int = field(default=0, compare=False)
    """Bytes of ``text`` in UTF-8."""


@dataclass(slots=True)
class Rejected:
    """A record (or, where ``row`` is None, a file) that can't be used, and why."""

    row: int | None
    reason: str
    detail: str
    member: str = ""


Record = Text | Rejected


def whole(row: int | None, text: str, meta: Mapping[str, Any] | None = None) -> Record:
    """Return ``text`` as a document, if it is one: not empty, of bounded size, free of NUL, and UTF-8 can hold it.

    A NUL stands in no text: it is binary data or another encoding, read wrongly. Mojibake (text that was decoded
    wrongly before it came here) can't be distinguished from text without guessing, so it passes.
    """
    if not text:
        return Rejected(row, "empty", "")
    meta = finite(meta)
    if text.isascii():
        size = len(text)
    else:
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:  # half a surrogate pair, from an escape in JSON
            return Rejected(row, "not_utf8", f"lone surrogate at character {error.start}")
    if size > MAX_DOCUMENT_BYTES:
        return Rejected(row, "too_large", f"{size} bytes")
    if "\0" in text:
        return Rejected(row, "nul_bytes", f"NUL at character {text.index(chr(0))}: binary, or not UTF-8?")
    if meta and len(json.dumps(meta, allow_nan=False)) > MAX_META_BYTES:
        return Rejected(row, "meta_too_large", f"{', '.join(meta)} hold more than {MAX_META_BYTES} bytes")
    return Text(row, text, meta, size=size)


def not_in(encoding: str) -> str:
    """Return the reason for which a text is rejected that isn't in its encoding."""
    return "not_utf8" if codecs.lookup(encoding).name == "utf-8" else f"not_{encoding}"


def document(row: int | None, value: Any, text_field: str, meta: Mapping[str, Any] | None = None) -> Record:
    """Return the document whose text is ``value``: a string, bytes (which must be UTF-8), or the fault that it gave."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            value = error
    if isinstance(value, str):
        return whole(row, value, meta)
    if isinstance(value, UnicodeDecodeError):
        byte = value.object[value.start]
        return Rejected(row, "not_utf8", f"byte 0x{byte:02x} at offset {value.start} of the text")
    return Rejected(row, "field_not_text", f"{text_field!r} holds {type(value).__name__}")


MISSING = object()
"""Stands for the value of a field that is not there."""


def find(value: Mapping[str, Any], path: str) -> Any:
    """Return the field ``path`` of a parsed object, or `MISSING`: the one of this name, else the one at this dotted
    path."""
    if path in value:
        return value[path]
    at = path.find(".")
    while at > 0:
        inner = value.get(path[:at])
        if isinstance(inner, Mapping) and (found := find(inner, path[at + 1 :])) is not MISSING:
            return found
        at = path.find(".", at + 1)
    return MISSING


def pick(row: int | None, value: Any, text_field: str, meta_fields: Sequence[str] = ()) -> Record:
    """Return the document in one parsed object: its text, and the fields to keep where it has them."""
    if not isinstance(value, dict):
        return Rejected(row, "not_an_object", f"found {type(value).__name__}")
    text = find(value, text_field)
    if text is MISSING:
        return Rejected(row, "missing_field", f"no field {text_field!r} among {list(value)[:8]}"[:300])
    return document(row, text, text_field, kept(value, meta_fields) if meta_fields else None)


def kept(values: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any] | None:
    """Return the fields that are there, as JSON has them: numbers stay numbers, times become ISO text, bytes text if
    they are UTF-8."""
    found = {name: find(values, name) for name in fields}
    return {
        name: kept
        for name, value in found.items()
        if value is not MISSING and (kept := plain(value)) is not None
    } or None


def plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it; None where it can't."""
    if isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    if value is None or isinstance(value, UnicodeDecodeError):
        return None
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
