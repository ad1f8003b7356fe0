"""Content of sources, as inputs and groups of about a shard of text: one group is one item of work.

Groups are made from the listing alone, so they are the same whoever reads them, in whatever order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.core.files import once
from data_pipeline.download.formats import is_compressed
from data_pipeline.download.hub import shards_of
from data_pipeline.download.slices import Slice, slice_count, survey
from data_pipeline.download.sources import HttpSource, HuggingFaceSource, Listed, ObjectSource, Source
from data_pipeline.stage import StageContext

EXPANSION = 3
"""Text is taken to be this many times larger than its compressed file, when files are grouped."""

HUB_GROUPS = 256
"""Groups that the shards of a data set are dealt into, at most."""


@dataclass(frozen=True)
class Input:
    """A file of a source, a slice of it, or the shards ``first`` to ``end`` (without it) of a data set."""

    source: Source
    listed: Listed
    slice: Slice | None = None
    first: int = 0
    end: int = 1

    @property
    def size(self) -> int:
        """Bytes as stored; 0 where it isn't known."""
        return self.listed.size // (self.slice.count if self.slice else 1)

    @property
    def is_remote(self) -> bool:
        """Whether it must be fetched to be read."""
        return isinstance(self.source, HttpSource | ObjectSource)


@dataclass(frozen=True)
class Group:
    """One item of work: what is read into one shard (into several where it is large)."""

    index: int
    inputs: tuple[Input, ...]


def group_files(inputs: Iterable[Input], shard_bytes: int) -> list[Group]:
    """Group inputs, in order, in groups of about ``shard_bytes``; what has no known size stands alone."""
    groups: list[list[Input]] = [[]]
    filled = 0
    for one in inputs:
        alone = isinstance(one.source, HuggingFaceSource) or (one.is_remote and not one.size)
        if alone or filled >= shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(one)
        expected = one.size * (EXPANSION if is_compressed(one.listed.name) else 1)
        filled += shard_bytes if alone else expected
    return [Group(index, tuple(group)) for index, group in enumerate(filter(None, groups))]


def name_of(group: Group) -> str:
    """Return the name of a group as it is shown."""
    first, last = group.inputs[0], group.inputs[-1]
    if isinstance(first.source, HuggingFaceSource):
        return f"{first.listed.name} {first.first} .. {first.end - 1}"
    if first.slice:
        return f"{first.listed.name} {first.slice.index + 1}/{first.slice.count}"
    return first.listed.name if first == last else f"{first.listed.name} .. {last.listed.name}"


def all_inputs(
    sources: Sequence[Source],
    listings: Sequence[Sequence[Listed]],
    shard_bytes: int,
    scratch: Path,
    context: StageContext,
) -> Iterator[Input]:
    """Yield what is listed, in order: files, slices of large ones, and the shards of data sets."""
    listed = [(source, one) for source, listing in zip(sources, listings, strict=True) for one in listing]
    large = {
        number: (one, count, scratch / f"survey-{number:05d}.json")
        for number, (source, one) in enumerate(listed)
        if (count := slice_count(source, one, shard_bytes)) > 1
    }
    names = [f"look through {one.name}" for one, _, _ in large.values()]
    found = context.map(survey, list(large.values()), names=names) if large else []
    slices = dict(zip(large, found, strict=True))
    travelling = {source.name: without_addresses(source) for source in sources}
    for number, (source, one) in enumerate(listed):
        source = travelling[source.name]
        if isinstance(source, HuggingFaceSource):
            yield from inputs_of_hub(source, one, scratch)
        else:
            yield from (Input(source, one, cut) for cut in slices.get(number, [None]))


def without_addresses(source: Source) -> Source:
    """Return a source as it travels with each item of work: of an HTTP source's addresses, maybe a hundred thousand,
    an item has those that it reads in its listing."""
    return source.model_copy(update={"urls": (), "sha256": {}}) if isinstance(source, HttpSource) else source


def inputs_of_hub(source: HuggingFaceSource, listed: Listed, scratch: Path) -> Iterator[Input]:
    """Yield a data set's shards in groups of about as many; in one where its reading is to end somewhere."""
    note = scratch / f"shards-{source.name}.json"
    count = once(note, lambda: {"shards": shards_of(source, listed)})["shards"]
    limited = source.max_rows is not None or source.max_bytes is not None
    groups = 1 if limited else min(count, HUB_GROUPS)
    for group in range(groups):
        yield Input(source, listed, first=group * count // groups, end=(group + 1) * count // groups)
