"""One item of work of the download: bring a group of files here and read it into shards of documents."""

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
from data_pipeline.download.group_writer import GroupWriter, group_stem
from data_pipeline.download.html import HtmlRules, as_main_text
from data_pipeline.download.hub import HubRows
from data_pipeline.download.inputs import Group, Input
from data_pipeline.download.local import check_unchanged
from data_pipeline.download.objects import fetch_object
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
    """Read one group; returns its tally (documents, bytes, rejected and passed over by source, shards)."""
    stem = group_stem(settings.scratch, group.index)
    fetched = settings.scratch / "fetched" / stem.name
    tally = once(stem.with_name(f"{stem.name}.json"), partial(write_group, settings, group, stem, fetched))
    shutil.rmtree(fetched, ignore_errors=True)  # not before the marker is there
    return tally


def write_group(settings: Settings, group: Group, stem: Path, fetched: Path) -> dict[str, Any]:
    with GroupWriter(stem, settings.shard_bytes) as writer:
        start, position = writer.progress.piece, writer.progress.place
        with Files(group.inputs, start, fetched, settings) as files:
            for number in range(start, len(group.inputs)):
                one = group.inputs[number]
                rows = open_input(one, files, number, position)
                position = None
                provenance = one.source.provenance
                common = json.dumps(provenance, allow_nan=False)
                for where, record in rows:
                    row = "" if record.row is None else f"#{record.row}"
                    id = f"{one.source.name}/{one.listed.name}{where}{row}"
                    if isinstance(record, Rejected):
                        writer.reject(id, record, one.source.name)
                    else:
                        meta = (
                            json.dumps(provenance | dict(record.meta), allow_nan=False)
                            if record.meta
                            else common
                        )
                        writer.add(id, record, one.source.name, meta)
                    if writer.full:
                        writer.seal(number, rows.position())
                writer.pass_over(rows.passed_over, one.source.name)
            return writer.finish()


def open_input(one: Input, files: Files, number: int, position: Any) -> HubRecords | FileRecords:
    """Open the records of an input from ``position`` on; it must still be what it was when the run was planned."""
    if isinstance(one.source, HuggingFaceSource):
        rows = HubRows(one.source, one.listed, one.first, one.end, position)
        return HubRecords(rows, one.source.html if one.source.text_format == "html" else None)
    passed_over = Counter[str]()
    reading = reader_of(one.source, files.folder)
    records = readers.read_file(files.path(number), reading, one.slice, passed_over)
    return FileRecords(records, position or 0, passed_over)


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

    def position(self) -> int:
        return self._read


class HubRecords:
    """The same of a data set's rows."""

    def __init__(self, rows: HubRows, html: HtmlRules | None) -> None:
        self._rows, self._html = rows, html
        self.passed_over = Counter[str]()

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        for shard, record in self._rows:
            yield f"/{shard:05d}", as_main_text(record, self._html) if self._html else record

    def position(self) -> dict[str, Any]:
        return self._rows.position()


class Files:
    """The files of a group on this machine: what is remote is brought here, a few files ahead of the reading."""

    def __init__(self, inputs: Sequence[Input], start: int, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self._inputs = inputs
        self._fetching = Fetching(settings.timeout, settings.connections, settings.scratch / "turns")
        self._pool = ThreadPoolExecutor(settings.connections)
        self._asked: dict[int, Future[Path]] = {}
        self._remote = deque(n for n in range(start, len(inputs)) if inputs[n].is_remote)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *fault: Any) -> None:
        self._fetching.stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def path(self, number: int) -> Path:
        """Return a file that is what was listed.

        Raises:
            UserError: it isn't.
            ConnectionError: it can't be fetched.
        """
        one = self._inputs[number]
        path = Path(one.listed.location)
        if one.slice:
            check_stamp(path, one.slice)
            return path
        if not one.is_remote:
            check_unchanged(one.listed)
            return path
        while self._remote and len(self._asked) <= self._fetching.connections:
            ahead = self._remote.popleft()
            self._asked[ahead] = self._pool.submit(self._fetch, ahead)
        return self._asked.pop(number).result()

    def _fetch(self, number: int) -> Path:
        one = self._inputs[number]
        # Of the name only what gives the format: the rest may be too long for a file's name.
        suffixes = re.sub(r"[^a-z0-9.]", "", "".join(PurePosixPath(one.listed.name).suffixes[-2:]).lower())
        target = self.folder / f"{number:05d}{suffixes[-20:]}"
        fetch = fetch_object if isinstance(one.source, ObjectSource) else fetch_http
        fetch(one.listed, target, self._fetching)
        return target
