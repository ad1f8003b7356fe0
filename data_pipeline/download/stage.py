"""Stage ``download``: resolve sources of text and read them into document shards.

Resolving lists what each source holds and pins it (see `data_pipeline.download.sources`); the body reads exactly that.
Files are read in groups of about ``shard_bytes``, made from the listing alone, so the shards are the same
whatever the number of workers. What is remote is brought here first, into ``scratch/``, where it stays until its
group is read: what was fetched is not fetched again by a stage that was killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, assert_never
from urllib.parse import urlsplit

import pyarrow.compute as pc
from pydantic import Field, PrivateAttr, field_validator

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.core.text import human_bytes, table
from data_pipeline.discards import by_reason
from data_pipeline.documents import add_up, read_shard
from data_pipeline.download.group_writer import COUNTS, final_paths
from data_pipeline.download.groups import Settings, read_group
from data_pipeline.download.hub import list_hugging_face
from data_pipeline.download.inputs import all_inputs, group_files, name_of
from data_pipeline.download.local import list_installed_python, list_local
from data_pipeline.download.objects import list_objects
from data_pipeline.download.remote import list_http
from data_pipeline.download.sources import (
    HttpSource,
    HuggingFaceSource,
    InstalledPythonSource,
    Listed,
    Listing,
    LocalSource,
    ObjectSource,
    Source,
)
from data_pipeline.stage import Metrics, Runtime, StageConfig, StageContext


class DownloadRuntime(Runtime):
    """How servers are asked."""

    timeout_seconds: float = Field(default=20, gt=0)
    """Wait for a connection, or for the next bytes on one. The Hub's client is told for plans only, drivers of
    object stores not at all: these have settings of their own."""
    connections_per_host: int = Field(default=8, ge=1, le=256)
    """HTTP requests at once to one host, of all workers together."""


class DownloadConfig(StageConfig):
    """Which sources to read. `resolve` pins what they hold."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Where text comes from, in order: see docs/sources.md."""
    shard_bytes: int = Field(default=8_000_000, gt=0)
    """Text in a document shard, about: a shard ends with the document that reaches it."""
    runtime: DownloadRuntime = DownloadRuntime()

    _listings: tuple[tuple[Listed, ...], ...] | None = PrivateAttr(default=None)
    _left_out: dict[str, int] = PrivateAttr(default_factory=dict)

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
        """Content of each source, in the order of ``sources``; only a resolved config has it."""
        assert self._listings is not None, "resolve() the config first"
        return self._listings

    def resolve(self) -> Self:
        if self._listings is not None:
            return self
        pinned = self.model_copy()
        found = [list_source(source, self.runtime) for source in self.sources]
        pinned._listings = tuple(one.files for one in found)
        pinned._left_out = add_up(one.left_out for one in found)
        return pinned

    def left_out(self) -> Metrics:
        return by_reason("left_out", self._left_out)

    def identity(self) -> dict[str, Any]:
        """Return options of the sources with the hash of what they hold; no path of this machine and no key is in
        it."""
        pairs = zip(self.sources, self.listings, strict=True)
        sources = [describe(source, listing) for source, listing in pairs]
        return {"sources": sources, "shard_bytes": self.shard_bytes}


LOCATIONS = {"path", "urls", "sha256", "dataset", "revision"}
"""Options for where a source lies, which `describe` has in another form."""


def no_query(url: str) -> str:
    """Return an address as anyone may see it: a query may hold a key."""
    return urlsplit(url)._replace(query="", fragment="").geturl()


def describe(source: Source, listing: Sequence[Listed]) -> dict[str, Any]:
    """Return a source as manifests name it: its options, where it is found by anyone, and the hash of what it holds."""
    public: dict[str, Any] = {}
    if isinstance(source, HttpSource):
        public["urls"] = [no_query(url) for url in source.urls]
    elif isinstance(source, ObjectSource):
        public["urls"] = [source.url]
    elif isinstance(source, HuggingFaceSource) and listing[0].version.startswith("commit:"):
        public |= {"dataset": source.dataset, "revision": listing[0].version.rpartition("@")[2]}
    canonical = json.dumps([[one.name, one.size, one.version] for one in listing], allow_nan=False)
    return (
        source.model_dump(mode="json", exclude=LOCATIONS)
        | public
        | {
            "listing_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
            "files": len(listing),
            "bytes": sum(one.size for one in listing),
        }
    )


def list_source(source: Source, runtime: DownloadRuntime) -> Listing:
    """List what a source holds now, and count what of it is not read.

    Raises:
        UserError: there is nothing, or it can't be read.
        Unresolved: it can't be reached from here.
    """
    match source:
        case LocalSource():
            return list_local(source)
        case InstalledPythonSource():
            return Listing(list_installed_python(source))
        case HttpSource():
            return Listing(list_http(source, runtime.timeout_seconds, runtime.connections_per_host))
        case ObjectSource():
            return list_objects(source)
        case HuggingFaceSource():
            return Listing(list_hugging_face(source, runtime.timeout_seconds))
        case _:
            assert_never(source)


