"""The members of ``.zip`` and ``.tar`` archives, read in place: nothing is ever unpacked to a path.

So no member can leave a folder; one whose name tries to (absolute, or with ``..``) is rejected all the same, as its
name is to be part of a document's id. Hidden files and files without a known suffix are passed over and counted, as in
a folder on disk. All that comes out of an archive counts against one limit. Archives that were joined (``cat``) are
read to the last.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from io import BufferedReader
from typing import Any

from data_pipeline.core.text import first_line
from data_pipeline.download.formats import has_known_suffix, is_archive, suffix_of
from data_pipeline.download.records import Rejected
from data_pipeline.download.streams import (
    BUFFER_BYTES,
    CODEC_FAULTS,
    Limit,
    Limited,
    buffered,
    is_fault_of_disk,
)

MAX_NAME_CHARACTERS = 1000
MAX_NAME_BYTES = 1 << 20
NAME_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
"""Members that only hold the next one's name; `tarfile` holds them in memory."""

LINK = ("link_or_device", "no file of its own")


@dataclass(frozen=True)
class Member:
    """A file within an archive."""

    stream: BufferedReader


Entry = tuple[int, str | None, Member | tuple[str, str]]
"""A member: the number of its archive among those joined in the file, its name, and its content, or the reason and the
detail why it has none that can be read. A fault of the archive itself has no name (None)."""


def members(
    stream: BufferedReader, suffix: str, limit: Limit, passed_over: Counter[str], default: str | None = None
) -> Iterator[tuple[str, Member | Rejected]]:
    """(name, content) of each member with a known suffix, in the order of the archive.

    A content must be read before the next is asked for. ``stream`` of a ``.zip`` must be seekable.

    Args:
        passed_over: counts members that are passed over by suffix.
        default: the format of members whose names have none.
    """
    seen: set[bytes] = set()
    for index, name, member in zip_entries(stream, limit) if suffix == ".zip" else tar_entries(stream, limit):
        if name is None:
            assert isinstance(member, tuple)
            yield "", Rejected(None, *member)
            continue
        shown = printable(name)[:MAX_NAME_CHARACTERS]
        refusal = refuse(name, default) or (member if isinstance(member, tuple) else None)
        if not refusal and (reason := why_not_read(name, default)):
            passed_over[reason] += 1
            continue
        if not refusal and not (unused := unused_name(shown, index, seen)):
            refusal = "repeated_name", "the archive holds this name twice; the first was read"
        if refusal:
            yield shown, Rejected(None, *refusal, member=shown)
        else:
            assert isinstance(member, Member)
            yield unused, member


def refuse(name: str, default: str | None) -> tuple[str, str] | None:
    """Return why no member of this name is read (reason, detail), if so."""
    if is_unsafe(name):
        return "unsafe_name", "a path that is absolute, leaves the folder or is too long"
    if is_archive(name) and not why_not_read(name, default):
        return "nested_archive", "an archive within an archive is not opened: unpack it"
    return None


def why_not_read(name: str, default: str | None) -> str | None:
    """Return why a member is not looked at, as such members are counted; None where it is read."""
    if is_hidden(name):
        return "hidden"
    return None if has_known_suffix(name, default) else suffix_of(name)


def unused_name(name: str, index: int, seen: set[bytes]) -> str:
    """Return ``name`` if no member had it, else one made of it where the archive is not the first of its file; else
    empty."""
    for one in (name, f"{name}~{index + 1}")[: 2 if index else 1]:
        digest = blake2b(one.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            return one
    return ""


def is_unsafe(name: str) -> bool:
    """Return whether a member's name would lead out of a folder on some system, or can't be part of an id."""
    parts = name.replace("\\", "/").split("/")
    has_drive = len(parts[0]) > 1 and parts[0][1] == ":"
    control = any(character < " " for character in name)
    return parts[0] == "" or ".." in parts or has_drive or control or len(name) > MAX_NAME_CHARACTERS


def is_hidden(name: str) -> bool:
    """Return whether the file or a folder above it is hidden (macOS adds ``__MACOSX/._name`` to archives)."""
    return any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in name.split("/"))


def printable(name: str) -> str:
    """Return ``name`` with what isn't UTF-8 in it as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


class Header(tarfile.TarInfo):
    """A tar header that is read strictly: `tarfile` takes a broken one for the end of the archive.

    A class, of which `tarfile` asks for headers, is the state of one reading.
    """

    ended = False
    """Whether zeros, which end an archive, came last."""
    archive = 0
    """Archives that have ended before this header's."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
        if not buf and cls.ended:
            raise tarfile.EmptyHeaderError("the end of the file")  # type: ignore[attr-defined]
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros
            cls.ended = True
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no header where one should be: {error}") from error
        if cls.ended:
            cls.ended, cls.archive = False, cls.archive + 1
        if header.type in NAME_TYPES and header.size > MAX_NAME_BYTES:
            raise tarfile.ReadError(f"a name of {header.size} bytes")
        return header


TAR_BLOCK_BYTES = 1 << 16
"""Bytes of a member that are lost, at most, before a fault."""


