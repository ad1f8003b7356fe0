"""Take the words that `data_pipeline.dedup.spans` finds repeated out of the texts of a shard."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.core.files import atomic_path, once
from data_pipeline.core.text import excerpt
from data_pipeline.dedup.span_exchange import (
    ENTRY,
    NONE,
    Exchange,
    firsts,
    group,
    keys_path,
    rows_of,
    save_keys,
)
from data_pipeline.dedup.span_kernels import KEPT, REPEATED, classes, cut_words, read_words
from data_pipeline.documents import byte_lengths, hash_ids, read_shard, write_shard

CUT = pa.schema(
    [
        ("id", pa.string()),
        ("start", pa.int64()),  # characters of the text before any cut
        ("end", pa.int64()),
        ("words", pa.int64()),
        ("kept_in", pa.list_(pa.string())),  # the documents that have the windows of which words were cut
        ("dropped", pa.bool_()),  # whether the rest of the document went too
        ("excerpt", pa.string()),
    ]
)
WINDOW = np.dtype([("row", "<u4"), ("place", "<u4"), ("group", "<u4")])
"""A window that may be repeated: its row, its first word, and which of the shard's keys it has."""
EXAMPLES = 10
COUNTS = ("documents", "cut_documents", "dropped_documents", "spans", "words", "bytes_in", "bytes_out")

Item = tuple[int, Path]


def longest_first(row: dict[str, Any]) -> tuple[int, str, int]:
    """Return the order of examples: longest first, then by id and position."""
    return -row["words"], row["id"], row["start"]


def ids_path(scratch: Path, shard: int) -> Path:
    return scratch / f"ids-{shard:06d}.arrow"


def windows_path(scratch: Path, shard: int) -> Path:
    return scratch / f"windows-{shard:06d}.npy"


def cuts_path(scratch: Path, shard: int) -> Path:
    return scratch / f"cuts-{shard:06d}.parquet"


@dataclass(frozen=True)
class Marks:
    """The windows of a shard that are `KEPT` or `REPEATED`, in order of row and position."""

    rows: NDArray[np.uint32]
    places: NDArray[np.uint32]
    kinds: NDArray[np.uint8]
    keepers: NDArray[np.int64]
    """The document that keeps the window: ``shard << 32 | row``."""

    @classmethod
    def load(cls, scratch: Path, matched: Exchange, shard: int) -> Self:
        """Load what the windows of a shard are, by the answers for their groups."""
        windows = np.load(windows_path(scratch, shard))
        groups = windows["group"]
        first = matched.keys(shard)
        own = np.int64(shard << 32) | first["row"].astype(np.int64)
        answers = matched.answers(shard)
        keepers = np.where(answers == NONE, own, answers)
        is_first = (windows["row"] == first["row"][groups]) & (windows["place"] == first["place"][groups])
        kinds = np.where(is_first & (keepers == own)[groups], KEPT, REPEATED).astype(np.uint8)
        alone = (answers == NONE) & (np.bincount(groups, minlength=len(first)) == 1)
        shared = ~alone[groups]
        return cls(
            rows=windows["row"][shared],
            places=windows["place"][shared],
            kinds=kinds[shared],
            keepers=keepers[groups][shared],
        )

    def of_row(self, row: int) -> Marks:
        """Return the marks of one document."""
        start, end = np.searchsorted(self.rows, np.array([row, row + 1], np.uint32))
        return Marks(
            rows=self.rows[start:end],
            places=self.places[start:end],
            kinds=self.kinds[start:end],
            keepers=self.keepers[start:end],
        )

    def keepers_of(self, first: int, last: int, width: int) -> list[int]:
        """Return the keepers of repeated windows with a word from ``first`` to ``last`` of one document, in order."""
        near = np.array([max(0, first - width + 1), last], np.uint32)
        start, end = np.searchsorted(self.places, near)
        repeated = self.kinds[start:end] == REPEATED
        keepers: list[int] = list(dict.fromkeys(self.keepers[start:end][repeated].tolist()))
        return keepers

    def rows_to_cut(self, start: int, end: int) -> list[int]:
        """Return rows from ``start`` to ``end`` that have repeated windows."""
        low, high = np.searchsorted(self.rows, np.array([start, end], np.uint32))
        here = self.rows[low:high][self.kinds[low:high] == REPEATED]
        rows: list[int] = np.unique(here).tolist()
        return rows


