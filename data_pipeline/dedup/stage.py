"""Stage ``dedup``: drop exact duplicates, and near-duplicates found by MinHash-LSH and verified.

A document is dropped only if a kept one, preferred to it, is its verified near-duplicate (Jaccard similarity of their
shingles at least ``threshold``), so of a chain A ~ B ~ C whose ends differ, both ends stay. All but a thin decision is
mapped over shards or over partitions of hashes, and what they hand over lies on disk. The outcome depends on texts,
ids and quality only, never on shards, workers or memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count, pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.core.files import atomic_path
from data_pipeline.dedup.candidates import (
    NO_KEYS,
    NONE,
    Again,
    Check,
    Corpus,
    Search,
    find_crowds,
    mark_partition,
    read_chunks,
    read_raw,
    search_partition,
)
from data_pipeline.dedup.config import DedupConfig
from data_pipeline.dedup.greedy import decide
from data_pipeline.dedup.removal import Removal, count_clusters, join_removed, write_shard_without
from data_pipeline.dedup.report import summarise
from data_pipeline.dedup.signed import DIGEST_ENTRIES, Signed, SignRules, sign_shard
from data_pipeline.dedup.spans import SpanRules, SpanTally, cut_repeats
from data_pipeline.dedup.verify import (
    Sets,
    VerifyRules,
    mark_open,
    save_sets,
    those_that_hold,
    verify_edges,
)
from data_pipeline.documents import save_array, shard_paths
from data_pipeline.stage import Metrics, StageContext

Result = TypeVar("Result")


def dedup(config: DedupConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Copy ``inputs["documents"]`` shard by shard without duplicates; ``removed.parquet`` lists what each repeats."""
    shards = shard_paths(inputs["documents"])
    removal, cut_short = find_duplicates(config, shards, out / "scratch", context)
    unique = out / "scratch" / "unique" if config.spans else out
    tallies = context.map(
        partial(write_shard_without, removal, unique, out / "scratch" / "removed"),
        list(enumerate(shards)),
        names=[f"write {shard.stem}" for shard in shards],
    )
    context.progress(6, 6, "passes")
    join_removed(removal.signed, out / "scratch" / "removed", out / "removed.parquet")
    if cut_short:
        context.note(
            f"the search for duplicates of {cut_short} kept documents ended early, after dedup.max_comparisons = "
            f"{config.max_comparisons} comparisons: some near-duplicates may be left",
            warning=True,
        )
    spans = cut_spans(config.spans, config.runtime.memory_mb, shards, out, context) if config.spans else None
    clusters = count_clusters(removal, out / "scratch" / "clusters.i8")
    return summarise(config, removal.signed, shards, tallies, clusters, cut_short, spans, out)


def find_duplicates(
    config: DedupConfig, shards: Sequence[Path], scratch: Path, context: StageContext
) -> tuple[Removal, int]:
    """Sign, search, verify and decide; everything on disk under ``scratch``.

    Returns:
        What was decided, and how many kept documents were not compared with all that they may repeat.
    """
    names = [shard.stem for shard in shards]
    context.progress(0, 6, "passes")
    rules = SignRules(
        ngram=config.ngram,
        signs=config.signs,
        bands=config.bands,
        rows=config.rows,
        seed=config.seed,
        prefer=config.prefer,
        quality_field=config.quality_field,
    )
    sign = partial(sign_shard, rules, scratch / "signed")
    tallies = context.map(sign, shards, names=[f"sign {name}" for name in names])
    signed = Signed.of(scratch / "signed", shards, tallies)
    context.progress(1, 6, "passes")
    copy_of = find_copies(config, signed, scratch, context)
    context.progress(2, 6, "passes")
    near = config.near_search()
    corpus = Corpus(signed=signed, copies=copy_of)
    corpus = replace(corpus, crowds=find_all_crowds(near, corpus, context))
    found = search_all(near, corpus, scratch / "found", context)
    context.progress(3, 6, "passes")
    edges = verify(config, shards, signed, found, scratch, context)
    decide(edges, signed.documents, scratch / "repeats.npy")
    repeats, cut_short = search_again(config, shards, corpus, found, edges, scratch, context)
    context.progress(5, 6, "passes")
    return Removal(signed, copy_of, repeats), cut_short