class Available:
    """A stream whose `read` gives what is there, so that nothing is lost to a fault behind it."""

    def __init__(self, stream: BufferedReader) -> None:
        self.read = stream.read1


def tar_entries(stream: BufferedReader, limit: Limit) -> Iterator[Entry]:
    """Yield the members of a tar, and of those that follow it in the file, read in one pass."""
    source: Any = Available(stream)

    class OfThis(Header):
        """The state of this reading."""

    with tarfile.open(
        fileobj=source, mode="r|", bufsize=BUFFER_BYTES, tarinfo=OfThis, errorlevel=0, ignore_zeros=True
    ) as archive:
        for entry in archive:
            archive.members = []  # type: ignore[attr-defined]  # else they all stay in memory
            if entry.isfile():
                content = Limited(archive.extractfile(entry), limit, TAR_BLOCK_BYTES)
                yield OfThis.archive, entry.name, Member(buffered(content))
            elif not entry.isdir():
                yield OfThis.archive, entry.name, LINK
    while stream.read1(BUFFER_BYTES):  # to the end, where the compression has its checksum
        pass


END_OF_ZIP = b"PK\5\6"
START_OF_ZIP = b"PK\3\4"
END_BYTES = 22
"""Bytes of a zip's end record, without its comment."""

MAX_JOINED = 1000
"""Zips in one file that are told apart."""

ZIP_BLOCK_BYTES = 1 << 12

PADDING = b"\0\r\n\x1a "


class Front(io.RawIOBase):
    """The first ``size`` bytes of a seekable stream."""

    def __init__(self, stream: BufferedReader, size: int) -> None:
        self._stream, self._size, self._at = stream, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._at)
        data = self._stream.read(min(len(buffer), max(0, self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def zip_entries(stream: BufferedReader, limit: Limit) -> Iterator[Entry]:
    """Yield the members of a zip, and of those that stand before it in the file.

    `zipfile` takes the last directory for that of the whole file; what else stands there is looked for here.
    """
    archives, faults = zip_archives(stream)
    for index, archive in enumerate(archives):
        with archive:
            for entry in archive.infolist():
                if not entry.filename.endswith("/"):
                    yield index, entry.filename, open_zipped(archive, entry, limit)
    yield from ((0, None, ("unreadable_file", fault)) for fault in faults)


def zip_archives(stream: BufferedReader) -> tuple[list[zipfile.ZipFile], list[str]]:
    """Return the archives that are joined in a file, in order, and what is to be said of bytes that belong to none.

    Raises:
        zipfile.BadZipFile: there is none at the end.
    """
    archives: list[zipfile.ZipFile] = []
    size = end = stream.seek(0, io.SEEK_END)
    trail = tail(stream, end).rpartition(END_OF_ZIP)[2][END_BYTES - len(END_OF_ZIP) :]
    faults = []
    while True:
        try:
            archives.insert(0, zipfile.ZipFile(front(stream, end) if archives else stream))
        except zipfile.BadZipFile:
            if not archives:
                raise
            break
        before, end = end, first_byte(archives[0])
        if not 0 < end < before or END_OF_ZIP not in tail(stream, end) or len(archives) == MAX_JOINED:
            break
    stream.seek(0)
    if (
        0 < end < size and stream.read(len(START_OF_ZIP)) == START_OF_ZIP
    ):  # else a program that unpacks itself
        faults.append(f"the first {end} bytes belong to no archive: one that is cut?")
    comment = archives[-1].comment
    if rest := trail[len(comment) :].strip(PADDING):
        faults.append(f"{len(rest)} bytes follow the end of the archive")
    return archives, faults


def front(stream: BufferedReader, size: int) -> BufferedReader:
    return buffered(Front(stream, size))


def first_byte(archive: zipfile.ZipFile) -> int:
    """Find where an archive begins in its file."""
    return min((entry.header_offset for entry in archive.infolist()), default=archive.start_dir)


def tail(stream: BufferedReader, end: int) -> bytes:
    """Read what stands before ``end``, as far as the end record of a zip may begin."""
    start = stream.seek(max(0, end - END_BYTES - (1 << 16)))
    return stream.read(end - start)


METHODS = zipfile.compressor_names | {93: "zstd", 95: "xz"}  # type: ignore[attr-defined]
WITHOUT_LIMIT = (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
"""Methods of which `zipfile` unpacks all that it has read at once, so that it is to read little."""


def open_zipped(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: Limit) -> Member | tuple[str, str]:
    """Return a member's content, or the reason and the detail why it can't be read."""
    if entry.flag_bits & 1:
        return "encrypted", "its content needs a password"
    if (entry.external_attr >> 16) & 0o170000 == 0o120000:
        return LINK
    try:
        content = archive.open(entry)
    except NotImplementedError:
        method = METHODS.get(entry.compress_type, "unknown")
        return (
            "unreadable_file",
            f"packed by method {entry.compress_type} ({method}), which is not supported: pack it by deflate",
        )
    except CODEC_FAULTS as error:
        if is_fault_of_disk(error):
            raise
        return "unreadable_file", first_line(error)
    block = ZIP_BLOCK_BYTES if entry.compress_type in WITHOUT_LIMIT else BUFFER_BYTES
    return Member(buffered(Limited(content, limit, block)))
