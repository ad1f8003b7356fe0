"""Write what is left: each shard without its duplicates, and one table of all that was removed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.core.files import atomic_path, once
from data_pipeline.dedup.candidates import NONE
from data_pipeline.dedup.greedy import REPEATS
from data_pipeline.dedup.signed import Signed
from data_pipeline.documents import byte_lengths, read_shard, write_shard

REMOVED = pa.schema(
    [
        ("id", pa.string()),
        ("duplicate_of", pa.string()),
        ("jaccard", pa.float64()),
        ("kind", pa.string()),  # exact: the texts are equal; near
        (
            "measured",
            pa.string(),
        ),  # jaccard by: text (all of it), shingles (all of them), or signatures (an estimate)
    ]
)
REMOVED_ROWS = 1 << 16
"""Rows in a row group of ``removed.parquet``."""
ROWS_AT_ONCE = 1 << 19
"""Removed documents whose ids are in memory at once."""
TABLES_AT_ONCE = 256
"""Files that are merged at once: each is mapped into memory, and a system bounds how many may be."""
BINS = 50
"""Bins of the histogram of similarities, from 0 to 1."""


@dataclass(frozen=True)
class Removal:
    """Decisions on disk, by row."""

    signed: Signed
    copy_of: Path
    repeats: Path

    def of(self, start: int, end: int) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
        """Return what the documents of some rows repeat (`REPEATS`), and which of them have the very text of that.

        A copy repeats its original where that is kept, else what the original repeats.
        """
        original = np.array(np.load(self.copy_of, mmap_mode="r")[start:end])
        stored = np.load(self.repeats, mmap_mode="r")
        repeats = np.array(stored[start:end])
        copies = np.flatnonzero(original != NONE)
        repeats[copies] = stored[original[copies]]
        exact = copies[repeats["of"][copies] == NONE]
        repeats[exact] = np.rec.fromarrays(
            [original[exact], np.ones(len(exact)), np.ones(len(exact), np.bool_)], dtype=REPEATS
        )
        same_text = np.zeros(len(repeats), np.bool_)
        same_text[exact] = True
        return repeats, same_text


def write_shard_without(removal: Removal, out: Path, removed: Path, item: tuple[int, Path]) -> dict[str, Any]:
    """Copy the kept rows of a shard into ``out``, list the others in ``removed``; returns a tally.

    An item is a shard's number and path. The tally counts documents and bytes, in and kept, by source, exact and near
    duplicates, and the similarities of the latter.
    """
    number, shard = item
    return once(removed / f"{shard.stem}.json", partial(write_split, removal, out, removed, number, shard))


def write_split(removal: Removal, out: Path, removed: Path, number: int, shard: Path) -> dict[str, Any]:
    first, end = removal.signed.first_row[number : number + 2].tolist()
    repeats, same_text = removal.of(first, end)
    kept = repeats["of"] == NONE
    sources: dict[str, list[int]] = {}
    row = 0
    with write_shard(out / shard.name) as writer:
        for batch in read_shard(shard):
            mask = pa.array(kept[row : row + batch.num_rows])
            count_sources(sources, batch, mask)
            writer.add_batch(batch.filter(mask))
            row += batch.num_rows
    assert row == len(kept), f"{shard} has {row} documents; it had {len(kept)}"
    gone = first + np.flatnonzero(~kept)
    save_removed(removal, gone, repeats[~kept], same_text[~kept], removed / f"{shard.stem}.arrow")
    near = repeats["jaccard"][~kept & ~same_text]
    bins = np.minimum((near * BINS + 1e-9).astype(np.int64), BINS - 1)
    return {
        "sources": sources,
        "exact": int(same_text.sum()),
        "near": len(near),
        "estimated": int((~kept & ~repeats["exact"]).sum()),
        "histogram": np.bincount(bins, minlength=BINS).tolist(),
    }


def count_sources(sources: dict[str, list[int]], batch: pa.RecordBatch, kept: pa.BooleanArray) -> None:
    """Add documents, kept ones, bytes and kept bytes of each source."""
    sizes = byte_lengths(batch.column("text"))
    table = pa.table(
        {
            "source": batch.column("source"),
            "documents": np.ones(len(sizes), np.int64),
            "kept": pc.cast(kept, pa.int64()),
            "bytes_in": sizes,
            "bytes_out": sizes * kept.to_numpy(zero_copy_only=False),
        }
    )
    names = table.column_names[1:]
    sums = table.group_by("source").aggregate([(name, "sum") for name in names])
    for one in sums.to_pylist():
        total = sources.setdefault(one["source"], [0] * len(names))
        sources[one["source"]] = [a + one[f"{name}_sum"] for a, name in zip(total, names, strict=True)]


def save_removed(
    removal: Removal,
    rows: NDArray[np.int64],
    repeats: NDArray[np.void],
    same_text: NDArray[np.bool_],
    path: Path,
) -> None:
    """Write `REMOVED` for some rows, by id, as an Arrow file."""
    heads, head = np.unique(repeats["of"], return_inverse=True)
    table = pa.table(
        [
            removal.signed.ids(rows),
            removal.signed.ids(heads).take(pa.array(head)),
            pa.array(repeats["jaccard"]),
            pc.if_else(pa.array(same_text), "exact", "near"),
            pc.if_else(
                pa.array(same_text), "text", pc.if_else(pa.array(repeats["exact"]), "shingles", "signatures")
            ),
        ],
        schema=REMOVED,
    )
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, REMOVED) as writer,
    ):
        writer.write_table(table.sort_by("id"))


def join_removed(signed: Signed, folder: Path, path: Path, at_once: int = ROWS_AT_ONCE) -> None:
    """Merge what `save_removed` wrote for all shards into one Parquet file, by id."""
    if path.exists():
        return
    tables = [
        read_mapped(one) for one in join_groups([folder / f"{stem}.arrow" for stem in signed.stems], at_once)
    ]
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, REMOVED, compression="zstd") as writer:
        waiting = REMOVED.empty_table()
        for chunk in merged(tables, at_once):
            waiting = pa.concat_tables([waiting, chunk])
            whole = len(waiting) // REMOVED_ROWS * REMOVED_ROWS
            for start in range(0, whole, REMOVED_ROWS):
                writer.write_table(waiting.slice(start, REMOVED_ROWS).combine_chunks())
            waiting = waiting.slice(whole).combine_chunks()
        writer.write_table(waiting)


def join_groups(paths: list[Path], at_once: int, most: int = TABLES_AT_ONCE) -> list[Path]:
    """At most ``most`` files with the rows of ``paths``: while there are more, groups of them are merged into one."""
    while len(paths) > most:
        joined = []
        for start in range(0, len(paths), most):
            group = paths[start : start + most]
            joined.append(group[0].with_name(f"{group[0].stem}-and-{len(group)}.arrow"))
            with (
                atomic_path(joined[-1]) as temporary,
                pa.OSFile(str(temporary), "wb") as file,
                pa.ipc.new_file(file, REMOVED) as writer,
            ):
                for chunk in merged([read_mapped(one) for one in group], at_once):
                    writer.write_table(chunk)
        paths = joined
    return paths


def merged(tables: list[pa.Table], at_once: int) -> Iterator[pa.Table]:
    """Merge tables that are sorted by id, in chunks of about ``at_once`` rows: ranges of ids, each sorted."""
    columns = [table.column("id") for table in tables]
    total = sum(len(column) for column in columns)
    step = max(
        1, at_once // max(1, 4 * len(tables))
    )  # of which samples are taken, so that a chunk is at most 5/4
    samples = sorted(column[at].as_py() for column in columns for at in range(step, len(column), step))
    splits = samples[:: max(1, at_once // step)] if total > at_once else []
    bounds = [
        [0, *(bisect_left(column, split, key=lambda id: id.as_py()) for split in splits)]
        for column in columns
    ]
    for at in range(len(splits) + 1):
        slices = [
            table.slice(bound[at], (bound[at + 1] if at < len(splits) else len(table)) - bound[at])
            for table, bound in zip(tables, bounds, strict=True)
        ]
        yield pa.concat_tables(slices).sort_by("id")


def read_mapped(path: Path) -> pa.Table:
    """Read an Arrow file as a table whose columns stay on disk, though the file is closed."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def count_clusters(removal: Removal, path: Path) -> NDArray[np.int64]:
    """Count how many documents repeat each row, in a memory-mapped file."""
    documents = removal.signed.documents
    sizes = np.memmap(path, np.int64, "w+", shape=(max(1, documents),))
    for start in range(0, documents, ROWS_AT_ONCE):
        of = removal.of(start, min(start + ROWS_AT_ONCE, documents))[0]["of"]
        heads, counts = np.unique(of[of != NONE], return_counts=True)
        sizes[heads] += counts
    return sizes
