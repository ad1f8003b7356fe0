"""Files in groups of about a shard of text, one item of work each: made from the listing alone, read in any order."""

from __future__ import annotations

import json
import re
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Self

from data_pipeline import readers
from data_pipeline.documents import once
from data_pipeline.formats import is_compressed
from data_pipeline.hub import HubRows, shards_of
from data_pipeline.local import check_unchanged
from data_pipeline.objects import fetch_object
from data_pipeline.parts import Parts, group_stem
from data_pipeline.records import Record, Rejected
from data_pipeline.remote import fetch_http
from data_pipeline.sources import FileSource, HttpSource, HuggingFaceSource, Listed, ObjectSource, Source
from data_pipeline.transfer import Fetching

EXPANSION = 3
"""Text is taken to be this many times larger than its compressed file, when files are grouped."""

HUB_GROUPS = 256
"""Into at most so many groups are the shards of a data set dealt."""


@dataclass(frozen=True)
class Piece:
    """A file of a source, or the shards ``first`` to ``end`` (without it) of a data set."""

    source: Source
    listed: Listed
    first: int = 0
    end: int = 1


@dataclass(frozen=True)
class Group:
    """One item of work: what is read into one shard (into several where it is large)."""

    index: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Reading:
    """What reads a group: passed to the workers."""

    scratch: Path
    shard_bytes: int
    timeout: float
    """Seconds."""
    connections: int
    """Of all workers to one host."""


def group_files(
    sources: Sequence[Source], listings: Sequence[Sequence[Listed]], shard_bytes: int, scratch: Path
) -> list[Group]:
    """What is listed, in order, cut into groups of about ``shard_bytes``; what has no known size stands alone."""
    groups: list[list[Piece]] = [[]]
    filled = 0
    for source, listing in zip(sources, listings, strict=True):
        for listed in listing:
            for piece in pieces_of(source, listed, scratch):
                alone = isinstance(source, HuggingFaceSource) or not listed.size
                if alone or filled >= shard_bytes:
                    groups.append([])
                    filled = 0
                groups[-1].append(piece)
                expected = listed.size * (EXPANSION if is_compressed(listed.name) else 1)
                filled += shard_bytes if alone else expected
    return [Group(index, tuple(pieces)) for index, pieces in enumerate(filter(None, groups))]


