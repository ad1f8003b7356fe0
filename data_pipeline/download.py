"""Stage ``download``: resolve sources of text and read them into document shards.

Resolving lists what each source holds and pins it (see `data_pipeline.sources`); the body reads exactly that.
Files are read in groups of about ``shard_bytes``, made from the listing alone, so the shards are the same
whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, assert_never
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, field_validator

from data_pipeline.context import (
    Metrics,
    Runtime,
    StageConfig,
    StageContext,
    UserError,
    atomic_path,
    human_bytes,
)
from data_pipeline.documents import REJECTED, ShardWriter, add_up, once, table, write_shard
from data_pipeline.hub import list_hugging_face, read_hugging_face
from data_pipeline.readers import Record, Rejected, read_file
from data_pipeline.remote import fetch, list_http
from data_pipeline.sources import (
    HttpSource,
    HuggingFaceSource,
    InstalledPythonSource,
    Listed,
    LocalSource,
    Source,
    check_unchanged,
    list_installed_python,
    list_local,
    split_suffix,
)

EXPANSION = 3
"""Text is taken to be this many times larger than its compressed file, when files are grouped."""


class DownloadRuntime(Runtime):
    """How servers are asked."""

    timeout_seconds: float = Field(default=20, gt=0)
    """Wait for a connection, or for the next bytes on one; the Hub's own client is told for plans only."""


