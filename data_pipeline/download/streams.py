"""Bytes of a file on their way to a reader: decompressed, recoded to UTF-8, and never more than a limit."""

from __future__ import annotations

import bz2
import codecs
import errno
import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import zstandard

from data_pipeline.core.text import first_line, human_bytes

BUFFER_BYTES = 1 << 17
PACKED_BLOCK_BYTES = 1 << 16
ZSTD_BLOCK_BYTES = 1 << 10
"""One call unpacks all that it is given: four bytes may hold 128 KiB, so it is given little."""

ZSTD_WINDOW_BYTES = 1 << 31
"""As far back as ``zstd --ultra --long=31`` looks."""

FREE_BYTES = 100_000_000
"""Bytes that any file may expand to, however small it is."""

CODEC_FAULTS = (
    pa.ArrowException,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zstandard.ZstdError,
    zipfile.BadZipFile,
    tarfile.TarError,
    NotImplementedError,
    OSError,
)
"""Exceptions that decompressors raise for bytes that aren't theirs; see `is_fault_of_disk` for OSError."""


class ExpandsTooFar(Exception):
    """A compressed file holds more than its limit: a decompression bomb, or a limit set too low."""


def is_fault_of_disk(error: BaseException) -> bool:
    """Return whether reading again may work. A codec's OSError has no number, or that of a seek to where nothing is."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


class Limit:
    """Counts what comes out of one layer of a compressed file or archive of ``stored`` bytes."""

    def __init__(self, stored: int, max_expansion: float, max_unpacked_bytes: int) -> None:
        by_ratio = max(FREE_BYTES, int(stored * max_expansion))
        self.most = min(by_ratio, max_unpacked_bytes)
        self.left = self.most
        self._setting = "max_expansion" if by_ratio < max_unpacked_bytes else "max_unpacked_bytes"

    @property
    def exceeded(self) -> bool:
        return self.left < 0

    def take(self, count: int) -> None:
        """Note ``count`` bytes more.

        Raises:
            ExpandsTooFar: there are more than `most` now.
        """
        self.left -= count
        if self.left < 0:
            raise ExpandsTooFar(self.explanation)

    @property
    def explanation(self) -> str:
        """The message for a file that passes the limit."""
        return f"holds more than {human_bytes(self.most)}; {self._setting} of its source allows more"


class Limits:
    """The limits of one input file of ``stored`` bytes: one of each layer of packing, however many members it has.

    All that comes out of a layer (the file's own compression, an archive, the compression of its members, ...) counts
    together, so that many small members can't hold more than a single one may.
    """

    def __init__(self, stored: int, max_expansion: float, max_unpacked_bytes: int) -> None:
        self._make = partial(Limit, stored, max_expansion, max_unpacked_bytes)
        self._layers: dict[str, Limit] = {}

    def of(self, layer: str) -> Limit:
        if layer not in self._layers:
            self._layers[layer] = self._make()
        return self._layers[layer]

    @property
    def exceeded(self) -> bool:
        return any(limit.exceeded for limit in self._layers.values())


class Limited(io.RawIOBase):
    """A stream that counts what is read of it against a `Limit`, at most ``block`` bytes at once."""

    def __init__(self, stream: Any, limit: Limit, block: int = 1 << 20) -> None:
        self._stream, self._limit, self._block = stream, limit, block

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(min(len(buffer), self._block, max(1, self._limit.left)))
        buffer[: len(data)] = data
        self._limit.take(len(data))
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


class Decompressor(Protocol):
    """One member of a compressed file, with the interface of `bz2.BZ2Decompressor`."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class Inflate:
    """A `Decompressor` of one gzip member."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._zlib.decompress(data or self._zlib.unconsumed_tail, max_length)


class Unzstd:
    """A `Decompressor` of one zstd frame, which may give more than ``max_length``."""

    needs_input = True

    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()

    @property
    def eof(self) -> bool:
        return bool(self._frame.eof)

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._frame.decompress(data)


DECOMPRESSORS: dict[str, tuple[Callable[[], Decompressor], int]] = {
    "gzip": (Inflate, PACKED_BLOCK_BYTES),
    "zstd": (Unzstd, ZSTD_BLOCK_BYTES),
    "bz2": (bz2.BZ2Decompressor, PACKED_BLOCK_BYTES),
    "xz": (lzma.LZMADecompressor, PACKED_BLOCK_BYTES),
}
"""Decompressors by compression: what unpacks one member, and the bytes that it is given at once."""


class Unpacked:
    """The content of a compressed file of one or more members, one after the other as ``cat`` joins them.

    The file ends where its last byte is: what follows a member is another member, padding with zeros, or a fault.
    Of a cut file, all that can be had comes before the fault.

    Raises:
        EOFError, or another of `CODEC_FAULTS`: when read, where the file is cut or broken.
    """

    def __init__(self, stream: io.BufferedReader, compression: str) -> None:
        self._stream = stream
        self._compression = compression
        self._open, self._block = DECOMPRESSORS[compression]
        self._member: Decompressor | None = None
        self._waiting = b""
        self._ready = memoryview(b"")

    def read(self, size: int) -> memoryview:
        if not self._ready:
            self._ready = memoryview(self._unpack(size))
        out, self._ready = self._ready[:size], self._ready[size:]
        return out

    def _unpack(self, size: int) -> bytes:
        """Return the next bytes, about ``size`` of them; none at the end."""
        while member := self._member or self._next_member():
            data, ended = b"", False
            if member.needs_input:
                data, self._waiting = self._waiting or self._stream.read(self._block), b""
                ended = not data
            out = member.decompress(data, size)
            if member.eof:
                self._member, self._waiting = None, member.unused_data
            if out:
                return out
            if ended and not member.eof:
                raise EOFError(f"the {self._compression} file is cut: its end mark is missing")
        return b""

    def _next_member(self) -> Decompressor | None:
        """Return what unpacks the member that begins here; None at the end of the file."""
        while not (waiting := self._waiting.lstrip(b"\0")):  # some tools pad with zeros
            self._waiting = self._stream.read(self._block)
            if not self._waiting:
                return None
        self._waiting = waiting
        self._member = self._open()
        return self._member

    def close(self) -> None:
        self._stream.close()


MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
ASCII_AS = {
    rb"([^\0]\0\0\0){2}": "utf-32-le",
    rb"(\0\0\0[^\0]){2}": "utf-32-be",
    rb"([^\0]\0){4}": "utf-16-le",
    rb"(\0[^\0]){4}": "utf-16-be",
}


def looks_like(head: bytes) -> str | None:
    """Return the encoding that the first bytes of a text show by a mark, or by the NULs beside ASCII; None where it may
    be UTF-8."""
    marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    return marked or next((name for form, name in ASCII_AS.items() if re.match(form, head, re.DOTALL)), None)


def advice(head: bytes) -> str:
    """Return what to do about a file that is not UTF-8 and begins with ``head``."""
    if found := looks_like(head):
        return f"looks like {found.upper()}, so set the source's encoding to {found}"
    return "set the source's encoding to what it is in: cp1252, latin-1, ..."


class Recoded(io.RawIOBase):
    """A stream in some encoding, as UTF-8.

    Raises:
        UnicodeDecodeError: when read, after all that stands before the fault.
    """

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream = stream
        self._encoding = encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready = b""
        self._fault: UnicodeDecodeError | None = None
        self._ended = False
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            if self._fault:
                raise self._fault
            self._refill()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _refill(self) -> None:
        block = self._stream.read(BUFFER_BYTES)
        self._read += len(block)
        try:
            text = self._decoder.decode(block, final=not block)
            self._ended = not block
        except UnicodeDecodeError as error:
            rest = len(error.object) - error.start
            error.reason = f"byte 0x{error.object[error.start]:02x} at offset {self._read - rest}"
            self._fault = error
            text = self._before_fault(block[: max(0, len(block) - rest)])
        except UnicodeError as error:  # no byte is at fault: UTF-16 without a byte order mark
            text = ""
            self._fault = UnicodeDecodeError(self._encoding, b"?", 0, 1, first_line(error))
        self._ready = text.encode("utf-8", "surrogatepass")

    def _before_fault(self, block: bytes) -> str:
        try:
            return self._decoder.decode(block)  # its state is as before the fault
        except UnicodeError:  # nothing of it can be read: UTF-16 without a byte order mark again
            return ""


def buffered(raw: Any) -> io.BufferedReader:
    """Return a stream with `readline`, read in large blocks."""
    return io.BufferedReader(raw, BUFFER_BYTES)


def decompressed(
    stream: Path | io.BufferedReader, compression: str | None, limit: Limit
) -> io.BufferedReader:
    """Return the content of ``stream`` (a path or a file object), counted against ``limit`` if it is compressed."""
    if isinstance(stream, Path):
        stream = io.BufferedReader(stream.open("rb", 0), BUFFER_BYTES)
    if compression is None:
        return stream
    return buffered(Limited(Unpacked(stream, compression), limit))
