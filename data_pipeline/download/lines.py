"""Lines of a text, whatever ends them, with what is wrong with them reported line by line."""

from __future__ import annotations

import io
from io import BufferedReader
from typing import Self

from data_pipeline.documents import MAX_DOCUMENT_BYTES
from data_pipeline.download.streams import advice


class TooLong(Exception):
    """A line of more characters than a document may have bytes; it was skipped."""


class TextLines:
    """The lines of a stream of UTF-8 with their ends: LF, CR LF or CR.

    Raises:
        TooLong: the next line is one; the one after it follows.
    """

    def __init__(self, stream: BufferedReader) -> None:
        self._text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        self.read = 0
        """Lines until now."""
        self.fault = ""
        """A byte that was no UTF-8, since `take_fault`."""

    def take_fault(self) -> str:
        fault, self.fault = self.fault, ""
        return fault

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_DOCUMENT_BYTES + 1)
        if not line:
            raise StopIteration
        self.read += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            while line and not line.endswith(("\n", "\r")):
                line = self._text.readline(1 << 20)
            raise TooLong(f"a line of more than {MAX_DOCUMENT_BYTES} bytes")
        if not line.isascii():
            self._look_for_fault(line)
        return line

    def _look_for_fault(self, line: str) -> None:
        try:
            line.encode()
        except UnicodeEncodeError as error:
            byte = ord(line[error.start]) - 0xDC00
            offset = len(line[: error.start].encode())
            self.fault = (
                self.fault or f"byte 0x{byte:02x} at offset {offset} of line {self.read}; {advice(b'')}"
            )
