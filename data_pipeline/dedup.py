"""Stage ``dedup``: drop exact duplicates, and near-duplicates found by MinHash-LSH and verified.

A document is dropped only if a kept one, preferred to it, is its verified near-duplicate (Jaccard similarity of their
shingles at least ``threshold``), so of a chain A ~ B ~ C whose ends differ, both ends stay. All but a thin decision is
mapped over shards or over partitions of hashes, and what they hand over lies on disk. The outcome depends on texts,
ids and quality only, never on shards, workers or memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from math import ceil
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from data_pipeline.context import Metrics, Runtime, StageConfig, StageContext, atomic_path
from data_pipeline.documents import shard_paths
from data_pipeline.duplicates.candidates import (
    NO_KEYS,
    NONE,
    Search,
    find_crowds,
    read_chunks,
    read_raw,
    search_part,
)
from data_pipeline.duplicates.forecast import forecast
from data_pipeline.duplicates.greedy import decide
from data_pipeline.duplicates.removal import Removal, count_clusters, join_removed, write_shard_without
from data_pipeline.duplicates.report import summarise
from data_pipeline.duplicates.signed import DIGEST_ENTRIES, Signed, SignRules, sign_shard
from data_pipeline.duplicates.spans import SpanRules, SpanTally, cut_repeats
from data_pipeline.duplicates.verify import Sets, VerifyRules, margin, mark_open, save_sets, verify_edges

MATCHES = 32
"""Edges that a document gets from one bucket, at most: were all those documents removed, it would stay."""


class DedupRuntime(Runtime):
    """How much a worker may hold."""

    memory_mb: int = Field(default=512, ge=1)
    """Memory of each worker, besides what Python and its libraries take (about 250 MB) and the shard it reads."""


class DedupConfig(StageConfig):
    """What counts as a duplicate. `chance` says how surely LSH finds a pair."""

    ngram: int = Field(default=5, ge=1, le=256)
    """Words in a shingle."""
    bands: int = Field(default=18, ge=1)
    rows: int = Field(default=7, ge=1)
    """Entries of the signature in a band: more rows find fewer pairs, more bands find more."""
    threshold: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity from which on two documents are near-duplicates."""
    prefer: Literal["longest", "first", "best"] = "longest"
    """Which duplicate is kept: the longest in bytes, the first by id, or that of the best quality; then the first."""
    quality_field: str | None = None
    """For ``best``: the field of the documents' meta with a number, higher is better; those without come last."""
    max_comparisons: int = Field(default=10_000, ge=1)
    """Documents of a bucket that each is compared with, the most preferred of those that differ: bounds the work."""
    spans: SpanRules | None = None
    """Cut long spans that several documents have; None leaves texts whole."""
    seed: int = Field(default=0, ge=0, lt=1 << 64)
    runtime: DedupRuntime = DedupRuntime()

    @model_validator(mode="after")
    def _quality_where_needed(self) -> Self:
        if (self.prefer == "best") != (self.quality_field is not None):
            raise ValueError("prefer: best and quality_field (a field of the documents' meta) go together")
        return self

    @property
    def permutations(self) -> int:
        """Entries of a signature: bands * rows."""
        return self.bands * self.rows

    def chance(self, similarity: float) -> float:
        """Probability that LSH finds a pair of this similarity: 1 - (1 - s^rows)^bands."""
        return 1 - (1 - similarity**self.rows) ** self.bands

    def near_search(self) -> Search:
        """How candidates for near-duplicates are searched."""
        least = ceil((self.threshold - margin(self.threshold, self.permutations)) * self.permutations)
        memory = self.runtime.memory_mb * 10**6
        likely = ceil(self.threshold * self.permutations)
        return Search("near", self.bands, self.rows, least, likely, self.max_comparisons, MATCHES, memory)

    def predict(self, metrics: Mapping[str, float], workers: int) -> list[str]:
        found = f"pairs at the threshold of {self.threshold} are found with probability"
        lines = [f"{found} {self.chance(self.threshold):.3f} ({self.bands} bands of {self.rows} rows)"]
        if "kept" in metrics and "bytes_out" in metrics:
            lines += forecast(self.near_search(), metrics["kept"], metrics["bytes_out"], workers).lines()
        return lines