def pieces_of(source: Source, listed: Listed, scratch: Path) -> Iterator[Piece]:
    """A file as one piece; a data set as several, unless its reading is to end somewhere."""
    if not isinstance(source, HuggingFaceSource):
        yield Piece(source, listed)
        return
    note = scratch / f"shards-{source.name}.json"
    count = once(note, lambda: {"shards": shards_of(source, listed)})["shards"]
    limited = source.max_rows is not None or source.max_bytes is not None
    pieces = 1 if limited else min(count, HUB_GROUPS)
    for number in range(pieces):
        yield Piece(source, listed, number * count // pieces, (number + 1) * count // pieces)


def name_of(group: Group) -> str:
    """What people see of an item of work."""
    first, last = group.pieces[0], group.pieces[-1]
    if isinstance(first.source, HuggingFaceSource):
        return f"{first.listed.name} {first.first} .. {first.end - 1}"
    return first.listed.name if first == last else f"{first.listed.name} .. {last.listed.name}"


def read_group(reading: Reading, group: Group) -> dict[str, Any]:
    """Read one group; returns its tally (documents, bytes and rejected by source, parts)."""
    stem = group_stem(reading.scratch, group.index)
    fetched = reading.scratch / "fetched" / stem.name
    tally = once(stem.with_name(f"{stem.name}.json"), partial(write_group, reading, group, stem, fetched))
    shutil.rmtree(fetched, ignore_errors=True)  # not before the marker is there
    return tally


def write_group(reading: Reading, group: Group, stem: Path, fetched: Path) -> dict[str, Any]:
    with Parts(stem, reading.shard_bytes) as parts:
        start, place = parts.progress.piece, parts.progress.place
        with Files(group.pieces, start, fetched, reading) as files:
            for number in range(start, len(group.pieces)):
                piece = group.pieces[number]
                rows = open_piece(piece, files, number, place)
                place = None
                provenance = piece.source.provenance
                common = json.dumps(provenance)
                for where, record in rows:
                    row = "" if record.row is None else f"#{record.row}"
                    id = f"{piece.source.name}/{piece.listed.name}{where}{row}"
                    if isinstance(record, Rejected):
                        parts.reject(id, record, piece.source.name)
                    else:
                        meta = json.dumps(provenance | dict(record.meta)) if record.meta else common
                        parts.add(id, record, piece.source.name, meta)
                    if parts.full:
                        parts.seal(number, rows.place())
            return parts.finish()


def open_piece(piece: Piece, files: Files, number: int, place: Any) -> HubRecords | FileRecords:
    """The records of a piece from ``place`` on; it must still be what it was when the run was planned."""
    if isinstance(piece.source, HuggingFaceSource):
        return HubRecords(HubRows(piece.source, piece.listed, piece.first, piece.end, place))
    return FileRecords(
        readers.read_file(files.path(number), reader_of(piece.source, files.folder)), place or 0
    )


def reader_of(source: Source, folder: Path) -> readers.Reading:
    """How a source's files are read; what needs a temporary copy has it in ``folder``."""
    reading = readers.Reading(source.text_field, source.meta_fields, spool=folder)
    if isinstance(source, FileSource):
        own = ("split_chars", "encoding", "max_expansion", "max_unpacked_bytes")
        reading = replace(reading, **{name: getattr(source, name) for name in own})
    return reading


class FileRecords:
    """(path in the file, record) of a file's records, and the number of those that were read."""

    def __init__(self, records: Iterator[Record], skip: int) -> None:
        self._records, self._read = records, skip

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        for record in islice(self._records, self._read, None):
            self._read += 1
            yield f"/{record.member}" if record.member else "", record

    def place(self) -> int:
        return self._read


class HubRecords:
    """The same of a data set's rows."""

    def __init__(self, rows: HubRows) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        for shard, record in self._rows:
            yield f"/{shard:05d}", record

    def place(self) -> dict[str, Any]:
        return self._rows.place()


class Files:
    """The files of a group on this machine: what is remote is brought here, a few files ahead of the reading."""

    def __init__(self, pieces: Sequence[Piece], start: int, folder: Path, reading: Reading) -> None:
        self.folder = folder
        self._pieces = pieces
        self._fetching = Fetching(reading.timeout, reading.connections, reading.scratch / "turns")
        self._pool = ThreadPoolExecutor(reading.connections)
        self._asked: dict[int, Future[Path]] = {}
        self._remote = deque(n for n in range(start, len(pieces)) if is_remote(pieces[n].source))

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *fault: Any) -> None:
        self._fetching.stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def path(self, number: int) -> Path:
        """A file that is what was listed.

        Raises:
            UserError: it isn't.
            ConnectionError: it can't be fetched.
        """
        piece = self._pieces[number]
        if not is_remote(piece.source):
            check_unchanged(piece.listed)
            return Path(piece.listed.location)
        while self._remote and len(self._asked) <= self._fetching.connections:
            ahead = self._remote.popleft()
            self._asked[ahead] = self._pool.submit(self._fetch, ahead)
        return self._asked.pop(number).result()

    def _fetch(self, number: int) -> Path:
        piece = self._pieces[number]
        # Of the name only what says the format: the rest may be too long for a file's name.
        suffixes = re.sub(r"[^a-z0-9.]", "", "".join(PurePosixPath(piece.listed.name).suffixes[-2:]).lower())
        part = self.folder / f"{number:05d}{suffixes[-20:]}"
        fetch = fetch_object if isinstance(piece.source, ObjectSource) else fetch_http
        fetch(piece.listed, part, self._fetching)
        return part


def is_remote(source: Source) -> bool:
    return isinstance(source, HttpSource | ObjectSource)
