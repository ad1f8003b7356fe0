"""Stage ``dedup``: drop exact duplicates, and near-duplicates found by MinHash-LSH and verified.

Documents are taken in an order of preference. One is dropped only if a document that is kept is its verified
near-duplicate (Jaccard similarity of their shingles at least ``threshold``), so of a chain A ~ B ~ C whose ends
differ, both ends stay. Order and outcome depend on texts and ids only, never on shards or workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from data_pipeline.context import Metrics, Runtime, StageConfig, StageContext, atomic_path, human_bytes
from data_pipeline.documents import (
    byte_lengths,
    excerpt,
    read_shard,
    save_array,
    shard_paths,
    table,
    write_shard,
)
from data_pipeline.minhash import band_hashes, has_words, shingle_sets, signatures
from data_pipeline.neighbours import NONE, buckets, choose

REMOVED = pa.schema(
    [("id", pa.string()), ("duplicate_of", pa.string()), ("jaccard", pa.float64()), ("kind", pa.string())]
)
CLUSTERS = 10
"""Largest clusters that the report shows."""


class DedupConfig(StageConfig):
    """What counts as a duplicate. `chance` says how surely LSH finds a pair."""

    ngram: int = Field(default=5, ge=1)
    """Words in a shingle."""
    bands: int = Field(default=18, ge=1)
    rows: int = Field(default=7, ge=1)
    """Entries of the signature in a band: more rows find fewer pairs, more bands find more."""
    threshold: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity from which on two documents are near-duplicates."""
    prefer: Literal["longest", "first"] = "longest"
    """Which duplicate is kept: the longest (in bytes, then by id), or the first by id."""
    max_comparisons: int = Field(default=1000, ge=1)
    """Documents of a bucket that one is compared with, at most: bounds the work on degenerate buckets."""
    seed: int = Field(default=0, ge=0, lt=1 << 64)
    runtime: Runtime = Runtime()

    @property
    def permutations(self) -> int:
        """Entries of a signature: bands * rows."""
        return self.bands * self.rows

    def chance(self, similarity: float) -> float:
        """Probability that LSH finds a pair of this similarity: 1 - (1 - s^rows)^bands."""
        return 1 - (1 - similarity**self.rows) ** self.bands


