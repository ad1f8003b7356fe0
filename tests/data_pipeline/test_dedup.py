from __future__ import annotations

import os
import random
import re
import resource
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import WORDS, check_restarts, digests, prose, read_documents, write_documents
from plain_words import SYLLABLES, run_of
from pydantic import ValidationError

from data_pipeline.dedup.candidates import Finder, Search
from data_pipeline.dedup.config import DedupConfig
from data_pipeline.dedup.forecast import forecast
from data_pipeline.dedup.removal import REMOVED, join_groups, merged, read_mapped
from data_pipeline.dedup.stage import dedup
from data_pipeline.documents import write_shard
from data_pipeline.stage import LocalContext


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
    short = {"short/a": "one two", "short/b": "One, two.", "short/c": "two one", "short/d": "one two"}
    return texts | short | {"none/a": "!!!", "none/b": "???", "none/c": "!!!"}


def run(texts: Any, folder: Path, shards: int = 3, workers: int = 1, **options: Any) -> dict[str, float]:
    source = write_documents(folder / "in", texts, shards)
    return dedup(DedupConfig(**options), {"documents": source}, folder / "out", LocalContext(workers))


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
            assert row["jaccard"] == pytest.approx(
                measured, abs=1e-9 if row["measured"] == "shingles" else 0.1
            )
            assert measured >= 0.8
    assert {row["measured"] for row in gone.values()} == {"text", "shingles", "signatures"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def cheaper(a, b):\n    return a < b", "def cheaper(a, b):\n    return a > b"),
        ("x = a + b", "x = a - b"),
        ("if a == b: stop()", "if a != b: stop()"),
        ("y = -x", "y = x"),
        ("ready = !done;", "ready = done;"),
        ("a / b", "a % b"),
        ("a & b", "a | b"),
        ("p->next", "p.next"),
        ("x ≤ y", "x ≥ y"),
        ("it was good 👍", "it was good 👎"),
        ("it costs 5 $", "it costs 5 €"),
        ("价格 < 十", "价格 > 十"),
    ],
)
def test_short_texts_that_differ_in_their_operators_all_stay(one: str, other: str, tmp_path: Path) -> None:
    run({"a/one": one, "a/other": other}, tmp_path / "symbols")
    assert len(read_documents(tmp_path / "symbols" / "out")) == 2
    run({"a/one": one, "a/other": other}, tmp_path / "all", signs="all")
    assert len(read_documents(tmp_path / "all" / "out")) == 2


def test_signs_are_told_from_each_other_as_the_config_says(tmp_path: Path) -> None:
    texts = {"a/1": "f(x) is good", "a/2": "f[x] is good", "a/3": "f(x) is good?", "a/4": "F x, is “good”"}
    kept = {}
    for signs in ("none", "symbols", "all"):
        run(texts, tmp_path / signs, signs=signs)
        kept[signs] = len(read_documents(tmp_path / signs / "out"))
    assert kept == {"none": 1, "symbols": 2, "all": 4}


def test_the_same_words_in_texts_that_differ_are_not_called_the_same_text(tmp_path: Path) -> None:
    text = prose(3, 100)
    run({"a/1": text, "a/2": text.upper(), "a/3": text.replace(".", ","), "a/4": text}, tmp_path)
    found = {(row["kind"], row["jaccard"], row["measured"]) for row in removed(tmp_path).values()}
    assert found == {("near", 1.0, "signatures"), ("exact", 1.0, "text")}
    assert "have the same shingles" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("script", SYLLABLES)
def test_near_duplicates_are_found_in_scripts_without_spaces_too(script: str, tmp_path: Path) -> None:
    draw = random.Random(script)
    texts = {f"own/{n}": run_of(script, 400, draw) for n in range(4)}
    texts["near"] = [*texts["own/0"]]
    for at in (50, 200, 350):
        texts["near"][at] = texts["own/1"][at]
    run({id: "".join(pieces) for id, pieces in texts.items()}, tmp_path)
    assert set(removed(tmp_path)) in ({"near"}, {"own/0"})


