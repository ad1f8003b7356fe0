"""Bytes of a file on their way to a reader: decompressed, recoded to UTF-8, and never more than a limit."""

from __future__ import annotations

import bz2
import codecs
import errno
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from data_pipeline.context import human_bytes
from data_pipeline.documents import first_line

BUFFER_BYTES = 1 << 17
GZIP_BLOCK_BYTES = 1 << 16
ZSTD_BLOCK_BYTES = 1 << 15
FREE_BYTES = 100_000_000
"""What any file may expand to, however small it is."""

CODEC_FAULTS = (
    pa.ArrowException,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
    NotImplementedError,
    OSError,
)
"""What decompressors raise for bytes that aren't theirs; see `is_fault_of_disk` for OSError."""


class ExpandsTooFar(Exception):
    """A compressed file holds more than its limit: a decompression bomb, or a limit set too low."""


def is_fault_of_disk(error: BaseException) -> bool:
    """Whether reading again may go well. A codec's OSError has no number, or that of a seek to where nothing is."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


class Limit:
    """Counts what comes out of a compressed file or archive of ``stored`` bytes."""

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
            raise ExpandsTooFar(
                f"holds more than {human_bytes(self.most)}; {self._setting} of its source allows more"
            )


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


class Gunzipped:
    """The content of a gzip file of one or more members. Of a cut one, all that can be had comes before the fault.

    Raises:
        EOFError, zlib.error: when read, where the file is cut or broken.
    """

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._member: Any = None
        self._waiting = b""

    def read(self, size: int) -> bytes:
        while True:
            self._waiting = self._waiting or self._stream.read(GZIP_BLOCK_BYTES)
            if self._member is None:
                self._waiting = self._waiting.lstrip(b"\0")  # some tools pad with zeros
                self._member = zlib.decompressobj(wbits=31) if self._waiting else None
            ended = not self._waiting
            out: bytes = self._member.decompress(self._waiting, size) if self._member else b""
            if self._member and self._member.eof:
                self._waiting, self._member = self._member.unused_data, None
            elif self._member:
                self._waiting = self._member.unconsumed_tail
            if out or (ended and not self._member):
                return out
            if ended:
                raise EOFError("the gzip file is cut: its end mark is missing")

    def close(self) -> None:
        self._stream.close()


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
    """A stream with `readline`, read in large blocks."""
    return io.BufferedReader(raw, BUFFER_BYTES)


def decompressed(
    stream: Path | io.BufferedReader, compression: str | None, limit: Callable[[], Limit]
) -> io.BufferedReader:
    """The content of ``stream`` (a path or a file object); ``limit`` is asked for if it is compressed."""
    if compression in ("bz2", "xz"):
        return buffered(Limited((bz2 if compression == "bz2" else lzma).open(stream), limit()))
    if isinstance(stream, Path):
        stream = io.BufferedReader(stream.open("rb", 0), BUFFER_BYTES)
    if compression is None:
        return stream
    if compression == "gzip":
        return buffered(Limited(Gunzipped(stream), limit()))
    # What Arrow has unpacked in a call that ends at a fault is lost, so calls are small.
    return buffered(Limited(pa.input_stream(stream, compression=compression), limit(), ZSTD_BLOCK_BYTES))
