"""Real input in small: folders of text and document shards, and ways to compare and to interrupt stages."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipeline.documents import write_shard
from data_pipeline.download.group_writer import GroupWriter
from data_pipeline.download.stage import DownloadConfig, download
from data_pipeline.stage import LocalContext, Metrics, StageConfig, StageContext

WORDS = re.findall(
    r"\w+",
    """
    the of and to in a is that be have with for not as on are this by from or which an was at all one
    when there can more no out so up into time only some could them than then its now over such our very
    through river mountain house garden window letter morning evening winter summer ship captain harbour
    engine wheel bread copper silver paper violin market village teacher doctor soldier farmer painter
    sailor brother
    """,
)

Body = Callable[[StageConfig, Mapping[str, Path], Path, StageContext], Metrics]


def prose(seed: int, words: int = 120) -> str:
    """Text of random words in sentences and paragraphs, the same for the same seed."""
    drawn = random.Random(seed).choices(WORDS, k=words)
    sentences = [" ".join(drawn[at : at + 12]).capitalize() + "." for at in range(0, words, 12)]
    return "\n\n".join(" ".join(sentences[at : at + 4]) for at in range(0, len(sentences), 4))


def write_documents(
    folder: Path, texts: Mapping[str, str] | Iterable[tuple[str, str]], shards: int = 3
) -> Path:
    """Document shards of (id, text), dealt out in turn; returns the folder."""
    items = list(texts.items() if isinstance(texts, Mapping) else texts)
    for shard in range(shards):
        with write_shard(folder / f"documents-{shard:05d}.parquet") as writer:
            for id, text in items[shard::shards]:
                writer.add(id, text, id.split("/")[0], "{}")
    return folder


def read_documents(folder: Path) -> dict[str, str]:
    """Text by id of all document shards in a folder."""
    rows = [pq.read_table(path) for path in sorted(folder.glob("documents-*.parquet"))]
    return {row["id"]: row["text"] for one in rows for row in one.to_pylist()}


def digests(folder: Path) -> dict[str, str]:
    """Hash of every file that the store would seal: all under a folder but ``logs/`` and ``scratch/``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if not name.startswith(("logs/", "scratch/"))
    }


class Killed(BaseException):
    """What an `InterruptedContext` raises; no handler for errors catches it."""


class InterruptedContext(LocalContext):
    """Dies at the n-th thing that a body asks of its context: an item of a map, or a word of progress."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self._left = calls

    def _spend(self) -> None:
        if not self._left:
            raise Killed
        self._left -= 1

    def map(self, fn: Callable, items: Sequence, *, names: Sequence[str] | None = None) -> list:
        results = []
        for item in items:
            self._spend()
            results.append(fn(item))
        return results

    def progress(self, done: float, total: float | None, unit: str) -> None:
        self._spend()


def check_restarts(body: Body, config: StageConfig, inputs: Mapping[str, Path], folder: Path) -> None:
    """The law of resuming: killed anywhere, or ended but without scratch and any one file, a stage that starts again
    ends the same.
    """
    whole = folder / "undisturbed"
    metrics = body(config, inputs, whole, LocalContext())
    expected = digests(whole)
    assert body(config, inputs, whole, LocalContext()) == metrics
    assert digests(whole) == expected, "killed after its end"
    for calls in range(10_000):
        out = folder / f"killed-{calls}"
        try:
            body(config, inputs, out, InterruptedContext(calls))
        except Killed:
            assert body(config, inputs, out, LocalContext()) == metrics
            assert digests(out) == expected, f"killed at call {calls}"
            continue
        break
    assert calls > 3, "the stage was hardly interrupted"
    for name in expected:
        shutil.rmtree(whole / "scratch", ignore_errors=True)
        (whole / name).unlink()
        assert body(config, inputs, whole, LocalContext()) == metrics
        assert digests(whole) == expected, f"{name} was lost"


def check_kills(config: Mapping[str, Any], folder: Path) -> None:
    """A download whose process is killed (SIGKILL) amid a group keeps the parts that are whole, and ends the same."""
    whole = DownloadConfig.model_validate(config).resolve()
    download(whole, {}, folder / "undisturbed", LocalContext())
    out = folder / "killed"
    process = multiprocessing.get_context("forkserver").Process(target=slowly, args=(config, out))
    process.start()
    deadline = time.monotonic() + 60
    while len(parts := sorted(out.glob("scratch/*-progress.json"))) < 1 or part_count(parts[0]) < 3:
        assert process.is_alive(), "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not list(out.glob("scratch/group-00000.json")), "the group was done"
    kept = {path: path.stat().st_ino for path in out.glob("scratch/*-00[012].parquet")}
    assert len(kept) >= 3
    assert download(whole, {}, out, LocalContext())["documents"] > 0
    inodes = {path.stat().st_ino for path in out.rglob("*.parquet")}
    assert set(kept.values()) <= inodes, "a whole shard was written again"
    assert digests(out) == digests(folder / "undisturbed")


def slowly(config: Mapping[str, Any], out: Path) -> None:
    """A download with a short rest after each shard, so that there is time to kill it."""
    seal = GroupWriter.seal

    def rest(self: GroupWriter, index: int, position: Any) -> None:
        seal(self, index, position)
        time.sleep(0.2)

    GroupWriter.seal = rest  # type: ignore[method-assign]
    download(DownloadConfig.model_validate(config), {}, out, LocalContext())


def part_count(note: Path) -> int:
    return len(json.loads(note.read_text())["parts"])