@pytest.mark.parametrize("script", SYLLABLES)
def test_repeated_spans_are_cut_in_scripts_without_spaces_too(script: str, tmp_path: Path) -> None:
    draw = random.Random(script)
    shared = "".join(run_of(script, 70, draw))
    own = ["".join(run_of(script, 200, draw)) for _ in range(4)]
    texts = {"a": own[0] + shared + own[1], "b": own[2] + shared + own[3]}
    run(texts, tmp_path, spans={"min_words": 50})
    left = "".join(read_documents(tmp_path / "out").values())
    assert left.count(shared[10:-10]) == 1
    assert all(one[5:-5] in left for one in own)


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
    one, four = tmp_path / "1", tmp_path / "4"
    assert run(planted(), one) == run(planted(), four, workers=4)
    assert digests(one / "out") == digests(four / "out")


def test_how_documents_lie_in_shards_does_not_change_which_are_kept(tmp_path: Path) -> None:
    items = list(planted().items())
    run(items, tmp_path / "a")
    random.Random(1).shuffle(items)
    run(items, tmp_path / "b", shards=7)
    run(items[::-1], tmp_path / "c", shards=1)
    kept = read_documents(tmp_path / "a" / "out")
    sealed = digests(tmp_path / "a" / "out")
    for name in "bc":
        assert read_documents(tmp_path / name / "out") == kept
        other = digests(tmp_path / name / "out")
        assert other["removed.parquet"] == sealed["removed.parquet"]
        assert other["report.md"] == sealed["report.md"]