def find_copies(config: DedupConfig, signed: Signed, scratch: Path, context: StageContext) -> Path:
    """Search for documents with the very same text; see `save_copies`."""
    text = Search(
        kind="text",
        bands=1,
        rows=DIGEST_ENTRIES,
        least=DIGEST_ENTRIES,
        likely=DIGEST_ENTRIES,
        leaders=1,
        most=1,
        memory=config.runtime.memory_mb * 10**6,
    )
    copies = search_all(text, Corpus(signed=signed), scratch / "copies", context)
    return save_copies(copies, signed.documents, scratch / "copy-of.npy")


def find_all_crowds(search: Search, corpus: Corpus, context: StageContext) -> NDArray[np.uint64]:
    """Return the keys of all crowds, ascending: none where there are too few documents for one."""
    if corpus.signed.documents <= search.leaders:
        return NO_KEYS
    work = partial(find_crowds, search, corpus)
    return np.array(
        list(chain.from_iterable(map_partitions("crowds", work, search, corpus, context))), np.uint64
    )


def search_all(
    search: Search, corpus: Corpus, folder: Path, context: StageContext, check: Check | None = None
) -> list[Path]:
    """Return files of the edges found, by partition of the keys; of how many there are nothing depends but memory."""
    work = partial(search_partition, search, corpus, folder, check)
    map_partitions(f"match {search.kind}", work, search, corpus, context)
    return partition_paths(search, corpus, folder, "edges")


def map_partitions(
    name: str,
    work: Callable[[tuple[int, int]], Result],
    search: Search,
    corpus: Corpus,
    context: StageContext,
) -> list[Result]:
    """Return the results of ``work`` for all partitions of the keys (number, of how many)."""
    partitions = search.partitions(corpus.signed.documents)
    items = [(number, partitions) for number in range(partitions)]
    return context.map(work, items, names=[f"{name} {number}" for number in range(partitions)])


def partition_paths(search: Search, corpus: Corpus, folder: Path, kind: str) -> list[Path]:
    """Return the files that the partitions of the keys have written."""
    partitions = search.partitions(corpus.signed.documents)
    return [folder / f"{number:05d}-of-{partitions:05d}.{kind}" for number in range(partitions)]


def search_again(
    config: DedupConfig,
    shards: Sequence[Path],
    corpus: Corpus,
    found: Sequence[Path],
    edges: Sequence[Path],
    scratch: Path,
    context: StageContext,
) -> tuple[Path, int]:
    """Compare kept documents whose search ended early with all that they may repeat, until there are none (`Again`).

    Pairs just under the threshold are likely by their signatures, so many of them end a first search before it comes to
    a document's true duplicate. Most documents whose search ended early are removed; this is about those that are not.

    Args:
        found: what the first search wrote.
        edges: files of those that hold; ``repeats.npy`` in ``scratch`` holds what was decided by them.

    Returns:
        Path of what is decided in the end, and how many kept documents met `DedupConfig.max_comparisons`.
    """
    search = replace(config.near_search(), most=config.max_comparisons)
    rules, repeats = config.verify_rules(), scratch / "repeats.npy"
    incomplete = rows_cut(found, corpus.signed.documents)
    searched = np.zeros_like(incomplete)
    for turn in count(1):
        kept = np.load(repeats, mmap_mode="r")["of"] == NONE
        seekers = incomplete & kept & ~searched
        if not seekers.any():
            break
        folder = scratch / f"again-{turn}"
        again = Again(seekers=folder / "seekers.npy", kept=folder / "kept.npy")
        save_array(again.seekers, seekers)
        save_array(again.kept, kept)
        those = replace(corpus, again=again)
        map_partitions(
            "mark", partial(mark_partition, search, those, folder / "marks"), search, corpus, context
        )
        marks = save_rows(
            partition_paths(search, corpus, folder / "marks", "rows"), len(kept), folder / "open.npy"
        )
        sets = write_sets(rules, shards, corpus.signed, marks, folder / "sets", context)
        check = partial(those_that_hold, rules, sets)
        found = search_all(search, those, folder / "found", context, check)
        edges = [save_others(edges, seekers, folder / "others.edges"), *found]
        repeats = folder / "repeats.npy"
        decide(edges, len(kept), repeats)
        searched |= seekers
        incomplete = (incomplete & ~seekers) | rows_cut(found, len(kept))
    return repeats, int((incomplete & kept).sum())


