"""The page and the metrics that sum up a run of ``dedup``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import nsmallest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.core.files import atomic_path
from data_pipeline.core.text import excerpt, human_bytes, table
from data_pipeline.dedup.removal import BINS, ROWS_AT_ONCE
from data_pipeline.dedup.signed import Signed
from data_pipeline.dedup.spans import SpanTally
from data_pipeline.documents import read_shard
from data_pipeline.stage import Metrics

if TYPE_CHECKING:
    from data_pipeline.dedup.config import DedupConfig

CLUSTERS = 10
"""Largest clusters that the report shows."""
MEMBERS = 3
"""Documents of each that it names."""


def summarise(
    config: DedupConfig,
    signed: Signed,
    shards: Sequence[Path],
    tallies: Sequence[Mapping[str, Any]],
    clusters: NDArray[np.int64],
    cut_short: int,
    spans: SpanTally | None,
    out: Path,
) -> Metrics:
    """Write ``report.md`` and return the metrics; ``clusters`` holds how many documents repeat each row."""
    sources = by_source(tallies)
    documents, kept, bytes_in, bytes_out = (sum(column) for column in zip(*sources.values(), strict=True))
    exact, near = (sum(one[kind] for one in tallies) for kind in ("exact", "near"))
    estimated = sum(one["estimated"] for one in tallies)
    text = (
        f"# Dedup\n\nKept {kept} of {documents} documents, {human_bytes(bytes_out)} of "
        f"{human_bytes(bytes_in)} of text; removed {exact} exact and {near} near-duplicates.\n\nNear means a "
        f"Jaccard similarity of at least {config.threshold} in {config.ngram}-word shingles. {config.bands} bands of "
        f"{config.rows} rows find a pair at the threshold with probability {config.chance(config.threshold):.3f}. "
        f"Similarities are those of all shingles, but for {estimated} so far above the threshold that the estimate by "
        "signatures suffices. At 1 two texts have the same shingles, and differ in what is no part of a word "
        f"(`dedup.signs: {config.signs}`), in case, or in what they repeat.\n"
    )
    if cut_short:
        text += (
            f"\n**Warning**: the search for {cut_short} kept documents ended early (see `max_comparisons`).\n"
        )
    text += "\n## Sources\n\n" + table(
        ("source", "documents", "kept", "removed", "text in", "text kept"),
        (
            (name, one[0], one[1], one[0] - one[1], human_bytes(one[2]), human_bytes(one[3]))
            for name, one in sources.items()
        ),
    )
    text += histogram(tallies) + largest_clusters(signed, shards, clusters, out / "removed.parquet")
    metrics = {
        "documents": documents,
        "kept": kept,
        "removed/exact": exact,
        "removed/near": near,
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
    }
    if spans:
        text += "\n" + spans.report()
        metrics |= {
            "kept": kept - spans.total("dropped_documents"),
            "removed/spans": spans.total("dropped_documents"),
            "spans/cut": spans.total("spans"),
            "spans/bytes": spans.bytes_cut,
            "bytes_out": spans.total("bytes_out"),
        }
    with atomic_path(out / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return {name: float(value) for name, value in metrics.items()}


def by_source(tallies: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Documents, kept ones, bytes and kept bytes of each source."""
    total: dict[str, list[int]] = {}
    for tally in tallies:
        for name, counts in tally["sources"].items():
            total[name] = [a + b for a, b in zip(total.get(name, [0] * 4), counts, strict=True)]
    return dict(sorted(total.items())) or {"": [0] * 4}


def histogram(tallies: Sequence[Mapping[str, Any]]) -> str:
    """Show how similar the removed near-duplicates are to what they repeat, as Markdown."""
    counts = np.sum([tally["histogram"] for tally in tallies], axis=0)
    if not counts.sum():
        return ""
    first = int(np.flatnonzero(counts)[0])
    rows = [
        (f"{at / BINS:.2f} to {(at + 1) / BINS:.2f}", counts[at], "█" * round(40 * counts[at] / counts.max()))
        for at in range(first, BINS)
    ]
    return "\n## Similarity of the removed near-duplicates\n\n" + table(("Jaccard", "documents", ""), rows)


def largest_clusters(
    signed: Signed, shards: Sequence[Path], clusters: NDArray[np.int64], removed: Path
) -> str:
    """Return the kept documents that most others repeat, with some of those, as Markdown."""
    best: list[tuple[int, str, int]] = []
    for start in range(0, len(clusters), ROWS_AT_ONCE):
        sizes = clusters[start : start + ROWS_AT_ONCE]
        least = max(1, -best[-1][0] if len(best) == CLUSTERS else 1)
        rows = start + np.flatnonzero(sizes >= least)
        found = zip((-clusters[rows]).tolist(), signed.ids(rows).to_pylist(), rows.tolist(), strict=True)
        best = nsmallest(CLUSTERS, [*best, *found])
    if not best:
        return ""
    members = first_members({id for _, id, _ in best}, removed)
    lines = [
        (
            -size,
            id,
            ", ".join(members[id]) + (", ..." if -size > MEMBERS else ""),
            excerpt(text_of(signed, shards, row), 80),
        )
        for size, id, row in best
    ]
    return "\n## Largest clusters\n\n" + table(("removed", "kept document", "repeated by", "begins"), lines)


def first_members(heads: set[str], removed: Path) -> dict[str, list[str]]:
    """Return the first documents, by id, that repeat each of some kept ones."""
    members: dict[str, list[str]] = {head: [] for head in heads}
    with pq.ParquetFile(removed) as file:
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=["id", "duplicate_of"], use_threads=False)
            wanted = rows.filter(pc.is_in(rows["duplicate_of"], value_set=pa.array(sorted(heads))))
            for row in wanted.to_pylist():
                if len(members[row["duplicate_of"]]) < MEMBERS:
                    members[row["duplicate_of"]].append(row["id"])
    return members


def text_of(signed: Signed, shards: Sequence[Path], row: int) -> str:
    """Return the text of one document, read again from its shard."""
    shard = int(np.searchsorted(signed.first_row, row, side="right")) - 1
    row -= int(signed.first_row[shard])
    for batch in read_shard(shards[shard], ("text",)):
        if row < batch.num_rows:
            return str(batch.column("text")[row].as_py())
        row -= batch.num_rows
    raise AssertionError(f"{shards[shard]} lost rows")