class DownloadConfig(StageConfig):
    """Which sources to read. `resolve` pins what they hold."""

    sources: tuple[Source, ...] = Field(min_length=1)
    shard_bytes: int = Field(default=8_000_000, gt=0)
    """Text in a document shard, about: a shard ends with the document that reaches it."""
    runtime: DownloadRuntime = DownloadRuntime()

    _listings: tuple[tuple[Listed, ...], ...] | None = PrivateAttr(default=None)

    @field_validator("sources")
    @classmethod
    def _named_once(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        names = [source.name for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are named {name!r}; a name is part of document ids")
        return sources

    @property
    def listings(self) -> tuple[tuple[Listed, ...], ...]:
        """What each source holds, in the order of ``sources``; only a resolved config has it."""
        assert self._listings is not None, "resolve() the config first"
        return self._listings

    def resolve(self) -> Self:
        if self._listings is not None:
            return self
        pinned = self.model_copy()
        pinned._listings = tuple(list_source(source, self.runtime.timeout_seconds) for source in self.sources)
        return pinned

    def identity(self) -> dict[str, Any]:
        """Options of the sources with the hash of what they hold; no path of this machine and no key is in it."""
        pairs = zip(self.sources, self.listings, strict=True)
        sources = [describe(source, listing) for source, listing in pairs]
        return {"sources": sources, "shard_bytes": self.shard_bytes}


def describe(source: Source, listing: Sequence[Listed]) -> dict[str, Any]:
    """A source as manifests name it: its options, where it is found by anyone, and the hash of what it holds."""
    public: dict[str, Any] = {}
    if isinstance(source, HttpSource):
        public["urls"] = [urlsplit(url)._replace(query="", fragment="").geturl() for url in source.urls]
    elif isinstance(source, HuggingFaceSource) and listing[0].version.startswith("commit:"):
        public |= {"dataset": source.dataset, "revision": listing[0].version.rpartition("@")[2]}
    canonical = json.dumps([[one.name, one.size, one.version] for one in listing])
    return (
        source.model_dump(mode="json", exclude={"path", "urls", "sha256", "dataset", "revision"})
        | public
        | {
            "listing_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
            "files": len(listing),
            "bytes": sum(one.size for one in listing),
        }
    )


def list_source(source: Source, timeout: float) -> tuple[Listed, ...]:
    """What a source holds now; ``timeout`` (seconds) is for servers.

    Raises:
        UserError: there is nothing, or it can't be read.
        Unresolved: it can't be reached from here.
    """
    match source:
        case LocalSource():
            return list_local(source)
        case InstalledPythonSource():
            return list_installed_python(source)
        case HttpSource():
            return list_http(source, timeout)
        case HuggingFaceSource():
            return list_hugging_face(source, timeout)
        case _:
            assert_never(source)


@dataclass(frozen=True)
class Group:
    """One item of work: files that are read into one shard (into several where they are large)."""

    index: int
    files: tuple[tuple[Source, Listed], ...]


def download(config: DownloadConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Read all sources into ``documents-00000.parquet``, ...; bad records into ``rejected/``.

    Raises:
        UserError: a file changed since it was planned, or no document came out.
    """
    config = config.resolve()
    scratch = out / "scratch"
    groups = group_files(config)
    total = sum(listed.size for group in groups for _, listed in group.files) / 1e6
    context.progress(0, total, "MB")
    tallies = context.map(
        partial(read_group, Reading(scratch, config.shard_bytes, config.runtime.timeout_seconds)),
        groups,
        names=[name_of(group) for group in groups],
    )
    context.progress(total, total, "MB")
    if not any(tally["documents"] for tally in tallies):
        found = ", ".join(f"{n} {reason}" for reason, n in add_up(t["rejected"] for t in tallies).items())
        raise UserError(
            f"the corpus is empty: no document in the sources {[source.name for source in config.sources]}"
            f" (rejected records: {found or 'none'})"
        )
    out.joinpath("rejected").mkdir(exist_ok=True)
    number_shards(scratch, [tally["parts"] for tally in tallies], out)
    write_listing(config, out / "sources.json")
    return summarise(config, tallies, out / "report.md")


def name_of(group: Group) -> str:
    """What people see of an item of work."""
    first, last = group.files[0][1].name, group.files[-1][1].name
    return first if first == last else f"{first} .. {last}"


def group_files(config: DownloadConfig) -> list[Group]:
    """The files in order of listing, cut into groups of about ``shard_bytes``; what is remote stands alone."""
    groups: list[list[tuple[Source, Listed]]] = [[]]
    filled = 0
    for source, listing in zip(config.sources, config.listings, strict=True):
        remote = isinstance(source, HttpSource | HuggingFaceSource)
        for listed in listing:
            if remote or filled >= config.shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append((source, listed))
            expected = listed.size * (EXPANSION if split_suffix(listed.name)[1] else 1)
            filled += config.shard_bytes if remote else expected
    return [Group(index, tuple(files)) for index, files in enumerate(filter(None, groups))]


@dataclass(frozen=True)
class Reading:
    """What reads a group: passed to the workers."""

    scratch: Path
    shard_bytes: int
    timeout: float
    """Seconds."""


def read_group(reading: Reading, group: Group) -> dict[str, Any]:
    """Read one group of files; returns its tally (documents, bytes, rejected, bytes by source, parts)."""
    return once(reading.scratch / f"{group.index:05d}.json", partial(write_group, reading, group))


def write_group(reading: Reading, group: Group) -> dict[str, Any]:
    tally = Tally()
    fetched = reading.scratch / "fetched" / f"{group.index:05d}"
    with (
        Parts(reading.scratch / f"part-{group.index:05d}", reading.shard_bytes) as parts,
        write_shard(reading.scratch / f"rejected-{group.index:05d}.parquet", REJECTED) as rejected,
    ):
        for source, listed in group.files:
            meta = json.dumps({k: v for k, v in (("license", source.license), ("url", source.url)) if v})
            for record in read(source, listed, fetched, reading.timeout):
                row = "" if record.row is None else f"#{record.row}"
                one = f"{source.name}/{listed.name}{row}"
                if isinstance(record, Rejected):
                    rejected.add(one, record.reason, record.detail)
                    tally.rejected[f"{source.name}/{record.reason}"] += 1
                else:
                    size = parts.add(one, record.text, source.name, meta)
                    tally.documents[source.name] += 1
                    tally.bytes[source.name] += size
    counts = {"documents": tally.documents, "bytes": tally.bytes, "rejected": tally.rejected}
    return {key: dict(count) for key, count in counts.items()} | {"parts": parts.count}


@dataclass
class Tally:
    """What came of a group of files: documents and bytes of text by source, rejected by source/reason."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)


class Parts:
    """Writes documents into as many files ``<stem>-000.parquet``, ... as ``shard_bytes`` asks for."""

    def __init__(self, stem: Path, shard_bytes: int) -> None:
        self.count = 0
        self._stem = stem
        self._shard_bytes = shard_bytes
        self._filled = 0
        self._open = ExitStack()
        self._writer: ShardWriter | None = None

    def add(self, id: str, text: str, source: str, meta: str) -> int:
        """Append a document; returns its bytes of text."""
        if self._writer is None or self._filled >= self._shard_bytes:
            self._open.close()
            path = self._stem.with_name(f"{self._stem.name}-{self.count:03d}.parquet")
            self._writer = self._open.enter_context(write_shard(path))
            self.count += 1
            self._filled = 0
        self._writer.add(id, text, source, meta)
        size = len(text.encode())
        self._filled += size
        return size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: Any) -> None:
        self._open.__exit__(*fault)


def read(source: Source, listed: Listed, fetched: Path, timeout: float) -> Iterator[Record]:
    """The records of one listed file, which must still be what it was when the run was planned.

    ``fetched`` is the folder that an HTTP file is brought into.
    """
    if isinstance(source, HuggingFaceSource):
        yield from read_hugging_face(source, listed)
    elif isinstance(source, HttpSource):
        path = fetch(listed, fetched, timeout)
        yield from read_file(path, source.text_field)
        path.unlink()
    else:
        check_unchanged(listed)
        split_chars = source.split_chars if isinstance(source, LocalSource) else None
        yield from read_file(Path(listed.location), source.text_field, split_chars)


def number_shards(scratch: Path, parts: Sequence[int], out: Path) -> None:
    """Move the parts of all groups to their final names. Can be repeated after a kill at any moment."""
    number = 0
    for group, count in enumerate(parts):
        moves = {
            out / "rejected" / f"rejected-{group:05d}.parquet": scratch / f"rejected-{group:05d}.parquet"
        }
        for part in range(count):
            moves[out / f"documents-{number:05d}.parquet"] = scratch / f"part-{group:05d}-{part:03d}.parquet"
            number += 1
        for final, path in moves.items():
            if path.exists():
                os.replace(path, final)
            assert final.exists(), f"neither {path} nor {final} is there"


def write_listing(config: DownloadConfig, path: Path) -> None:
    """Write what each source held (names, sizes, versions) as JSON."""
    listing = {
        source.name: [one.model_dump(exclude={"location"}) for one in files]
        for source, files in zip(config.sources, config.listings, strict=True)
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")


def summarise(config: DownloadConfig, tallies: Sequence[Mapping[str, Any]], report: Path) -> Metrics:
    """Write the report and return the metrics."""
    documents, sizes, rejected = (
        add_up(tally[key] for tally in tallies) for key in ("documents", "bytes", "rejected")
    )
    lines = [
        (one.name, one.kind, len(files), documents.get(one.name, 0), human_bytes(sizes.get(one.name, 0)))
        for one, files in zip(config.sources, config.listings, strict=True)
    ]
    text = "# Download\n\n" + table(("source", "kind", "files", "documents", "text"), lines)
    if rejected:
        text += "\n## Rejected records\n\n" + table(("source/reason", "records"), rejected.items())
    with atomic_path(report) as temporary:
        temporary.write_text(text, encoding="utf-8")
    metrics = {
        "files": sum(len(files) for files in config.listings),
        "documents": sum(documents.values()),
        "bytes": sum(sizes.values()),
        "rejected": sum(rejected.values()),
    }
    return {name: float(value) for name, value in metrics.items()}
