"""The benchmarks run, without peers and on little text, and what they measure with is right."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks` is no installed package: its commands run in the repository's root."""
    monkeypatch.syspath_prepend(str(ROOT))


def run(name: str, folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--no-peers", "--repeats", "1", "--megabytes", "1"]
    command += ["--work", str(folder / "work"), "--results", str(folder / "results"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert (folder / "results" / f"{name}.md").read_text() in done.stdout
    found: dict[str, Any] = json.loads((folder / "results" / f"{name}.json").read_text())
    return found


@pytest.mark.long
def test_the_line_is_timed_by_stage(tmp_path: Path) -> None:
    stages = run("pipeline", tmp_path, "--megabytes", "8")["stages"]
    assert [row["stage"] for row in stages] == [
        "download",
        "clean",
        "dedup",
        "train_tokenizer",
        "tokenize",
        "all",
    ]
    assert stages[-1]["seconds"] == pytest.approx(sum(row["seconds"] for row in stages[:-1]))
    for row in stages[:-1]:
        shares = [row[f"{name} %"] for name in ("hot loop", "importing", "driver alone", "workers idle")]
        assert sum(shares) == pytest.approx(100)
        assert 0 < row["hot loop %"] < 100
    assert not (tmp_path / "work" / "pipeline").exists()


def test_the_main_text_of_pages_is_timed_and_compared_with_what_is_known(tmp_path: Path) -> None:
    found = run("html", tmp_path, "--of-each", "1")
    assert found["settings"]["pages"] == 9 * 7
    assert found["quality"][0]["F"] > 0.9
    assert found["speed"][0]["pages/s"] > 0


@pytest.mark.long
def test_the_loader_is_timed_by_tokens(tmp_path: Path) -> None:
    found = run("loader", tmp_path, "--megabytes", "8", "--tokens", "1000000", "--vocab-size", "4096")
    for key, batch in (("context_256", 256 * 32), ("context_1024", 1024 * 512)):
        plain, documents = found[key]
        assert plain["million tokens read"] == -(-1_000_000 // batch) * batch / 1e6
        assert min(plain["million tokens/s"], documents["million tokens/s"]) > 0
        assert plain["llmill / this"] == 1


@pytest.mark.long
def test_planted_near_duplicates_are_judged_by_true_similarity(tmp_path: Path) -> None:
    found = run("quality", tmp_path, "--no-natural", "--planted", "30")
    (ours,) = found["planted"]
    assert ours["near pairs"] > 10
    assert ours["removed"] > 0
    assert ours["missed %"] <= 5
    assert ours["wrong %"] == 0


def test_true_similarity_is_intersection_over_union_of_shingles() -> None:
    from benchmarks.quality import true_pairs

    one, other = "a b c d e f g h i j k l", "A, b: c d e f g h i j k X"
    sizes, pairs = true_pairs([one, "nothing of the kind here", "", other, one.upper()])
    assert sizes.tolist() == [8, 1, 0, 8, 8]
    found = dict(zip(zip(pairs.left.tolist(), pairs.right.tolist(), strict=True), pairs.jaccard, strict=True))
    assert found == {(0, 3): pytest.approx(7 / 9), (0, 4): 1.0, (3, 4): pytest.approx(7 / 9)}


def test_a_verdict_counts_pairs_that_survive_and_removals_without_survivor() -> None:
    from benchmarks.quality import Pairs, verdict

    pairs = Pairs(np.array([0, 1, 2, 3]), np.array([1, 2, 3, 4]), np.array([0.9, 0.85, 0.6, 0.8]))
    left = np.array([True, False, False, True, True])
    assert verdict(left, np.ones(5, np.int64), pairs) == (2, 3, 1, pytest.approx(100 / 3), 1, 50)


def test_variants_are_as_long_but_no_near_duplicates(tmp_path: Path) -> None:
    from benchmarks.corpus import columns, documents, installed_text, text_bytes, variants
    from benchmarks.quality import true_pairs

    small = installed_text(tmp_path, 1)
    large = variants(small, 3)
    assert documents(large) == 3 * documents(small)
    assert text_bytes(large) == 3 * text_bytes(small)
    table = columns(large, ("id", "text"))
    assert len(set(table["id"].to_pylist())) == len(table)
    count = len(table) // 3
    _, pairs = true_pairs([text if len(text) > 2000 else "" for text in table["text"].to_pylist()])
    assert not [
        pair for pair in zip(pairs.left, pairs.right, strict=True) if pair[0] % count == pair[1] % count
    ]


def test_memory_of_children_counts(tmp_path: Path) -> None:
    from benchmarks.measure import watch_memory

    hold = "import time; held = bytearray(80_000_000); time.sleep(1.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    assert watch_memory(subprocess.Popen([sys.executable, "-c", parent])) > 80_000_000


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_a_watched_context_gives_the_results_and_where_the_time_went() -> None:
    from benchmarks.watch import WatchedContext

    context = WatchedContext(1)
    assert context.map(partial(nap), [0.2, 0.3]) == [0.2, 0.3]
    assert context.items == 2
    assert 0.5 <= context.item_seconds <= context.map_seconds
    assert max(context.profile, key=lambda function: context.profile[function]).endswith(".nap")


def test_a_peer_that_is_not_installed_is_a_row_that_says_so(tmp_path: Path) -> None:
    from benchmarks.measure import Contestant, alternate

    (runs,) = alternate(
        [Contestant(name="absent", prepare=absent, job={}, text_bytes=0, cores=1)], 2, tmp_path
    )
    assert runs.missing == "not installed: no_such_peer"
    assert not runs.seconds


def absent() -> Any:
    raise ModuleNotFoundError(name="no_such_peer")


absent.__module__ = "tests.test_benchmarks"  # as the child finds it, in the repository's root
