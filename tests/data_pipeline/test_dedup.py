from __future__ import annotations

import os
import random
import re
import resource
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpora import WORDS, check_restarts, digests, prose, read_documents, write_documents
from pydantic import ValidationError

from data_pipeline.context import LocalContext
from data_pipeline.dedup import DedupConfig, dedup


def edited(text: str, edits: int, seed: int) -> str:
    """``text`` with some words replaced."""
    words, draw = text.split(" "), random.Random(seed)
    for at in draw.sample(range(len(words)), edits):
        words[at] = f"edit{draw.randrange(10**6)}"
    return " ".join(words)


def shingles(text: str) -> set[tuple[str, ...]]:
    """5-word shingles, by another way than the kernel's."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + 5]) for at in range(max(1, len(words) - 4))} if words else set()


def similarity(one: str, other: str) -> float:
    first, second = shingles(one), shingles(other)
    return len(first & second) / max(1, len(first | second))


def planted() -> dict[str, str]:
    """Forty texts of their own; of eight of them four near and two exact copies; short and wordless texts."""
    texts = {f"own/{n:02d}": prose(n, 600) for n in range(40)}
    for n in range(8):
        texts |= {f"near/{n:02d}-{k}": edited(texts[f"own/{n:02d}"], 1 + k, 100 * n + k) for k in range(4)}
        texts |= {f"copy/{n:02d}-{k}": texts[f"own/{n:02d}"] for k in range(2)}
    short = {"short/a": "one two", "short/b": "One, two!", "short/c": "two one", "short/d": "one two"}
    return texts | short | {"none/a": "!!!", "none/b": "???", "none/c": "!!!"}


def run(texts: Any, folder: Path, shards: int = 3, workers: int = 1, **options: Any) -> dict[str, float]:
    source = write_documents(folder / "in", texts, shards)
    return dedup(DedupConfig(**options), {"clean": source}, folder / "out", LocalContext(workers))


def removed(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(folder / "out" / "removed.parquet").to_pylist()}


def test_planted_clusters_keep_one_document_each_and_all_others_stay(tmp_path: Path) -> None:
    texts = planted()
    metrics = run(texts, tmp_path)
    kept = read_documents(tmp_path / "out")
    clusters = [
        [id for id in texts if id[5:7] == f"{n:02d}" and id[:4] in ("near", "copy")] + [f"own/{n:02d}"]
        for n in range(8)
    ]
    for cluster in clusters:
        assert len(cluster) == 7
        assert len(set(cluster) & set(kept)) == 1
    assert {id for id in texts if id.startswith("own/")} - set().union(*clusters) <= set(kept)
    assert {id for id in kept if id.startswith("short/")} == {"short/b", "short/c"}  # b is the longer one
    assert {id for id in kept if id.startswith("none/")} == {"none/a", "none/b"}
    assert metrics["kept"] == len(kept)
    assert metrics["kept"] + metrics["removed/exact"] + metrics["removed/near"] == len(texts)


def test_every_removed_document_repeats_a_kept_one_as_much_as_is_said(tmp_path: Path) -> None:
    texts = planted()
    run(texts, tmp_path)
    kept = read_documents(tmp_path / "out")
    gone = removed(tmp_path)
    assert set(gone) == set(texts) - set(kept)
    for id, row in gone.items():
        assert row["duplicate_of"] in kept
        if row["kind"] == "exact":
            assert texts[id] == texts[row["duplicate_of"]]
            assert row["jaccard"] == 1
        else:
            measured = similarity(texts[id], texts[row["duplicate_of"]])
            assert row["jaccard"] == pytest.approx(measured, abs=1e-9 if row["measured"] == "exact" else 0.1)
            assert measured >= 0.8
    assert {row["measured"] for row in gone.values()} == {"exact", "estimate"}


def test_no_pair_that_is_left_is_much_alike(tmp_path: Path) -> None:
    run(planted(), tmp_path)
    kept = read_documents(tmp_path / "out")
    assert max(similarity(one, other) for one, other in combinations(kept.values(), 2)) < 0.85


def test_of_a_chain_whose_ends_differ_both_ends_are_kept(tmp_path: Path) -> None:
    words = [f"{WORDS[n % 60]}{n}" for n in range(1000)]
    middle = " ".join(words[:900])
    first, last = " ".join(words[40:900]), " ".join(words[:860])
    chain = {"c/first": first, "c/last": last, "c/middle": middle}
    assert min(similarity(first, middle), similarity(middle, last)) > 0.93 > 0.92 > similarity(first, last)
    options = {"threshold": 0.93, "bands": 28, "rows": 4}
    run(chain, tmp_path / "longest", **options)
    assert set(read_documents(tmp_path / "longest" / "out")) == {"c/middle"}
    # In order of id the first end is taken first and the last is not like it: the middle alone must go.
    run(chain, tmp_path / "first", prefer="first", **options)
    assert set(read_documents(tmp_path / "first" / "out")) == {"c/first", "c/last"}
    assert removed(tmp_path / "first")["c/middle"]["duplicate_of"] in ("c/first", "c/last")


def test_a_copy_of_a_removed_document_repeats_the_document_that_is_kept(tmp_path: Path) -> None:
    long = prose(1, 400)
    near = " ".join(long.split(" ")[:-10])
    run({"a/long": long, "a/near": near, "a/near-copy": near}, tmp_path)
    gone = removed(tmp_path)
    assert set(gone) == {"a/near", "a/near-copy"}
    assert {row["duplicate_of"] for row in gone.values()} == {"a/long"}
    assert {row["kind"] for row in gone.values()} == {"near"}


def test_worker_count_does_not_change_the_shards(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    assert run(planted(), one) == run(planted(), two, workers=2)
    assert digests(one / "out") == digests(two / "out")


def test_how_documents_lie_in_shards_does_not_change_which_are_kept(tmp_path: Path) -> None:
    items = list(planted().items())
    run(items, tmp_path / "a")
    random.Random(1).shuffle(items)
    run(items, tmp_path / "b", shards=7)
    assert read_documents(tmp_path / "a" / "out") == read_documents(tmp_path / "b" / "out")
    sealed = [digests(tmp_path / name / "out") for name in "ab"]
    assert sealed[0]["removed.parquet"] == sealed[1]["removed.parquet"]
    assert sealed[0]["report.md"] == sealed[1]["report.md"]


def test_a_killed_dedup_ends_the_same_when_started_again(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "in", planted())
    check_restarts(dedup, DedupConfig(), {"clean": source}, tmp_path)


def test_empty_shards_stay_and_a_corpus_without_words_passes(tmp_path: Path) -> None:
    run({"a/1": "?", "a/2": "!"}, tmp_path, shards=5)
    assert len(list((tmp_path / "out").glob("documents-*"))) == 5
    assert set(read_documents(tmp_path / "out")) == {"a/1", "a/2"}


def test_open_files_do_not_grow_with_the_shards(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "in", planted(), shards=60)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        metrics = dedup(DedupConfig(), {"clean": source}, tmp_path / "out", LocalContext())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert metrics["removed/near"] > 0


def test_a_bucket_of_thousands_is_compared_within_bounds_and_the_cut_is_told(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    shared = [f"w{n}" for n in range(60)]
    texts = {f"a/{n:04d}": " ".join([*shared, *map(str, draw.integers(0, 10**9, 40))]) for n in range(300)}
    source = write_documents(tmp_path / "in", texts)
    context = LocalContext()
    options = {"threshold": 0.9, "bands": 56, "rows": 2, "max_comparisons": 3}
    metrics = dedup(DedupConfig(**options), {"clean": source}, tmp_path / "out", context)
    assert metrics["kept"] == 300
    assert "max_comparisons = 3 cut" in context.notes[0]
    assert "max_comparisons" in (tmp_path / "out" / "report.md").read_text()


def test_the_report_shows_the_largest_clusters_and_the_chance_of_finding_a_pair(tmp_path: Path) -> None:
    run(planted(), tmp_path)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "18 bands of 7 rows find a pair at the threshold with probability 0.986" in report
    assert len(re.findall(r"^\| 6 \| ", report, re.MULTILINE)) == 8


def test_a_pair_at_the_threshold_is_found_by_default_almost_always() -> None:
    assert DedupConfig().chance(DedupConfig().threshold) > 0.98
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        DedupConfig(seed=-1)