def dedup(config: DedupConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Copy ``inputs["clean"]`` shard by shard without duplicates; ``removed.parquet`` says what each one repeats."""
    shards = shard_paths(inputs["clean"])
    removal = find_duplicates(config, shards, out / "scratch", context)
    unique = out / "scratch" / "unique" if config.spans else out
    tallies = context.map(
        partial(write_shard_without, removal, unique, out / "scratch" / "removed"),
        list(enumerate(shards)),
        names=[f"write {shard.stem}" for shard in shards],
    )
    context.progress(6, 6, "passes")
    join_removed(removal.signed, out / "scratch" / "removed", out / "removed.parquet")
    cut_short = count_cut_short(removal)
    if cut_short:
        context.note(
            f"the search for duplicates of {cut_short} kept documents ended early, after {MATCHES} matches or "
            f"dedup.max_comparisons = {config.max_comparisons} comparisons: some near-duplicates may be left",
            warning=True,
        )
    spans = cut_spans(config.spans, config.runtime.memory_mb, shards, out, context) if config.spans else None
    clusters = count_clusters(removal, out / "scratch" / "clusters.i8")
    return summarise(config, removal.signed, shards, tallies, clusters, cut_short, spans, out)


def find_duplicates(
    config: DedupConfig, shards: Sequence[Path], scratch: Path, context: StageContext
) -> Removal:
    """Sign, search, verify and decide; everything on disk under ``scratch``."""
    names = [shard.stem for shard in shards]
    context.progress(0, 6, "passes")
    rules = SignRules(
        config.ngram, config.bands, config.rows, config.seed, config.prefer, config.quality_field
    )
    sign = partial(sign_shard, rules, scratch / "signed")
    tallies = context.map(sign, shards, names=[f"sign {name}" for name in names])
    signed = Signed.of(scratch / "signed", shards, tallies)
    context.progress(1, 6, "passes")
    memory = config.runtime.memory_mb * 10**6
    whole = DIGEST_ENTRIES
    text = Search("text", bands=1, rows=whole, least=whole, likely=whole, leaders=1, most=1, memory=memory)
    copies = search_all(text, signed, None, scratch / "copies", context)
    copy_of = save_copies(copies, signed.documents, scratch / "copy-of.npy")
    context.progress(2, 6, "passes")
    found = search_all(config.near_search(), signed, copy_of, scratch / "found", context)
    context.progress(3, 6, "passes")
    edges = verify(config, shards, signed, found, scratch, context)
    decide(edges, signed.documents, scratch / "repeats.npy")
    context.progress(5, 6, "passes")
    return Removal(
        signed, copy_of, scratch / "repeats.npy", tuple(path.with_suffix(".cut") for path in found)
    )


def search_all(
    search: Search, signed: Signed, copies: Path | None, folder: Path, context: StageContext
) -> list[Path]:
    """Files of the edges found, by partition of the keys; of how many there are nothing depends but memory."""
    parts = search.parts(signed.documents)
    items = [(number, parts) for number in range(parts)]
    crowds = NO_KEYS
    if search.bands > 1 and signed.documents > search.leaders:
        names = [f"crowds {number}" for number in range(parts)]
        found = context.map(partial(find_crowds, search, signed, copies), items, names=names)
        crowds = np.array(list(chain.from_iterable(found)), np.uint64)
    work = partial(search_part, search, signed, copies, crowds, folder)
    context.map(work, items, names=[f"match {search.kind} {number}" for number in range(parts)])
    return [folder / f"{number:05d}-of-{parts:05d}.edges" for number in range(parts)]


def save_copies(edges: Sequence[Path], documents: int, path: Path) -> Path:
    """Write for each document the row of the preferred one with the same text, or `NONE` where it is that itself."""
    if not path.exists():
        with atomic_path(path) as temporary:
            copy_of = np.lib.format.open_memmap(temporary, "w+", np.int64, (documents,))
            copy_of[:] = NONE
            for chunk in read_chunks(edges):
                copy_of[chunk["loser"]] = chunk["winner"]
            copy_of.flush()
    return path


def verify(
    config: DedupConfig,
    shards: Sequence[Path],
    signed: Signed,
    found: Sequence[Path],
    scratch: Path,
    context: StageContext,
) -> list[Path]:
    """Files of the edges that hold. Shingle sets are made for the documents that signatures leave open, no others."""
    certain = config.threshold + margin(config.threshold, config.permutations)
    rules = VerifyRules(
        config.ngram, config.seed, config.threshold, certain, config.runtime.memory_mb * 10**6
    )
    marks = save_marks(certain, found, signed.documents, scratch / "open.npy")
    marked = np.load(marks, mmap_mode="r")
    bounds = pairwise(signed.first_row.tolist())
    items = [(shard, a) for shard, (a, b) in zip(shards, bounds, strict=True) if marked[a:b].any()]
    sets = Sets(signed, scratch / "sets")
    names = [f"shingles of {shard.stem}" for shard, _ in items]
    context.map(partial(save_sets, rules, sets.folder, marks), items, names=names)
    context.progress(4, 6, "passes")
    files = [path for path in found if path.stat().st_size]
    work = partial(verify_edges, rules, sets, scratch / "verified")
    context.map(work, files, names=[f"verify {path.stem}" for path in files])
    return [scratch / "verified" / path.name for path in files]


def save_marks(certain: float, found: Sequence[Path], documents: int, path: Path) -> Path:
    """Write which documents have an edge that signatures leave open."""
    if not path.exists():
        with atomic_path(path) as temporary:
            marks = np.lib.format.open_memmap(temporary, "w+", np.bool_, (documents,))
            mark_open(certain, found, marks)
            marks.flush()
    return path


def count_cut_short(removal: Removal) -> int:
    """Kept documents that were not compared with all that may be their duplicates."""
    repeats = np.load(removal.repeats, mmap_mode="r")
    cut = np.zeros(0, np.int64)
    for path in removal.cut:
        rows = np.unique(read_raw(path, np.dtype(np.int64)))
        cut = np.union1d(cut, rows[repeats["of"][rows] == NONE])
    return len(cut)


def cut_spans(
    rules: SpanRules, memory_mb: int, shards: Sequence[Path], out: Path, context: StageContext
) -> SpanTally:
    """Cut repeated spans out of the documents that are left."""
    scratch = out / "scratch"
    unique = [scratch / "unique" / shard.name for shard in shards]
    memory_mb *= context.workers  # that of all workers together
    return cut_repeats(rules, unique, scratch / "spans", out, context, memory_mb)