def rows_cut(found: Sequence[Path], documents: int) -> NDArray[np.bool_]:
    """Find which documents were not compared with all that they may repeat, by row."""
    cut = np.zeros(documents, np.bool_)
    for path in found:
        cut[read_raw(path.with_suffix(".cut"), np.dtype(np.int64))] = True
    return cut


def save_rows(paths: Sequence[Path], documents: int, path: Path) -> Path:
    """Write which documents the files name, by row."""
    if not path.exists():
        marks = np.zeros(documents, np.bool_)
        for one in paths:
            marks[read_raw(one, np.dtype(np.int64))] = True
        save_array(path, marks)
    return path


def save_others(edges: Sequence[Path], seekers: NDArray[np.bool_], path: Path) -> Path:
    """Write the edges but those of documents that are searched for again."""
    if not path.exists():
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            for chunk in read_chunks(edges):
                chunk[~seekers[chunk["loser"]]].tofile(file)
    return path


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
    """Return files of the edges that hold. Shingle sets are made for the documents that signatures leave open, no
    others."""
    rules = config.verify_rules()
    marks = save_marks(rules.certain, found, signed.documents, scratch / "open.npy")
    sets = write_sets(rules, shards, signed, marks, scratch / "sets", context)
    context.progress(4, 6, "passes")
    files = [path for path in found if path.stat().st_size]
    work = partial(verify_edges, rules, sets, scratch / "verified")
    context.map(work, files, names=[f"verify {path.stem}" for path in files])
    return [scratch / "verified" / path.name for path in files]


def write_sets(
    rules: VerifyRules,
    shards: Sequence[Path],
    signed: Signed,
    marks: Path,
    folder: Path,
    context: StageContext,
) -> Sets:
    """Write the shingle sets of all documents that are marked."""
    marked = np.load(marks, mmap_mode="r")
    bounds = pairwise(signed.first_row.tolist())
    items = [(shard, a) for shard, (a, b) in zip(shards, bounds, strict=True) if marked[a:b].any()]
    names = [f"shingles of {shard.stem}" for shard, _ in items]
    context.map(partial(save_sets, rules, folder, marks), items, names=names)
    return Sets(signed, folder)


def save_marks(certain: float, found: Sequence[Path], documents: int, path: Path) -> Path:
    """Write which documents have an edge that signatures leave open."""
    if not path.exists():
        with atomic_path(path) as temporary:
            marks = np.lib.format.open_memmap(temporary, "w+", np.bool_, (documents,))
            mark_open(certain, found, marks)
            marks.flush()
    return path


def cut_spans(
    rules: SpanRules, memory_mb: int, shards: Sequence[Path], out: Path, context: StageContext
) -> SpanTally:
    """Cut repeated spans out of the documents that are left."""
    scratch = out / "scratch"
    unique = [scratch / "unique" / shard.name for shard in shards]
    memory_mb *= context.workers  # that of all workers together
    return cut_repeats(rules, unique, scratch / "spans", out, context, memory_mb)
