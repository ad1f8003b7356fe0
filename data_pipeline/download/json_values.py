"""A sequence of JSON values in a text of any length, its arrays opened, in memory for one value."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from data_pipeline.core.text import excerpt
from data_pipeline.documents import MAX_DOCUMENT_BYTES
from data_pipeline.download.records import Rejected
from data_pipeline.download.streams import advice

DECODER = json.JSONDecoder()
SPACE = re.compile("[ \t\r\n\ufeff]*")
"""White space that may stand between values; a byte order mark does where files were joined."""

LONGEST_TOKEN = 16
"""A fault so near to the end of a text may be that of a token that is cut there (``-Infinity``, two escapes)."""

SHOWN = 400
"""Characters of a broken line that are looked at for a message."""


FEW_CHARACTERS = 1 << 23
"""A text of so many characters holds no more values than memory has room for, whatever they are."""
MOST_VALUES = 1 << 24
"""Numbers, lists and the like within one value, about: each is 8 to 100 bytes in memory, and two characters of JSON."""
STRING = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)', re.DOTALL)
"""One that is cut at the end of the text, too."""


@dataclass(slots=True)
class Start:
    """Where the next value may begin."""

    char: str
    """Its first character; empty at the end of the text."""
    lines: int
    """Line ends before it."""
    lead: str | None
    """White space before it in its line; None where something else stands before it there."""


class Window:
    """The rest of a text, which comes in blocks, that is not parsed yet."""

    def __init__(self, blocks: Iterator[str], has_bad_bytes: Callable[[], bool]) -> None:
        self._blocks, self._has_bad_bytes = blocks, has_bad_bytes
        self._text, self._at = "", 0
        self._ended = False

    def more(self) -> bool:
        """Read at least as much again as is there, so that parsing anew costs a constant factor; False at the end."""
        blocks, wanted = [self._text[self._at :]], max(1, len(self._text) - self._at)
        while wanted > 0 and not self._ended:
            block = next(self._blocks, None)
            self._ended = block is None
            blocks.append(block or "")
            wanted -= len(block or "")
        grown = sum(map(len, blocks[1:])) > 0
        self._text, self._at = "".join(blocks), 0
        return grown

    def peek(self) -> Start:
        """Go to the next character that is no white space."""
        lines, lead = 0, None
        while True:
            end = SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches always
            space, self._at = self._text[self._at : end], end
            if "\n" in space:
                lines, lead = lines + space.count("\n"), space[space.rfind("\n") + 1 :]
            elif lead is not None:
                lead += space
            if self._at < len(self._text) or not self.more():
                return Start(self._text[self._at : self._at + 1], lines, lead)

    def skip(self) -> None:
        """Go past the character that `peek` showed."""
        self._at += 1

    def value(self) -> Any:
        """Return the value that begins here.

        Raises:
            UnicodeDecodeError: there are bytes in it that are no UTF-8; it is skipped.
            TooLarge: it is longer than a document may be, or holds too many others.
            ValueError, RecursionError: it is broken.
        """
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._may_be_cut(error):
                    raise
                if len(self._text) - self._at > 2 * MAX_DOCUMENT_BYTES:
                    raise TooLarge(f"a value of more than {MAX_DOCUMENT_BYTES} bytes") from None
                refuse_many_values(self._text, self._at)  # all that is there is a part of it
                if not self.more():
                    raise
                continue
            if end < len(self._text) or not self.more():  # a number may continue
                start, self._at = self._at, end
                if self._has_bad_bytes():
                    refuse_bad_bytes(self._text[start:end])
                return value

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Return whether more text could mend a fault."""
        at_end = error.pos >= len(self._text) - LONGEST_TOKEN
        return at_end or error.msg.startswith("Unterminated string")

    def skip_line(self) -> str:
        """Go to the end of this line; the beginning of what stood there."""
        skipped = ""
        while (end := self._text.find("\n", self._at)) < 0:
            skipped = skipped or self._text[self._at : self._at + SHOWN]
            self._at = len(self._text)
            if not self.more():
                return skipped
        skipped, self._at = skipped or self._text[self._at : min(end, self._at + SHOWN)], end
        return skipped


class TooLarge(ValueError):
    """A value that is longer than a document may be, or would take too much memory."""


def refuse_many_values(text: str, start: int = 0) -> None:
    """Raise `TooLarge` if JSON from ``start`` on, be it cut, would become more than `MOST_VALUES` objects of Python's.

    A short text can: ``[[],[],...]`` of 256 MB takes 7 GB.
    """
    if len(text) - start <= FEW_CHARACTERS or commas_and_brackets(text, start) <= MOST_VALUES:
        return
    if commas_and_brackets(STRING.sub("", text[start:])) > MOST_VALUES:
        raise TooLarge(f"a value that holds more than {MOST_VALUES:,} others")


