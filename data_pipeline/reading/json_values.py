"""A JSON array of any length, element by element, in memory for one element."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from data_pipeline.documents import MAX_DOCUMENT_BYTES
from data_pipeline.reading.records import Rejected

DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\r\n]*")


class Window:
    """The part of a text, which comes in blocks, that is not parsed yet."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks = blocks
        self._text, self._at = "", 0
        self._ended = False

    def more(self) -> bool:
        """Read at least as much again as is there, so that parsing anew costs a constant factor; False at the end."""
        parts, wanted = [self._text[self._at :]], max(1, len(self._text) - self._at)
        while wanted > 0 and not self._ended:
            block = next(self._blocks, None)
            self._ended = block is None
            parts.append(block or "")
            wanted -= len(block or "")
        grown = sum(map(len, parts[1:])) > 0
        self._text, self._at = "".join(parts), 0
        return grown

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._at = SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches always
            if self._at < len(self._text) or not self.more():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Go past the character that `peek` showed."""
        self._at += 1

    def value(self) -> Any:
        """The value that begins here.

        Raises:
            ValueError, RecursionError: there is none, or it is longer than a document may be.
        """
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except ValueError:
                if len(self._text) - self._at > 2 * MAX_DOCUMENT_BYTES:
                    raise ValueError(f"a value of more than {MAX_DOCUMENT_BYTES} bytes") from None
                if not self.more():
                    raise
                continue
            if end < len(self._text) or not self.more():  # a number may go on
                self._at = end
                return value


def json_values(blocks: Iterator[str]) -> Iterator[tuple[int | None, Any] | Rejected]:
    """(row, element) of the array in a text, or (None, value) if it is no array; what is broken ends it."""
    window, row = Window(blocks), 0
    try:
        if window.peek() != "[":
            yield None, window.value()
            if window.peek():
                yield Rejected(None, "bad_json", "more stands after the first value")
            return
        window.skip()
        while window.peek() != "]":
            yield row, window.value()
            row += 1
            if window.peek() == ",":
                window.skip()
            elif window.peek() != "]":
                raise ValueError(f"no comma or ] after element {row - 1}")
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        yield Rejected(row or None, "bad_json", str(error))
