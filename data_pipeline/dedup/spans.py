"""Cut long spans of words that several documents have, or one has several times, so that each stays once.

Two windows of ``min_words`` consecutive words are equal if their words are, with case and punctuation, whatever the
white space. Of equal windows the first is kept: in the document whose id hashes lowest. What others repeat is cut, as
in Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better", section 4.1, whose suffix array finds
the same spans. To spare volume, windows are compared only where their anchor is repeated: of the runs of half as many
words in a window, the one that hashes lowest. Equal windows have equal anchors (winnowing: Schleimer, Wilkerson, Aiken
2003).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from data_pipeline.core.config import Config
from data_pipeline.core.files import atomic_path
from data_pipeline.core.text import human_bytes, table
from data_pipeline.dedup.span_cutting import (
    CUT,
    EXAMPLES,
    WINDOW,
    cut_shard,
    cuts_path,
    ids_path,
    longest_first,
    windows_path,
)
from data_pipeline.dedup.span_exchange import (
    ENTRY,
    Exchange,
    count_keys,
    firsts,
    group,
    keeper_of_each,
    keys_path,
    rows_of,
    save_keys,
    seen_elsewhere,
    total_of_each,
)
from data_pipeline.dedup.span_kernels import all_anchors, all_windows, classes
from data_pipeline.documents import add_up, buffers, hash_ids, read_shard, save_array
from data_pipeline.stage import StageContext

CUT_ROWS = 1 << 16
"""Rows in a row group of ``cut.parquet``."""

ANCHOR = np.dtype([("group", "<u4"), ("twice", "?")])
"""Which of the shard's distinct anchors it is, and whether the shard has that one several times."""

Item = tuple[int, Path]
Result = TypeVar("Result")


class SpanRules(Config):
    """How long a span must be to stand only once."""

    min_words: int = Field(default=50, ge=2, le=256)
    """Consecutive words that may not stand twice. (Texts of two words in turns that a polynomial modulo 2^64 can't
    tell apart begin to exist soon beyond the limit: see `span_kernels.hash_runs`.)"""
    min_remaining_words: int = Field(default=20, ge=1)
    """A document left with fewer words by cuts is dropped whole, unless it keeps a window that others repeat."""


@dataclass(frozen=True)
class SpanTally:
    """Counts of what was cut."""

    rules: SpanRules
    by_source: dict[str, dict[str, int]]
    """For each source: documents, cut_documents, dropped_documents, spans, words, bytes_in, bytes_out."""
    kept: int
    """Different windows that occur several times."""
    broken: int
    """Those of them that are left whole nowhere: see `span_kernels.cut_words`."""
    longest: list[dict[str, Any]]
    """Rows of ``cut.parquet``."""
    frequent: list[tuple[int, dict[str, Any]]]
    """How many times a span was cut, and one row of ``cut.parquet`` for it."""

    def total(self, name: str) -> int:
        return sum(counts[name] for counts in self.by_source.values())

    @property
    def bytes_cut(self) -> int:
        return self.total("bytes_in") - self.total("bytes_out")

    def report(self) -> str:
        """Return a section of Markdown: what was cut, by source, with examples."""
        rules, share = self.rules, self.bytes_cut / max(1, self.total("bytes_in"))
        text = (
            f"## Repeated spans\n\nCut {self.total('spans')} spans, {human_bytes(self.bytes_cut)} ({share:.1%}), "
            f"out of {self.total('cut_documents')} documents: what repeats {rules.min_words} or more words that stand "
            f"elsewhere. {self.total('dropped_documents')} documents with fewer than {rules.min_remaining_words} words "
            f"left were dropped. Of {self.kept} repeated windows {self.broken} are left in pieces only, all others "
            "once.\n\n"
        )
        rows = [
            (
                source,
                one["documents"],
                one["cut_documents"],
                one["dropped_documents"],
                one["spans"],
                human_bytes(one["bytes_in"] - one["bytes_out"]),
                f"{(one['bytes_in'] - one['bytes_out']) / max(1, one['bytes_in']):.1%}",
            )
            for source, one in self.by_source.items()
        ]
        text += table(("source", "documents", "cut", "dropped", "spans", "bytes cut", "share"), rows)
        if self.longest:
            examples = [(one["words"], one["id"], one["kept_in"][0], one["excerpt"]) for one in self.longest]
            text += "\n### Longest\n\n" + table(("words", "cut from", "kept in", "begins"), examples)
            often = [(times, one["words"], one["kept_in"][0], one["excerpt"]) for times, one in self.frequent]
            text += "\n### Most often cut\n\n" + table(("times", "words", "kept in", "begins"), often)
        return text