def commas_and_brackets(text: str, start: int = 0) -> int:
    return sum(text.count(sign, start) for sign in ",[{")


def can_be_encoded(text: str) -> bool:
    """Return whether all of ``text`` is Unicode: a byte that wasn't UTF-8 is half a surrogate pair in it."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def refuse_bad_bytes(text: str) -> None:
    """Raise UnicodeDecodeError if ``text``, decoded with ``surrogateescape``, was no UTF-8."""
    text.encode("utf-8", "surrogateescape").decode()


def json_values(
    blocks: Iterator[str], has_bad_bytes: Callable[[], bool] = lambda: False
) -> Iterator[tuple[int | None, Any] | Rejected]:
    """(row, value) of all values of a text, one after the other, and of the elements of arrays among them.

    Rows count as the lines of JSON lines do, broken and blank ones included; elements, and values that share a
    line, count one each. A single value that is no element has no row (None). What is broken is rejected, and the
    reading continues with the next line; in an array with the next one that begins as the lines of elements do.

    Args:
        has_bad_bytes: whether there was anything until now that is no UTF-8; ``surrogateescape`` decodes it.
    """
    found = numbered(Window(blocks, has_bad_bytes))
    held: list[tuple[int, Any, bool]] = []
    fault = None
    try:
        held += islice(found, 1)
        held += islice(found, 1)
    except Exception as error:  # after what came before it
        fault = error
    is_alone = len(held) == 1 and not held[0][2] and not fault
    for row, value, _ in chain(held, found):
        known = None if is_alone else row
        if isinstance(value, Rejected):
            value.row = known
            yield value
        else:
            yield known, value
    if fault:
        raise fault


def numbered(window: Window) -> Iterator[tuple[int, Any, bool]]:
    """(row, value or Rejected, whether it is an element of an array)."""
    row, counted = 0, False  # the next row; whether a row of this line was counted
    in_array = after_element = is_there = False
    while (start := window.peek()).char or in_array:
        is_there = True
        if not in_array and start.lines:
            row, counted = row + start.lines - counted, False
        if not in_array and start.char == "[":
            in_array, after_element = True, False
            window.skip()
        elif in_array and start.char == "]":
            in_array = False
            window.skip()
        elif in_array and after_element and start.char == ",":
            after_element = False
            window.skip()
        elif in_array and (after_element or not start.char):
            yield row, Rejected(row, "bad_json", f"no comma or ] after element {row - 1}"), True
            row, counted, in_array = row + 1, True, False
        else:
            value, is_whole = value_at(window)
            yield row, value, in_array
            row, counted, after_element = row + 1, True, is_whole
            if in_array and not is_whole and not find_element(window, start.lead):
                return
    if not is_there:
        yield row, Rejected(None, "empty", ""), False


def value_at(window: Window) -> tuple[Any, bool]:
    """Return the value that begins here, and whether its end was found; else the rest of the line is skipped."""
    try:
        return window.value(), True
    except UnicodeDecodeError as error:
        return not_utf8(error, "value"), True
    except (ValueError, RecursionError) as error:
        line = window.skip_line()
        if not can_be_encoded(line):
            return Rejected(None, "not_utf8", f"in a broken line: {shown(line)}"), False
        reason = "too_large" if isinstance(error, TooLarge) else "bad_json"
        return Rejected(None, reason, f"{getattr(error, 'msg', error)}: {shown(line)}"), False


def find_element(window: Window, lead: str | None) -> bool:
    """Go to the next line where an element of the array may begin, after a broken one; False if there is none.

    Args:
        lead: white space before the broken one in its line, by which elements are distinguished from what is in them.
    """
    while (start := window.peek()).char:
        if start.lead is not None:
            if start.char in "{[" and lead in (None, start.lead):
                return True
            if start.char == "]" and len(start.lead) <= len(lead or ""):
                return True
        window.skip_line()
    return False


def shown(line: str) -> str:
    return excerpt(line.encode("utf-8", "replace").decode(), 80)


def not_utf8(error: UnicodeDecodeError, where: str) -> Rejected:
    """Return the rejection of a line or a value for its first byte that is no UTF-8."""
    byte = error.object[error.start]
    return Rejected(
        None, "not_utf8", f"byte 0x{byte:02x} at offset {error.start} of the {where}; {advice(b'')}"
    )