def dedup(config: DedupConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Copy ``inputs["clean"]`` shard by shard without duplicates; ``removed.parquet`` says what each one repeats.

    Workers hold a row group of texts and one shard's shingles. The process that calls this holds, for each
    document, 8 bytes a band and at the peak some 200 more (hash, length, order, sorting; ids stay on disk), and for
    each document that shares a bucket with another 16 more bytes a band and 8 a shingle, which is about one a word.
    """
    shards = shard_paths(inputs["clean"])
    names = [path.stem for path in shards]
    config, scratch = config.model_copy(update={"runtime": Runtime()}), out / "scratch"
    steps = 3 * len(shards)
    context.progress(0, steps, "shards")
    context.map(partial(sign_shard, config, scratch), shards, names=[f"sign {name}" for name in names])
    context.progress(len(shards), steps, "shards")
    corpus = Corpus.load(config, scratch, shards)
    candidates = corpus.candidates()
    corpus.save_rows(candidates, scratch, "candidates")
    context.map(partial(shingle_shard, config, scratch), shards, names=[f"compare {name}" for name in names])
    context.progress(2 * len(shards), steps, "shards")
    removal = corpus.remove(config, candidates, scratch)
    if removal.cut_short:
        context.note(
            f"dedup.max_comparisons = {config.max_comparisons} cut {removal.cut_short} searches short: "
            "some near-duplicates may be left",
            warning=True,
        )
    corpus.save_rows(removal.duplicate_of == NONE, scratch, "kept")
    context.map(partial(filter_shard, scratch, out), shards, names=[f"write {name}" for name in names])
    context.progress(steps, steps, "shards")
    write_removed(corpus, removal, out / "removed.parquet")
    return summarise(config, corpus, removal, out / "report.md")


def sign_shard(config: DedupConfig, scratch: Path, shard: Path) -> None:
    """Write what finding duplicates needs of a shard: id, hash of the text, bytes, whether it has words, bands."""
    path = scratch / f"{shard.stem}-signed.arrow"
    if path.exists():
        return
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("digest", pa.binary(16)),
            ("bytes", pa.int64()),
            ("words", pa.bool_()),
            ("bands", pa.list_(pa.uint64(), config.bands)),
        ]
    )
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
    ):
        for batch in read_shard(shard, ("id", "text")):
            texts = batch.column("text")
            signed = signatures(texts, permutations=config.permutations, ngram=config.ngram, seed=config.seed)
            bands = band_hashes(signed, config.bands, config.rows)
            columns = [
                batch.column("id"),
                pa.array(
                    [blake2b(text.as_buffer(), digest_size=16).digest() for text in texts],
                    schema.types[1],
                ),
                pa.array(byte_lengths(texts)),
                pa.array(has_words(signed)),
                pa.FixedSizeListArray.from_arrays(pa.array(bands.ravel()), config.bands),
            ]
            writer.write_batch(pa.record_batch(columns, schema))


@dataclass(frozen=True)
class Removal:
    """The outcome, by row of the corpus."""

    duplicate_of: NDArray[np.int64]
    """Row of the kept document that a removed one repeats; `NONE` where it is kept."""
    similarity: NDArray[np.float64]
    exact: NDArray[np.bool_]
    cut_short: int


@dataclass(frozen=True)
class Corpus:
    """All documents, without their texts, row by row in the order of the shards."""

    shards: tuple[Path, ...]
    first_row: NDArray[np.int64]
    """Row at which each shard begins; shape (shards + 1,)."""
    ids: pa.ChunkedArray
    bytes: NDArray[np.int64]
    preferred: NDArray[np.int64]
    """Rows in order of preference."""
    original: NDArray[np.int64]
    """For each row, the preferred one with the same text (itself, mostly)."""
    buckets: NDArray[np.int64]
    """LSH bucket of each row in each band, for originals that have words; see `data_pipeline.neighbours`."""

    @classmethod
    def load(cls, config: DedupConfig, scratch: Path, shards: Sequence[Path]) -> Self:
        """Gather what `sign_shard` wrote."""
        tables = [read_mapped(scratch / f"{shard.stem}-signed.arrow") for shard in shards]
        rows = pa.concat_tables(tables)
        by_id = [("id", "ascending")]
        keys = [("bytes", "descending"), *by_id] if config.prefer == "longest" else by_id
        preferred = pc.sort_indices(rows, keys).to_numpy().astype(np.int64)
        original = first_equal(rows.column("digest"), preferred)
        near = (original == np.arange(len(original))) & rows.column("words").to_numpy()
        hashes = np.empty((len(original), config.bands), np.uint64)
        end = 0
        for chunk in rows.column("bands").chunks:
            start, end = end, end + len(chunk)
            hashes[start:end] = chunk.flatten().to_numpy().reshape(-1, config.bands)
        return cls(
            shards=tuple(shards),
            first_row=np.cumsum([0, *(one.num_rows for one in tables)]),
            ids=rows.column("id"),
            bytes=rows.column("bytes").to_numpy(),
            preferred=preferred,
            original=original,
            buckets=buckets(hashes, near),
        )

    def text(self, row: int) -> str:
        """The text of one document, read again from its shard."""
        shard = int(np.searchsorted(self.first_row, row, side="right")) - 1
        row -= int(self.first_row[shard])
        for batch in read_shard(self.shards[shard], ("text",)):
            if row < batch.num_rows:
                return str(batch.column("text")[row].as_py())
            row -= batch.num_rows
        raise AssertionError(f"{self.shards[shard]} lost rows")

    def candidates(self) -> NDArray[np.bool_]:
        """Which rows share a bucket with another."""
        return (self.buckets != NONE).any(axis=1)

    def save_rows(self, mask: NDArray[np.bool_], scratch: Path, name: str) -> None:
        """Write each shard's part of a mask over all rows, for the workers."""
        for shard, start, end in zip(self.shards, self.first_row, self.first_row[1:], strict=False):
            save_array(scratch / f"{shard.stem}-{name}.npy", mask[start:end])

    def remove(self, config: DedupConfig, candidates: NDArray[np.bool_], scratch: Path) -> Removal:
        """Decide: near-duplicates among the originals first, then the copies of what is kept or removed."""
        sizes, shingles = self.load_shingles(candidates, scratch)
        starts = np.cumsum(sizes) - sizes
        order = self.preferred[candidates[self.preferred]]
        chosen, found, cut_short = choose(
            self.buckets[order],
            shingles,
            starts[order],
            starts[order] + sizes[order],
            config.threshold,
            config.max_comparisons,
        )
        duplicate_of = np.full(len(candidates), NONE, np.int64)
        similarity = np.ones(len(candidates))
        near = chosen != NONE
        duplicate_of[order[near]] = order[chosen[near]]
        similarity[order[near]] = found[near]
        return self.with_copies(duplicate_of, similarity, cut_short)

    def load_shingles(
        self, candidates: NDArray[np.bool_], scratch: Path
    ) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Number of shingles of each row (0 where it is no candidate), and all of them, row after row."""
        sizes = np.zeros(len(candidates), np.int64)
        sizes[candidates] = np.concatenate(
            [np.load(scratch / f"{shard.stem}-sizes.npy") for shard in self.shards]
        )
        shingles = np.empty(sizes.sum(), np.uint64)
        end = 0
        for shard in self.shards:
            part = np.load(scratch / f"{shard.stem}-shingles.npy")
            start, end = end, end + len(part)
            shingles[start:end] = part
        assert end == len(shingles), f"{end} shingles in scratch, {len(shingles)} counted"
        return sizes, shingles

    def with_copies(
        self, duplicate_of: NDArray[np.int64], similarity: NDArray[np.float64], cut_short: int
    ) -> Removal:
        """A copy repeats its original where that is kept, else the document that the original repeats."""
        copies = self.original != np.arange(len(self.original))
        of_original = duplicate_of[self.original]
        exact = copies & (of_original == NONE)
        return Removal(
            duplicate_of=np.where(exact, self.original, np.where(copies, of_original, duplicate_of)),
            similarity=similarity[self.original],
            exact=exact,
            cut_short=cut_short,
        )


def read_mapped(path: Path) -> pa.Table:
    """An Arrow file as a table whose columns stay on disk, though the file is closed."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def first_equal(digests: pa.ChunkedArray, preferred: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row, the row with the same digest that comes first in ``preferred``."""
    ordered = np.frombuffer(digests.combine_chunks().buffers()[1], "V16")[preferred]
    _, first, group = np.unique(ordered, return_index=True, return_inverse=True)
    original = np.empty(len(preferred), np.int64)
    original[preferred] = preferred[first[group]]
    return original


def shingle_shard(config: DedupConfig, scratch: Path, shard: Path) -> None:
    """Write the sorted shingle sets of a shard's candidates, one after another, with their sizes."""
    path = scratch / f"{shard.stem}-shingles.npy"
    if path.exists():
        return
    wanted = np.load(scratch / f"{shard.stem}-candidates.npy")
    sets: list[NDArray[np.uint64]] = []
    row = 0
    for batch in read_shard(shard, ("text",)):
        texts = batch.column("text").filter(pa.array(wanted[row : row + batch.num_rows]))
        sets += shingle_sets(texts, ngram=config.ngram, seed=config.seed)
        row += batch.num_rows
    flat = np.concatenate(sets) if sets else np.zeros(0, np.uint64)
    save_array(scratch / f"{shard.stem}-sizes.npy", np.array([len(one) for one in sets], np.int64))
    save_array(path, flat)


def filter_shard(scratch: Path, out: Path, shard: Path) -> None:
    """Copy the kept rows of a shard."""
    if (out / shard.name).exists():
        return
    kept = np.load(scratch / f"{shard.stem}-kept.npy")
    row = 0
    with write_shard(out / shard.name) as writer:
        for batch in read_shard(shard):
            writer.add_batch(batch.filter(pa.array(kept[row : row + batch.num_rows])))
            row += batch.num_rows


def write_removed(corpus: Corpus, removal: Removal, path: Path) -> None:
    """Write which documents were removed, what each repeats, how similar they are, and the kind; sorted by id."""
    rows = np.flatnonzero(removal.duplicate_of != NONE)
    table = pa.table(
        [
            corpus.ids.take(pa.array(rows)),
            corpus.ids.take(pa.array(removal.duplicate_of[rows])),
            pa.array(removal.similarity[rows]),
            pa.array(np.where(removal.exact[rows], "exact", "near").tolist(), pa.string()),
        ],
        schema=REMOVED,
    )
    with atomic_path(path) as temporary:
        pq.write_table(table.sort_by("id").combine_chunks(), temporary, compression="zstd")


def summarise(config: DedupConfig, corpus: Corpus, removal: Removal, report: Path) -> Metrics:
    """Write the report with the largest clusters and return the metrics."""
    kept = removal.duplicate_of == NONE
    metrics = {
        "documents": len(kept),
        "kept": kept.sum(),
        "removed/exact": removal.exact.sum(),
        "removed/near": (~kept & ~removal.exact).sum(),
        "bytes_in": corpus.bytes.sum(),
        "bytes_out": corpus.bytes[kept].sum(),
    }
    text = (
        f"# Dedup\n\nKept {kept.sum()} of {len(kept)} documents, {human_bytes(corpus.bytes[kept].sum())} of "
        f"{human_bytes(corpus.bytes.sum())} of text; removed {removal.exact.sum()} exact and "
        f"{metrics['removed/near']} near-duplicates.\n\nNear means a Jaccard similarity of at least "
        f"{config.threshold} in {config.ngram}-word shingles, verified. {config.bands} bands of {config.rows} "
        f"rows find a pair at the threshold with probability {config.chance(config.threshold):.3f}.\n"
    )
    if removal.cut_short:
        text += f"\n**Warning**: `max_comparisons` cut {removal.cut_short} searches short.\n"
    text += largest_clusters(corpus, removal)
    with atomic_path(report) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return {name: float(value) for name, value in metrics.items()}


def largest_clusters(corpus: Corpus, removal: Removal) -> str:
    """The kept documents that most others repeat, with some of those, as Markdown."""
    removed = np.flatnonzero(removal.duplicate_of != NONE)
    heads, sizes = np.unique(removal.duplicate_of[removed], return_counts=True)
    if not len(heads):
        return ""
    clusters = sorted(
        (-size, corpus.ids[head].as_py(), head)
        for head, size in zip(heads.tolist(), sizes.tolist(), strict=True)
    )
    lines = []
    for size, id, head in clusters[:CLUSTERS]:
        members = removed[removal.duplicate_of[removed] == head]
        others = sorted(corpus.ids.take(pa.array(members)).to_pylist())
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        lines.append((-size, id, shown, excerpt(corpus.text(head), 80)))
    return "\n## Largest clusters\n\n" + table(("removed", "kept document", "repeated by", "begins"), lines)