def cut_repeats(
    rules: SpanRules, shards: Sequence[Path], scratch: Path, out: Path, context: StageContext, memory_mb: int
) -> SpanTally:
    """Copy document shards into ``out`` without repeated spans; ``out/cut.parquet`` lists what was cut (schema `CUT`).

    The law, for windows of ``min_words`` words in the texts that come in:

    1. Every cut word is in a window that equals an earlier one, so (going from there to ever earlier ones) it is left
       somewhere; all others stay.
    2. Of windows left whole no two are equal. (The words on both sides of a cut make no window.)
    3. The first of several equal windows is left whole, but where a repeated one would be left whole between such: then
       that one is cut, and the others are counted as `SpanTally.broken`.
    4. A document that cuts leave with fewer than ``min_remaining_words`` words is dropped, unless it has a window of 3.

    Earlier means: in a document whose id has a lower hash, or before it in the same. So texts don't depend on how
    documents lie in shards. Equal means an equal 64-bit hash: of n different windows that may be repeated, about
    n^2 / 2^65 pairs are wrongly taken as equal.

    Args:
        shards: document shards of different names.
        scratch: a folder for this alone; at worst (all text repeated) it grows to about 8 bytes a byte of text.
        memory_mb: what matching holds in all workers together. Besides, each worker holds a row group of texts, and
            about 100 bytes for each window of its shard that may be repeated.
    """
    items, steps = list(enumerate(shards)), 5
    match = partial(Exchange.run, scratch, context=context, memory_mb=memory_mb)

    def each(verb: str, work: Callable[[Item], Result]) -> list[Result]:
        return context.map(work, items, names=[f"{verb} {shard.stem}" for shard in shards])

    anchors = each("anchor", partial(anchor_shard, rules, scratch))
    context.progress(1, steps, "passes")
    anchored = match("anchors", anchors, seen_elsewhere)
    context.progress(2, steps, "passes")
    windows = each("window", partial(window_shard, rules, scratch, anchored))
    context.progress(3, steps, "passes")
    matched = match("windows", windows, keeper_of_each)
    context.progress(4, steps, "passes")
    cuts = each("cut", partial(cut_shard, rules.min_words, rules.min_remaining_words, scratch, matched, out))
    counted = match("spans", [one["keys"] for one in cuts], total_of_each)
    gather(scratch, len(shards), out / "cut.parquet")
    context.progress(5, steps, "passes")
    return SpanTally(
        rules=rules,
        by_source=sum_by_source(one["sources"] for one in cuts),
        kept=sum(one["kept"] for one in cuts),
        broken=sum(one["broken"] for one in cuts),
        longest=sorted((row for one in cuts for row in one["longest"]), key=longest_first)[:EXAMPLES],
        frequent=most_frequent(scratch, counted),
    )


def anchor_shard(rules: SpanRules, scratch: Path, item: Item) -> int:
    """Save a shard's ids, which of its distinct anchors each anchor is, and those as keys; returns how many."""
    index, shard = item
    if (path := keys_path(scratch, "anchors", index)).exists():
        return count_keys(path)
    found = [np.zeros(0, np.uint64)]
    with (
        atomic_path(ids_path(scratch, index)) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, pa.schema([("id", pa.string())])) as writer,
    ):
        for batch in read_shard(shard, ("id", "text")):
            writer.write_batch(batch.select(["id"]))
            found.append(all_anchors(*buffers(batch.column("text")), rules.min_words, classes()))
    keys, groups, sizes = group(np.concatenate(found))
    save_array(
        scratch / f"anchors-{index:06d}.npy",
        rows_of(ANCHOR, len(groups), group=groups, twice=(sizes > 1)[groups]),
    )
    return save_keys(path, keys.view([("key", "<u8")]))


def window_shard(rules: SpanRules, scratch: Path, anchored: Exchange, item: Item) -> int:
    """Save the windows of a shard whose anchors are repeated, and the first of each group of equal ones as a key."""
    index, shard = item
    if (path := keys_path(scratch, "windows", index)).exists():
        return count_keys(path)
    anchors = np.load(scratch / f"anchors-{index:06d}.npy")
    repeated = anchors["twice"] | anchored.answers(index)[anchors["group"]]
    found = [np.zeros(0, ENTRY)]
    row = used = 0
    for batch in read_shard(shard, ("id", "text")):
        keys, rows, places, here = all_windows(
            *buffers(batch.column("text")), rules.min_words, classes(), repeated[used:]
        )
        documents = hash_ids(batch.column("id").to_pylist(), "spans")[rows]
        found.append(
            rows_of(ENTRY, len(keys), key=keys, document=documents, row=rows + np.uint32(row), place=places)
        )
        row += batch.num_rows
        used += here
    assert used == len(repeated), f"{used} anchors found, {len(repeated)} saved"
    windows = np.concatenate(found)
    found.clear()
    keys, groups, _ = group(windows["key"])
    save_array(
        windows_path(scratch, index),
        rows_of(WINDOW, len(windows), row=windows["row"], place=windows["place"], group=groups),
    )
    return save_keys(path, windows[firsts(groups, len(keys), windows)])


def gather(scratch: Path, shards: int, path: Path) -> None:
    """Write the cuts of all shards, in their order, as one file."""
    if path.exists():
        return
    waiting: list[pa.Table] = []
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, CUT, compression="zstd") as writer:
        for index in range(shards):
            waiting.append(pq.read_table(cuts_path(scratch, index)))
            if sum(len(one) for one in waiting) >= CUT_ROWS or index == shards - 1:
                writer.write_table(pa.concat_tables(waiting).combine_chunks(), row_group_size=CUT_ROWS)
                waiting.clear()


def most_frequent(scratch: Path, counted: Exchange) -> list[tuple[int, dict[str, Any]]]:
    """Return the spans that were cut most often, with a row of ``cut.parquet`` each: that of the first document."""
    best: list[tuple[int, int, int, int, int]] = []
    for index in range(counted.shards):
        totals = counted.answers(index)
        entries = counted.keys(index)
        rank = np.lexsort((entries["key"], -totals))
        for at in rank[:EXAMPLES].tolist():
            key, document, row, _ = entries[at].tolist()
            best.append((-int(totals[at]), key, document, index, row))
        first_of_span = {one[1]: one for one in sorted(best, reverse=True)}
        best = sorted(first_of_span.values())[:EXAMPLES]
    return [
        (-times, pq.read_table(cuts_path(scratch, index)).slice(row, 1).to_pylist()[0])
        for times, _, _, index, row in best
        if times < -1
    ]


def sum_by_source(tallies: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Return the sum of the shards' tallies, sources in order."""
    total: dict[str, dict[str, int]] = {}
    for one in tallies:
        for source, counts in one.items():
            total[source] = add_up([total.get(source, {}), counts])
    return dict(sorted(total.items()))