def download(config: DownloadConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Read all sources into ``documents-00000.parquet``, ...; bad records into ``rejected/``.

    Raises:
        UserError: a file changed since it was planned, or no document came out.
        ConnectionError: a server can't be reached; run again to resume.
    """
    config = config.resolve()
    scratch = out / "scratch"
    listed = all_inputs(config.sources, config.listings, config.shard_bytes, scratch, context)
    groups = group_files(listed, config.shard_bytes)
    total = sum(one.size for group in groups for one in group.inputs) / 1e6
    context.progress(0, total, "MB")
    runtime = config.runtime
    settings = Settings(
        scratch=scratch,
        shard_bytes=config.shard_bytes,
        timeout=runtime.timeout_seconds,
        connections=runtime.connections_per_host,
    )
    tallies = context.map(partial(read_group, settings), groups, names=[name_of(group) for group in groups])
    context.progress(total, total, "MB")
    if not any(tally["documents"] for tally in tallies):
        found = ", ".join(f"{n} {reason}" for reason, n in add_up(t["rejected"] for t in tallies).items())
        raise UserError(
            f"the corpus is empty: no document in the sources {[source.name for source in config.sources]}"
            f" (rejected records: {found or 'none'}){first_rejected(scratch, tallies, out)}"
        )
    out.joinpath("rejected").mkdir(exist_ok=True)
    for final, shard in final_paths(
        scratch, tallies, out
    ).items():  # can be repeated after a kill at any moment
        if shard.exists():
            os.replace(shard, final)
        assert final.exists(), f"neither {shard} nor {final} is there"
    shutil.rmtree(scratch / "fetched", ignore_errors=True)
    write_listing(config, out / "sources.json")
    for line in absent_fields(config.sources, sorted(out.glob("documents-*.parquet"))):
        context.note(line, warning=True)
    return summarise(config, tallies, out / "report.md")


def first_rejected(scratch: Path, tallies: Sequence[Mapping[str, Any]], out: Path) -> str:
    """Return the first rejected record as a second line of a message; empty where there is none."""
    for shard in final_paths(scratch, tallies, out).values():
        for batch in read_shard(shard):
            row = batch.slice(0, 1).to_pylist()[0]
            return f"\nthe first: {row['id']}: {row['reason']}: {row['excerpt']}"
    return ""


def absent_fields(sources: Sequence[Source], shards: Iterable[Path]) -> Iterator[str]:
    """Yield a warning for each field of ``meta_fields`` that no document of its source has; looks until each was
    seen."""
    wanted = {
        source.name: {json.dumps(name, allow_nan=False): name for name in source.meta_fields}
        for source in sources
    }
    for shard in shards:
        if not any(wanted.values()):
            return
        for batch in read_shard(shard, ("source", "meta")):
            for source in pc.unique(batch["source"]).to_pylist():
                meta = batch["meta"].filter(pc.equal(batch["source"], source))
                for key in [
                    key for key in wanted[source] if pc.any(pc.match_substring(meta, f"{key}: ")).as_py()
                ]:
                    del wanted[source][key]
    for source, names in wanted.items():
        if names:
            yield f"source {source}: no document has {', '.join(names.values())}, which its meta_fields name"


def write_listing(config: DownloadConfig, path: Path) -> None:
    """Write what each source held (names, sizes, versions) as JSON."""
    listing = {
        source.name: [one.model_dump(exclude={"location"}) for one in files]
        for source, files in zip(config.sources, config.listings, strict=True)
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(listing, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def summarise(config: DownloadConfig, tallies: Sequence[Mapping[str, Any]], report: Path) -> Metrics:
    """Write the report and return the metrics."""
    documents, sizes, rejected, passed_over = (add_up(tally[key] for tally in tallies) for key in COUNTS)
    lines = [
        (
            one.name,
            one.kind,
            one.license or "not stated",
            len(files),
            documents.get(one.name, 0),
            human_bytes(sizes.get(one.name, 0)),
        )
        for one, files in zip(config.sources, config.listings, strict=True)
    ]
    text = "# Download\n\n" + table(("source", "kind", "licence", "files", "documents", "text"), lines)
    if rejected:
        text += "\n## Rejected records\n\n" + table(("source/reason", "records"), rejected.items())
    if passed_over:
        text += "\n## Passed over in archives\n\n" + table(("source/suffix", "files"), passed_over.items())
    with atomic_path(report) as temporary:
        temporary.write_text(text, encoding="utf-8")
    metrics = {
        "files": sum(len(files) for files in config.listings),
        "documents": sum(documents.values()),
        "bytes": sum(sizes.values()),
        "rejected": sum(rejected.values()),
    }
    return (
        {name: float(value) for name, value in metrics.items()}
        | by_reason("rejected", of_all_sources(rejected))
        | by_reason("passed_over", of_all_sources(passed_over))
        | config.left_out()
    )


def of_all_sources(counts: Mapping[str, int]) -> dict[str, int]:
    """{reason: count} of counts by source/reason."""
    return add_up({name.partition("/")[2]: count} for name, count in counts.items())
