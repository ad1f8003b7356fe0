"""Where a document is: in which shard and row of a stage's output, or why it is not there.

Token shards are sorted by a hash of ids that also gives the shard, so a few row groups' ids are read of one
shard. Document shards are read by their ids, those first that the stage before names, and none of a row group whose
statistics rule the id out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.documents import corrupt, read_shard, shard_paths
from data_pipeline.hashing import hash_column
from data_pipeline.tokenize.flat import index_of
from data_pipeline.tokenize.report import Split
from data_pipeline.tokenize.stage import TokenizeConfig

MOST_LIKE = 3
MOST_COMPARED = 20_000
"""Ids that one given wrong is compared with letter by letter."""


@dataclass(frozen=True)
class Row:
    """A row of a Parquet file."""

    shard: str
    """The file's name."""
    row_group: int
    row: int
    """Within its row group."""
    values: dict[str, Any]
    """Values of the columns that were asked for."""


@dataclass(frozen=True)
class TokenPlace:
    """A document in the token shards."""

    split: Split
    shard: str
    row_group: int
    row: int
    """Within its row group."""
    tokens: int
    """With the end-of-text token."""
    start: int
    """Tokens of the split that come before."""


def find_document(folder: Path, id: str, likely: str | None = None) -> Row | None:
    """Return a document's row in the shards of a stage's folder; the shard called ``likely`` is looked into first."""
    paths = sorted(folder.glob("documents-*.parquet"), key=lambda path: (path.name != likely, path.name))
    return find_row(paths, id, ("meta",))


def find_rejected(folder: Path, id: str, likely: str | None = None) -> Row | None:
    """Return a document's row (reason, excerpt) among those that a stage refused."""
    name = likely and likely.replace("documents", "rejected")
    paths = sorted((folder / "rejected").glob("*.parquet"), key=lambda path: (path.name != name, path.name))
    return find_row(paths, id, ("reason", "excerpt"))


def find_removed(folder: Path, id: str) -> Row | None:
    """Return what dedup noted of a document that it removed: which it repeats, how alike they are."""
    path = folder / "removed.parquet"
    return find_row([path] if path.exists() else [], id, ("duplicate_of", "jaccard", "kind"))


def find_row(paths: Iterable[Path], id: str, columns: tuple[str, ...]) -> Row | None:
    """Return the first row with this id in some Parquet files."""
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    if not may_hold(file.metadata.row_group(group).column(0), id):
                        continue
                    at = pc.index(file.read_row_group(group, ["id"]).column("id"), id).as_py()
                    if at >= 0:
                        found = file.read_row_group(group, list(columns)).slice(at, 1).to_pylist()[0]
                        return Row(shard=path.name, row_group=group, row=at, values=found)
        except (pa.ArrowException, OSError) as error:
            raise corrupt(path, error) from error
    return None


def may_hold(ids: pq.ColumnChunkMetaData, id: str) -> bool:
    """Return whether a row group's statistics leave open that it has this id."""
    known = ids.statistics if ids.is_stats_set else None
    return known is None or not known.has_min_max or known.min <= id <= known.max


def find_tokens(config: TokenizeConfig, folder: Path, id: str) -> TokenPlace | None:
    """Find a document's position in the token shards that ``config`` laid out, found by halving."""
    key = hash_column(pa.array([id]), config.salt)[0]
    split: Split = "val" if int(key) < config.held_out else "train"
    paths = shard_paths(folder, split)
    number = bisect_right(config.first_keys(split, len(paths))[:-1], int(key)) - 1
    path = paths[number]
    try:
        with pq.ParquetFile(path) as file:
            found = search_groups(file, config.salt, id, key)
            if not found:
                return None
            group, at = found
            lengths = pc.list_value_length(file.read_row_group(group, ["tokens"]).column("tokens")).to_numpy()
            before = sum(group_tokens(file, earlier) for earlier in range(group))
    except (pa.ArrowException, OSError) as error:
        raise corrupt(path, error) from error
    start = sum(shard_tokens(earlier) for earlier in paths[:number]) + before + int(lengths[:at].sum())
    return TokenPlace(
        split=split, shard=path.name, row_group=group, row=at, tokens=int(lengths[at]), start=start
    )


def search_groups(file: pq.ParquetFile, salt: str, id: str, key: np.uint64) -> tuple[int, int] | None:
    """Find row group and row of an id whose hash is ``key``, in a file sorted by that hash."""

    def read(group: int) -> tuple[pa.Array, NDArray[np.uint64]]:
        ids = file.read_row_group(group, ["id"]).column("id").combine_chunks()
        return ids, hash_column(ids, salt)

    low, high = 0, file.num_row_groups
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if read(middle)[1][-1] < key else (low, middle)
    for group in range(low, file.num_row_groups):
        ids, keys = read(group)
        if (at := pc.index(ids, id).as_py()) >= 0:
            return group, at
        if keys[0] > key:
            break
    return None


def group_tokens(file: pq.ParquetFile, group: int) -> int:
    """Count the tokens of a row group, from the footer: every document has one, so each value is a token."""
    return int(file.metadata.row_group(group).column(1).num_values)


def shard_tokens(path: Path) -> int:
    """Count the tokens of a shard, from the footer."""
    with pq.ParquetFile(path) as file:
        return sum(group_tokens(file, group) for group in range(file.num_row_groups))


def start_in_source(folder: Path, place: TokenPlace, id: str) -> int:
    """Count the tokens of the document's own source that come before it in its split."""
    source = id.partition("/")[0]
    before = others = 0
    for path in shard_paths(folder, place.split):
        shard = index_of(path)
        if path.name == place.shard:
            starts, ends = shard.documents(source)
            own = int(np.searchsorted(starts, place.start - others))
            return before + (int(ends[own - 1]) if own else 0)
        before += shard.sources.get(source, (0, 0))[1]
        others += shard.tokens
    raise AssertionError(f"{folder} has no shard {place.shard}")


def alike(folder: Path, id: str) -> list[str]:
    """Find ids of a stage's documents that one given wrong may have meant, the likeliest first."""
    close: list[str] = []
    compared = 0
    last = id.rpartition("/")[2].rpartition(".")[0] or id.rpartition("/")[2]
    for ids in read_ids(folder):
        close += ids.filter(pc.match_substring(ids, last, ignore_case=True)).slice(0, MOST_LIKE).to_pylist()
        if compared < MOST_COMPARED:
            close += get_close_matches(id, ids.slice(0, MOST_COMPARED - compared).to_pylist(), MOST_LIKE, 0.6)
            compared += len(ids)
    return get_close_matches(id, dict.fromkeys(close), MOST_LIKE, 0)


def read_ids(folder: Path) -> Iterator[pa.Array]:
    """Yield the ids of all document shards of a folder, a row group at a time."""
    for path in sorted(folder.glob("documents-*.parquet")):
        for batch in read_shard(path, ("id",)):
            yield batch.column("id")
