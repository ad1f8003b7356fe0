"""The members of ``.zip`` and ``.tar`` archives, read in place: nothing is ever unpacked to a path.

So no member can leave a folder; one whose name tries to (absolute, or with ``..``) is rejected all the same, as its
name is to be part of a document's id. Folders, hidden files and files without a known suffix are passed over, as in
a folder on disk. All that comes out of an archive counts against one limit.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from io import BufferedReader
from typing import Any

from data_pipeline.documents import first_line
from data_pipeline.reading.formats import has_known_suffix, is_archive
from data_pipeline.reading.records import Rejected
from data_pipeline.reading.streams import (
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
"""Members that only say what the next one is called; `tarfile` holds them in memory."""

LINK = ("link_or_device", "no file of its own")


@dataclass(frozen=True)
class Member:
    """A file within an archive: its content and the bytes that it takes there."""

    stream: BufferedReader
    size: int


Entry = tuple[str, Member | tuple[str, str]]
"""A member's name, with its content, or the reason and the detail why it has none that can be read."""


def members(stream: BufferedReader, suffix: str, limit: Limit) -> Iterator[tuple[str, Member | Rejected]]:
    """(name, content) of each member with a known suffix, in the order of the archive.

    A content must be read before the next is asked for. ``stream`` of a ``.zip`` must be seekable.
    """
    seen: set[bytes] = set()
    for name, member in zip_entries(stream, limit) if suffix == ".zip" else tar_entries(stream, limit):
        shown = printable(name)[:MAX_NAME_CHARACTERS]
        refusal = refuse(name, seen) or (member if isinstance(member, tuple) else None)
        if refusal:
            yield shown, Rejected(None, *refusal, member=shown)
        elif has_known_suffix(name) and not is_hidden(name):
            assert isinstance(member, Member)
            yield shown, member


def refuse(name: str, seen: set[bytes]) -> tuple[str, str] | None:
    """Why a member of this name is not read (reason, detail), if so; else its name is noted in ``seen``."""
    if is_unsafe(name):
        return "unsafe_name", "a path that is absolute, leaves the folder or is too long"
    if is_hidden(name) or not has_known_suffix(name):
        return None
    if is_archive(name):
        return "nested_archive", "an archive within an archive is not opened: unpack it"
    digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    if digest in seen:
        return "repeated_name", "the archive holds this name twice; the first was read"
    seen.add(digest)
    return None


def is_unsafe(name: str) -> bool:
    """Whether a member's name would lead out of a folder on some system, or can't be part of an id."""
    parts = name.replace("\\", "/").split("/")
    has_drive = len(parts[0]) > 1 and parts[0][1] == ":"
    control = any(character < " " for character in name)
    return parts[0] == "" or ".." in parts or has_drive or control or len(name) > MAX_NAME_CHARACTERS


def is_hidden(name: str) -> bool:
    """Whether the file or a folder above it is hidden (macOS adds ``__MACOSX/._name`` to archives)."""
    return any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in name.split("/"))


def printable(name: str) -> str:
    """``name`` with what isn't UTF-8 in it as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


class Header(tarfile.TarInfo):
    """A tar header that is read strictly: `tarfile` takes a broken one for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros: the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no header where one should be: {error}") from error
        if header.type in NAME_TYPES and header.size > MAX_NAME_BYTES:
            raise tarfile.ReadError(f"a name of {header.size} bytes")
        return header


TAR_BLOCK_BYTES = 1 << 16
"""What is lost, at most, of a member before a fault."""


class Available:
    """A stream whose `read` gives what is there, so that nothing is lost to a fault behind it."""

    def __init__(self, stream: BufferedReader) -> None:
        self.read = stream.read1


def tar_entries(stream: BufferedReader, limit: Limit) -> Iterator[Entry]:
    """The members of a tar, read in one pass."""
    source: Any = Available(stream)
    with tarfile.open(
        fileobj=source, mode="r|", bufsize=BUFFER_BYTES, tarinfo=Header, errorlevel=0
    ) as archive:
        for entry in archive:
            archive.members = []  # type: ignore[attr-defined]  # else they all stay in memory
            if entry.isfile():
                content = Limited(archive.extractfile(entry), limit, TAR_BLOCK_BYTES)
                yield entry.name, Member(buffered(content), entry.size)
            elif not entry.isdir():
                yield entry.name, LINK
    while stream.read1(BUFFER_BYTES):  # to the end, where the compression has its checksum
        pass


def zip_entries(stream: BufferedReader, limit: Limit) -> Iterator[Entry]:
    """The members of a zip."""
    with zipfile.ZipFile(stream) as archive:
        for entry in archive.infolist():
            if entry.flag_bits & 1:
                yield entry.filename, ("encrypted", "its content needs a password")
            elif (entry.external_attr >> 16) & 0o170000 == 0o120000:
                yield entry.filename, LINK
            elif not entry.filename.endswith("/"):
                yield entry.filename, open_zipped(archive, entry, limit)


def open_zipped(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: Limit) -> Member | tuple[str, str]:
    try:
        content = archive.open(entry)
    except CODEC_FAULTS as error:
        if is_fault_of_disk(error):
            raise
        return "unreadable_file", first_line(error)
    return Member(buffered(Limited(content, limit)), entry.compress_size)