@dataclass(frozen=True)
class Span:
    """Words cut out of a text: from and to which character (without the white space after), and who keeps them."""

    start: int
    end: int
    words: int
    keepers: list[int]
    hash: int
    text: str


@dataclass(frozen=True)
class Edit:
    """A document as cutting leaves it."""

    text: str
    words_left: int
    keeps: bool
    """Whether it keeps a window that others repeat."""
    broken: int
    spans: list[Span]


def edit(text: bytes, marks: Marks, width: int) -> Edit:
    """Cut the words that the marks of one document select."""
    words, starts = np.empty(len(text) // 2 + 1, np.uint64), np.empty(len(text) // 2 + 1, np.int32)
    count = read_words(np.frombuffer(text, np.uint8), 0, len(text), classes(), words, starts)
    cut, broken = cut_words(marks.places, marks.kinds, width, count)
    edges = np.flatnonzero(np.diff(cut, prepend=False, append=False)).reshape(-1, 2).tolist()
    kept, spans = [], []
    at = characters = 0
    for first, last in edges:
        end = int(starts[last]) if last < count else len(text)
        before, gone = text[at : starts[first]].decode(), text[starts[first] : end].decode()
        bare = gone.rstrip()
        start = characters + len(before)
        digest = blake2b(words[first:last].tobytes(), digest_size=8).digest()
        spans.append(
            Span(
                start=start,
                end=start + len(bare),
                words=last - first,
                keepers=marks.keepers_of(first, last, width),
                hash=int.from_bytes(digest, "little"),
                text=bare,
            )
        )
        kept.append(close(before, gone[len(bare) :], opens=not at, ends=end == len(text)))
        at, characters = end, start + len(gone)
    kept.append(text[at:].decode())
    return Edit(
        text="".join(kept),
        words_left=int(count - cut.sum()),
        keeps=bool((marks.kinds == KEPT).any()),
        broken=broken,
        spans=spans,
    )


def close(text: str, after: str, *, opens: bool, ends: bool) -> str:
    """Close a slice of text before a cut with one of the two white spaces around the cut: that with more line breaks.

    So a line is not joined to the next, and words stay apart. White space at either end of a text stays as it is.
    """
    bare = text.rstrip()
    if opens and not bare:
        return text
    before = text[len(bare) :]
    if ends:
        return bare + after
    return bare + (after if after.count("\n") >= before.count("\n") and after else before or " ")


def cut_shard(
    width: int, min_remaining: int, scratch: Path, matched: Exchange, out: Path, item: Item
) -> dict[str, Any]:
    """Write a shard without its repeated words; returns counts by source, and its longest spans."""
    index, shard = item

    def work() -> dict[str, Any]:
        marks, cuts, tally = Marks.load(scratch, matched, index), Cuts(), Tally()
        row = 0
        with write_shard(out / shard.name) as writer:
            for batch in read_shard(shard):
                tally.add_batch(batch)
                writer.add_batch(cut_batch(batch, row, marks, width, min_remaining, cuts, tally))
                row += batch.num_rows
        cuts.name_keepers(scratch)
        keys = cuts.save(scratch, index)
        return {
            "keys": keys,
            "sources": tally.sources,
            "kept": int((marks.kinds == KEPT).sum()),
            "broken": tally.broken,
            "longest": sorted(cuts.rows, key=longest_first)[:EXAMPLES],
        }

    return once(scratch / f"cut-{index:06d}.json", work)


def cut_batch(
    batch: pa.RecordBatch,
    first_row: int,
    marks: Marks,
    width: int,
    min_remaining: int,
    cuts: Cuts,
    tally: Tally,
) -> pa.RecordBatch:
    """Return the rows of ``batch``, which begins at ``first_row`` of its shard, with their texts cut, less those
    dropped."""
    changed, kept = np.zeros(batch.num_rows, bool), np.ones(batch.num_rows, bool)
    texts: list[str] = []
    column = batch.column("text")
    for row in marks.rows_to_cut(first_row, first_row + batch.num_rows):
        at = row - first_row
        id, text, source = (batch.column(name)[at].as_py() for name in ("id", "text", "source"))
        encoded = text.encode()
        result = edit(encoded, marks.of_row(row), width)
        dropped = result.words_left < min_remaining and not result.keeps
        changed[at], kept[at] = True, not dropped
        texts.append(result.text)
        cuts.add(id, result.spans, dropped)
        tally.add_edit(source, result, dropped, len(encoded))
    if texts:
        column = pc.replace_with_mask(column, pa.array(changed), pa.array(texts, pa.string()))
        batch = batch.set_column(batch.schema.get_field_index("text"), batch.schema.field("text"), column)
    return batch if kept.all() else batch.filter(pa.array(kept))


@dataclass
class Tally:
    """Counts by source as they grow."""

    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    broken: int = 0

    def of(self, source: str) -> dict[str, int]:
        return self.sources.setdefault(source, dict.fromkeys(COUNTS, 0))

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Count what comes in, as if all of it went out."""
        sizes = pa.table(
            {"source": batch.column("source"), "bytes": pa.array(byte_lengths(batch.column("text")))}
        )
        grouped = sizes.group_by("source").aggregate([("bytes", "sum"), ("bytes", "count")])
        for one in grouped.to_pylist():
            counts = self.of(one["source"])
            counts["documents"] += one["bytes_count"]
            counts["bytes_in"] += one["bytes_sum"]
            counts["bytes_out"] += one["bytes_sum"]

    def add_edit(self, source: str, result: Edit, dropped: bool, size: int) -> None:
        """Count what a document lost."""
        counts = self.of(source)
        counts["cut_documents"] += bool(result.spans)
        counts["dropped_documents"] += dropped
        counts["spans"] += len(result.spans)
        counts["words"] += sum(span.words for span in result.spans)
        counts["bytes_out"] -= size if dropped else size - len(result.text.encode())
        self.broken += result.broken


@dataclass
class Cuts:
    """The rows of a shard in ``cut.parquet`` as they grow; keepers are numbers until `name_keepers`."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)

    def add(self, id: str, spans: list[Span], dropped: bool) -> None:
        for span in spans:
            self.hashes.append(span.hash)
            values = (id, span.start, span.end, span.words, span.keepers, dropped, excerpt(span.text))
            self.rows.append(dict(zip(CUT.names, values, strict=True)))

    def name_keepers(self, scratch: Path) -> None:
        """Replace the keepers' numbers by their ids."""
        numbers = np.unique(np.array([one for row in self.rows for one in row["kept_in"]], np.int64))
        names: dict[int, str] = {}
        for shard in np.unique(numbers >> 32).tolist():
            here = numbers[numbers >> 32 == shard]
            with pa.memory_map(str(ids_path(scratch, shard))) as file:
                ids = pa.ipc.open_file(file).read_all().column("id")
                found = ids.take(pa.array(here & 0xFFFFFFFF)).to_pylist()
            names |= zip(here.tolist(), found, strict=True)
        for row in self.rows:
            row["kept_in"] = [names[one] for one in row["kept_in"]]

    def save(self, scratch: Path, shard: int) -> int:
        """Write the rows, and a key for each distinct span (place: how often it was cut); returns how many keys."""
        with atomic_path(cuts_path(scratch, shard)) as path:
            pq.write_table(pa.Table.from_pylist(self.rows, CUT), path)
        entries = rows_of(
            ENTRY,
            len(self.rows),
            key=np.array(self.hashes, np.uint64),
            document=hash_ids([row["id"] for row in self.rows], "spans"),
            row=np.arange(len(self.rows)),
            place=np.ones(len(self.rows)),
        )
        keys, groups, sizes = group(entries["key"])
        distinct = entries[firsts(groups, len(keys), entries)]
        distinct["place"] = sizes
        return save_keys(keys_path(scratch, "spans", shard), distinct)