def crowd() -> dict[str, str]:
    """Texts that are much alike, most of them near-duplicates, and in the same buckets; others with a copy each."""
    shared = prose(0, 300)
    texts = {f"crowd/{n:04d}": f"{shared} new{n}" for n in range(700)}
    texts |= {f"tail/{n:03d}": f"{shared} {prose(n, 5 + n // 2)}" for n in range(100)}
    return texts | {f"more/{n:03d}": prose(1000 + n // 2, 60) for n in range(200)}


def test_memory_does_not_change_what_is_kept(tmp_path: Path) -> None:
    """With a megabyte ranges of hashes are halved and crowded buckets go through in pieces; with 512, never."""
    options = {"max_comparisons": 120, "threshold": 0.9}
    metrics = run(crowd(), tmp_path / "much", **options)
    assert 150 < metrics["kept"] < 250
    pieces = []
    compare = Finder.compare

    def counting(finder: Finder, keys: Any, *rows: Any) -> Any:
        pieces.append(isinstance(keys, int))
        return compare(finder, keys, *rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finder, "compare", counting)
        patch.setattr(Search, "partitions", lambda *_: 1)
        run(crowd(), tmp_path / "little", runtime={"memory_mb": 1}, **options)
    assert sum(pieces) > 10, "no bucket was too large"
    assert pieces.count(False) > 1, "no range was too large"
    assert digests(tmp_path / "much" / "out") == digests(tmp_path / "little" / "out")


def test_a_killed_dedup_ends_the_same_when_started_again(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "in", planted())
    check_restarts(dedup, DedupConfig(), {"documents": source}, tmp_path)


def test_empty_shards_stay_and_a_corpus_without_words_passes(tmp_path: Path) -> None:
    run({"a/1": "?", "a/2": "!"}, tmp_path, shards=5)
    assert len(list((tmp_path / "out").glob("documents-*"))) == 5
    assert set(read_documents(tmp_path / "out")) == {"a/1", "a/2"}


def test_open_files_do_not_grow_with_the_shards(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "in", planted(), shards=60)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        metrics = dedup(DedupConfig(), {"documents": source}, tmp_path / "out", LocalContext())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert metrics["removed/near"] > 0


def test_a_bucket_of_hundreds_is_compared_within_bounds_and_the_cut_is_told(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    shared = [f"w{n}" for n in range(60)]
    texts = {f"a/{n:04d}": " ".join([*shared, *map(str, draw.integers(0, 10**9, 40))]) for n in range(300)}
    source = write_documents(tmp_path / "in", texts)
    context = LocalContext()
    options = {"threshold": 0.9, "bands": 56, "rows": 2, "max_comparisons": 3}
    metrics = dedup(DedupConfig(**options), {"documents": source}, tmp_path / "out", context)
    assert metrics["kept"] == 300
    assert "max_comparisons = 3" in context.notes[0]
    assert "max_comparisons" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(("own_words", "max_comparisons"), [(60, 10_000), (100, 200)])
def test_boilerplate_does_not_hide_duplicates(tmp_path: Path, own_words: int, max_comparisons: int) -> None:
    """All share their first words: at about 0.65 with many a doubtful match, or in buckets with too many to compare."""
    boilerplate, texts = prose(0, 200), {}
    for n in range(2500):
        own = random.Random(n).choices(range(50_000), k=own_words)
        texts[f"own/{n:04d}"] = f"{boilerplate} {' '.join(map(str, own))}"
        if n % 10 == 0:
            texts[f"twin/{n:04d}"] = f"{boilerplate} {' '.join(map(str, own[:-1]))} edited"
    run(texts, tmp_path, max_comparisons=max_comparisons)
    kept = set(read_documents(tmp_path / "out"))
    twins = [n for n in range(0, 2500, 10) if {f"own/{n:04d}", f"twin/{n:04d}"} <= kept]
    assert len(twins) <= 2
    assert len(kept) >= 2500 - 2


def templates(pages: int, words: int, own: int, seed: int) -> dict[str, str]:
    """Pages of one template, with some words of their own each, and of each a twin in which one more word differs."""
    template, texts = prose(seed, words), {}
    for n in range(pages):
        texts[f"page/{n:03d}"] = edited(template, own, 1000 * seed + n)
        texts[f"twin/{n:03d}"] = edited(texts[f"page/{n:03d}"], 1, 1000 * seed + 500 + n)
    return texts


def kept_by_brute_force(texts: dict[str, str], threshold: float, prefer: str = "longest") -> set[str]:
    """Every document that repeats none of those that are kept before it, in order of preference."""
    sets, kept = {id: shingles(text) for id, text in texts.items()}, []
    for id in sorted(texts, key=lambda id: (-len(texts[id].encode()) if prefer == "longest" else 0, id)):
        least = threshold * len(sets[id])
        close = [one for one in kept if len(sets[id] & sets[one]) >= least]
        if not any(len(sets[id] & sets[one]) / len(sets[id] | sets[one]) >= threshold for one in close):
            kept.append(id)
    return set(kept)


@pytest.mark.parametrize(
    ("pages", "words", "own", "threshold", "prefer"),
    [
        (60, 600, 2, 0.97, "longest"),
        (60, 300, 3, 0.95, "longest"),
        (60, 300, 12, 0.8, "longest"),
        (100, 150, 2, 0.93, "first"),
        (60, 40, 1, 0.88, "longest"),
    ],
)
def test_of_small_corpora_of_templates_that_is_kept_which_brute_force_keeps(
    pages: int, words: int, own: int, threshold: float, prefer: str, tmp_path: Path
) -> None:
    """Many pairs just under the threshold must not end the search for those above it."""
    texts = {
        f"{seed}/{id}": text for seed in (0, 1) for id, text in templates(pages, words, own, seed).items()
    }
    run(texts, tmp_path, threshold=threshold, prefer=prefer, bands=60, rows=4)
    assert set(read_documents(tmp_path / "out")) == kept_by_brute_force(texts, threshold, prefer)


def test_hundreds_of_pages_of_one_template_stay_and_their_twins_go(tmp_path: Path) -> None:
    run(templates(400, 600, 2, 0), tmp_path, threshold=0.97, workers=2)
    kept = read_documents(tmp_path / "out")
    twice = [n for n in range(400) if {f"page/{n:03d}", f"twin/{n:03d}"} <= set(kept)]
    assert (len(kept), twice) == (400, [])
    assert "Warning" not in (tmp_path / "out" / "report.md").read_text()


def test_the_search_is_bounded_by_what_the_config_says() -> None:
    search = DedupConfig(max_comparisons=77, threshold=0.9).near_search()
    assert (search.leaders, search.likely, search.most) == (77, 114, 32)


def test_the_report_shows_the_largest_clusters_and_the_chance_of_finding_a_pair(tmp_path: Path) -> None:
    run(planted(), tmp_path)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "18 bands of 7 rows find a pair at the threshold with probability 0.986" in report
    assert len(re.findall(r"^\| 6 \| ", report, re.MULTILINE)) == 8


def test_a_pair_at_the_threshold_is_found_by_default_almost_always() -> None:
    assert DedupConfig().chance(DedupConfig().threshold) > 0.98
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        DedupConfig(seed=-1)


def test_of_duplicates_the_one_of_the_best_quality_stays(tmp_path: Path) -> None:
    """Those without a number come last; of equal quality the first by id stays."""
    text = prose(1, 300)
    quality = {"a/1": "{}", "a/2": '{"q": 2}', "a/3": '{"q": 3.5}', "a/4": '{"q": "9"}', "a/5": '{"q": 3.5}'}
    with write_shard(tmp_path / "in" / "documents-00000.parquet") as writer:
        for n, (id, meta) in enumerate(quality.items()):
            writer.add(id, edited(text, n, n), "a", meta)
        writer.add("b/1", prose(2, 50), "b", "not JSON")
        writer.add("b/2", prose(2, 50), "b", '{"q": -1}')
    config = DedupConfig(prefer="best", quality_field="q")
    dedup(config, {"documents": tmp_path / "in"}, tmp_path / "out", LocalContext())
    assert set(read_documents(tmp_path / "out")) == {"a/3", "b/2"}
    with pytest.raises(ValidationError, match="go together"):
        DedupConfig(prefer="best")
    with pytest.raises(ValidationError, match="go together"):
        DedupConfig(quality_field="q")


def naturals(count: int) -> dict[str, str]:
    """Texts and edited versions of them, of 8 to 400 words, whose similarities lie around the threshold."""
    draw, texts = random.Random(7), {}
    for n in range(count):
        base = prose(n, draw.choice([8, 20, 40, 100, 400]))
        words = len(base.split(" "))
        texts[f"base/{n:04d}"] = base
        for k in range(3):
            texts[f"like/{n:04d}-{k}"] = edited(base, min(words, draw.randrange(1 + words // 20)), n * 3 + k)
    return texts


def test_of_true_pairs_hardly_any_survives_and_whatever_is_removed_has_a_survivor(tmp_path: Path) -> None:
    """Against brute force: at most 1% of the pairs at 0.8 or above survive together, and none is removed in vain."""
    texts = naturals(400)
    run(texts, tmp_path)
    kept = set(read_documents(tmp_path / "out"))
    sets = {id: shingles(text) for id, text in texts.items()}
    by_shingle: dict[tuple[str, ...], list[str]] = {}
    for id, found in sets.items():
        for one in found:
            by_shingle.setdefault(one, []).append(id)
    pairs = {pair for ids in by_shingle.values() for pair in combinations(ids, 2)}
    alike = {(a, b): len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in pairs}
    near = [pair for pair, jaccard in alike.items() if jaccard >= 0.8]
    survivors = [pair for pair in near if kept.issuperset(pair)]
    assert len(near) > 800
    assert len(survivors) <= 0.01 * len(near)
    saved = {a for (a, b), jaccard in alike.items() if jaccard >= 0.8 and b in kept}
    saved |= {b for (a, b), jaccard in alike.items() if jaccard >= 0.8 and a in kept}
    assert set(texts) - kept <= saved


def test_ids_are_merged_in_ranges_as_if_sorted_at_once(tmp_path: Path) -> None:
    ids = [f"{n:05d}" for n in random.Random(3).sample(range(10**5), 5000)]
    parts = [
        pa.table({"id": sorted(part), "n": [int(id) for id in sorted(part)]})
        for part in (ids[:3000], ids[3000:3001], [], ids[3001:])
    ]
    pieces = list(merged([part.cast(pa.schema([("id", "string"), ("n", "int64")])) for part in parts], 400))
    assert max(len(piece) for piece in pieces) <= 500
    assert pa.concat_tables(pieces)["id"].to_pylist() == sorted(ids)


def test_any_number_of_files_is_merged_a_few_at_a_time(tmp_path: Path) -> None:
    ids = [f"{n:04d}" for n in random.Random(3).sample(range(10**4), 230)]
    paths = [tmp_path / f"{n}.arrow" for n in range(23)]
    for n, path in enumerate(paths):
        rows = [
            {"id": id, "duplicate_of": "a", "jaccard": 1.0, "kind": "exact", "measured": "text"}
            for id in sorted(ids[n::23])
        ]
        with pa.ipc.new_file(path, REMOVED) as writer:
            writer.write_table(pa.Table.from_pylist(rows, REMOVED))
    joined = join_groups(paths, at_once=50, most=4)
    assert len(joined) <= 4
    pieces = merged([read_mapped(path) for path in joined], 50)
    assert pa.concat_tables(pieces)["id"].to_pylist() == sorted(ids)


def test_repeated_spans_are_cut_from_what_is_left(tmp_path: Path) -> None:
    shared = prose(500, 80)
    texts = {f"a/{n}": f"{prose(n, 100)}\n\n{shared}\n\n{prose(50 + n, 100)}" for n in range(4)}
    metrics = run(texts | {"a/copy": texts["a/0"]}, tmp_path, spans={"min_words": 40})
    kept = read_documents(tmp_path / "out")
    assert set(kept) == {"a/0", "a/1", "a/2", "a/3"}
    assert sum(shared[100:300] in text for text in kept.values()) == 1
    assert metrics["spans/cut"] == 3
    assert metrics["bytes_out"] == sum(len(text.encode()) for text in kept.values())
    assert "## Repeated spans" in (tmp_path / "out" / "report.md").read_text()


def test_a_killed_dedup_with_spans_ends_the_same_when_started_again(tmp_path: Path) -> None:
    texts = {f"a/{n}": f"{prose(n, 60)} {prose(500, 80)}" for n in range(4)}
    source = write_documents(tmp_path / "in", texts, shards=1)
    config = DedupConfig(spans={"min_words": 50})
    check_restarts(dedup, config, {"documents": source}, tmp_path)


def test_a_plan_tells_what_a_run_will_need(tmp_path: Path) -> None:
    assert DedupConfig().predict({}, 2) == [
        "pairs at the threshold of 0.8 are found with probability 0.986 (18 bands of 7 rows)"
    ]
    _, disk, memory, time = DedupConfig().predict({"kept": 2e8, "bytes_out": 1e12}, 64)
    assert re.search(r"^\d+\.\d GB of scratch on disk, \d+ partitions", disk)
    assert "762.0 MB a worker" in memory
    assert re.search(r"about [\d,]+ s on 64 cores at a nominal \d+ MB/s a core", time)


def test_the_disk_that_is_told_is_what_a_run_takes(tmp_path: Path) -> None:
    """But for shingle sets, whose share depends on the text: within a quarter, for short documents."""
    metrics = run({f"a/{n:04d}": prose(n, 30) for n in range(3000)}, tmp_path)
    taken = sum(path.stat().st_size for path in (tmp_path / "out" / "scratch").rglob("*") if path.is_file())
    told = forecast(DedupConfig().near_search(), metrics["kept"], 0, 1).disk
    assert 0.75 < taken / told < 1.25
