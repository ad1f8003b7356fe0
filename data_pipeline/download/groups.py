"""One item of work of the download: bring a group of files here and read it into parts of documents."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Self

from data_pipeline.core.files import once
from data_pipeline.download import readers
from data_pipeline.download.html import HtmlRules, as_main_text
from data_pipeline.download.hub import HubRows
from data_pipeline.download.local import check_unchanged
from data_pipeline.download.objects import fetch_object
from data_pipeline.download.parts import Parts, group_stem
from data_pipeline.download.pieces import Group, Piece
from data_pipeline.download.records import Record, Rejected
from data_pipeline.download.remote import fetch_http
from data_pipeline.download.slices import check_stamp
from data_pipeline.download.sources import FileSource, HuggingFaceSource, ObjectSource, Source
from data_pipeline.download.transfer import Fetching


@dataclass(frozen=True)
class Settings:
    """How groups are read: passed to the workers."""

    scratch: Path
    shard_bytes: int
    timeout: float
    """Seconds."""
    connections: int
    """Connections of all workers to one host."""


def read_group(settings: Settings, group: Group) -> dict[str, Any]:
    """Read one group; returns its tally (documents, bytes, rejected and passed over by source, parts)."""
    stem = group_stem(settings.scratch, group.index)
    fetched = settings.scratch / "fetched" / stem.name
    tally = once(stem.with_name(f"{stem.name}.json"), partial(write_group, settings, group, stem, fetched))
    shutil.rmtree(fetched, ignore_errors=True)  # not before the marker is there
    return tally


def write_group(settings: Settings, group: Group, stem: Path, fetched: Path) -> dict[str, Any]:
    with Parts(stem, settings.shard_bytes) as parts:
        start, place = parts.progress.piece, parts.progress.place
        with Files(group.pieces, start, fetched, settings) as files:
            for number in range(start, len(group.pieces)):
                piece = group.pieces[number]
                rows = open_piece(piece, files, number, place)
                place = None
                provenance = piece.source.provenance
                common = json.dumps(provenance, allow_nan=False)
                for where, record in rows:
                    row = "" if record.row is None else f"#{record.row}"
                    id = f"{piece.source.name}/{piece.listed.name}{where}{row}"
                    if isinstance(record, Rejected):
                        parts.reject(id, record, piece.source.name)
                    else:
                        meta = (
                            json.dumps(provenance | dict(record.meta), allow_nan=False)
                            if record.meta
                            else common
                        )
                        parts.add(id, record, piece.source.name, meta)
                    if parts.full:
                        parts.seal(number, rows.place())
                parts.pass_over(rows.passed_over, piece.source.name)
            return parts.finish()


def open_piece(piece: Piece, files: Files, number: int, place: Any) -> HubRecords | FileRecords:
    """The records of a piece from ``place`` on; it must still be what it was when the run was planned."""
    if isinstance(piece.source, HuggingFaceSource):
        rows = HubRows(piece.source, piece.listed, piece.first, piece.end, place)
        return HubRecords(rows, piece.source.html if piece.source.text_format == "html" else None)
    passed_over = Counter[str]()
    reading = reader_of(piece.source, files.folder)
    records = readers.read_file(files.path(number), reading, piece.part, passed_over)
    return FileRecords(records, place or 0, passed_over)


OF_FILES = (
    "split",
    "split_chars",
    "format",
    "delimiter",
    "quotes",
    "encoding",
    "max_expansion",
    "max_unpacked_bytes",
)
"""Options of a `FileSource` that are its reader's, too."""


def reader_of(source: Source, folder: Path) -> readers.Reading:
    """Return how a source's files are read; what needs a temporary copy has it in ``folder``."""
    reading = readers.Reading(
        source.text_field,
        source.meta_fields,
        text_format=source.text_format,
        html=source.html,
        spool=folder,
    )
    if isinstance(source, FileSource):
        reading = replace(reading, **{name: getattr(source, name) for name in OF_FILES})
    return reading


class FileRecords:
    """(path in the file, record) of a file's records, and the number of those that were read."""

    def __init__(self, records: Iterator[Record], skip: int, passed_over: Counter[str]) -> None:
        self._records, self._read = records, skip
        self.passed_over = passed_over
        """Members of an archive that were passed over; known when all is read."""

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        for record in islice(self._records, self._read, None):
            self._read += 1
            yield f"/{record.member}" if record.member else "", record

    def place(self) -> int:
        return self._read


class HubRecords:
    """The same of a data set's rows."""

    def __init__(self, rows: HubRows, html: HtmlRules | None) -> None:
        self._rows, self._html = rows, html
        self.passed_over = Counter[str]()

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        for shard, record in self._rows:
            yield f"/{shard:05d}", as_main_text(record, self._html) if self._html else record

    def place(self) -> dict[str, Any]:
        return self._rows.place()


class Files:
    """The files of a group on this machine: what is remote is brought here, a few files ahead of the reading."""

    def __init__(self, pieces: Sequence[Piece], start: int, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self._pieces = pieces
        self._fetching = Fetching(settings.timeout, settings.connections, settings.scratch / "turns")
        self._pool = ThreadPoolExecutor(settings.connections)
        self._asked: dict[int, Future[Path]] = {}
        self._remote = deque(n for n in range(start, len(pieces)) if pieces[n].is_remote)

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
        path = Path(piece.listed.location)
        if piece.part:
            check_stamp(path, piece.part)
            return path
        if not piece.is_remote:
            check_unchanged(piece.listed)
            return path
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
