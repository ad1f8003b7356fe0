"""Rules that could match nothing in a run: lists and sets with nothing to find, or that speak of what is not there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow.compute as pc

from data_pipeline.core.pinned_files import PinnedFile
from data_pipeline.documents import read_shard
from data_pipeline.stage import StageContext


def empty_lists(kinds: Mapping[str, Sequence[PinnedFile]]) -> Iterator[str]:
    """Yield a warning for each list, by kind, without an entry."""
    for kind, files in kinds.items():
        for file in files:
            if not any(file.lines()):
                yield f"clean.blocklists.{kind} can match nothing: {file.path} has no entry"


def short_items(sets: Sequence[tuple[str, int, int, int]], ngram: int) -> Iterator[str]:
    """Yield a warning for each evaluation set (name, items, too short ones, n-grams) of which something is not looked
    for."""
    for name, items, short, ngrams in sets:
        where = f"clean.decontamination.sets.{name}"
        if not ngrams:
            yield (
                f"{where} can match nothing: each of its {items} item(s) has fewer than {ngram} words; "
                "lower clean.decontamination.ngram"
            )
        elif short:
            yield f"{where}: {short} of {items} items have fewer than {ngram} words and are not looked for"


def without_addresses(shards: Sequence[Path], context: StageContext) -> Iterator[str]:
    """Yield a warning where no document has an address; asked when a list of addresses has matched none."""
    if not any(context.map(has_address, shards, names=[f"addresses in {path.stem}" for path in shards])):
        yield (
            "clean.blocklists.urls can match nothing: no document has a `url` in its meta; "
            "name the field in the sources' meta_fields, as [url]"
        )


def has_address(shard: Path) -> bool:
    """Return whether any document of a shard has an address in its meta."""
    return any(
        pc.any(pc.match_substring(batch.column("meta"), '"url": "')).as_py()
        for batch in read_shard(shard, ("meta",))
    )


def foreign_ids(files: Sequence[PinnedFile], sources: Collection[str]) -> Iterator[str]:
    """Yield a warning where ids are of sources that this run doesn't have; asked when a list of ids has matched
    none."""
    named = {line.partition("/")[0] for file in files for _, line in file.lines()}
    if named and not named & set(sources):
        yield (
            f"clean.blocklists.ids can match nothing: its ids are of {', '.join(sorted(named)[:4])}, but the sources "
            f"are {', '.join(sorted(sources)[:4])}"
        )
