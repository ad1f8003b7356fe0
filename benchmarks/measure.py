"""How contestants are timed: each run in a fresh process, in turns, with its memory watched.

A contestant is a module-level function that prepares (imports, warm-up: untimed) and returns the work, a function
without arguments whose time counts and whose result is JSON. In turns (A B A B ...), because shared machines drift:
what is compared then ran in the same minutes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from data_pipeline.core.text import last_lines

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.2
NOT_INSTALLED = 3
"""Exit status of a child whose contestant lacks a package."""

Work = Callable[[], Any]


@dataclass(frozen=True)
class Contestant:
    """One row of a table."""

    name: str
    prepare: Callable[..., Work]
    job: dict[str, Any]
    """Arguments of ``prepare``; JSON."""
    text_bytes: int
    """UTF-8 bytes of the text that it works through."""
    cores: int
    repeats: int | None = None
    """Runs, where fewer than the others'."""


@dataclass
class Runs:
    """Measurements of a contestant."""

    contestant: Contestant
    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    missing: str | None = None
    """Why it could not run: the package that is not installed."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """MB/s of text, of the median run."""
        return self.contestant.text_bytes / 1e6 / self.median


def alternate(contestants: Sequence[Contestant], repeats: int, logs: Path) -> list[Runs]:
    """Run all in turns, ``repeats`` times. One that isn't installed is left out after the first turn, and says so."""
    all_runs = [Runs(one) for one in contestants]
    for turn in range(repeats):
        for runs in all_runs:
            limit = runs.contestant.repeats or repeats
            if turn < limit and not runs.missing:
                run_once(runs, logs)
    return all_runs


def run_once(runs: Runs, logs: Path) -> None:
    """Run a contestant once, in a process of its own, and add what was measured."""
    one = runs.contestant
    print(f"  {one.name} ...", end=" ", flush=True, file=sys.stderr)
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{''.join(c if c.isalnum() else '-' for c in one.name)}.log"
    with tempfile.TemporaryDirectory() as folder, open(log, "wb") as output:
        job, result = Path(folder, "job.json"), Path(folder, "result.json")
        job.write_text(json.dumps(one.job, allow_nan=False))
        function = f"{one.prepare.__module__}:{one.prepare.__qualname__}"
        command = [sys.executable, "-m", "benchmarks.child", function, str(one.cores), str(job), str(result)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        peak = watch_memory(child)
        if child.returncode == NOT_INSTALLED:
            runs.missing = last_lines(log.read_text(errors="replace"), 1)
            print(runs.missing, file=sys.stderr)
            return
        if child.returncode:
            raise RuntimeError(
                f"{one.name} failed:\n{last_lines(log.read_text(errors='replace'), 20)}\n({log})"
            )
        measured = json.loads(result.read_text())
    runs.seconds.append(measured["seconds"])
    runs.results.append(measured["result"])
    runs.peak_bytes.append(peak)
    print(f"{measured['seconds']:.2f} s, {peak / 1e6:.0f} MB", file=sys.stderr)


def watch_memory(child: subprocess.Popen[bytes]) -> int:
    """Wait for the child; the most memory that it and its descendants held at once, in bytes (sampled)."""
    peak = 0
    process = psutil.Process(child.pid)
    while child.poll() is None:
        peak = max(peak, memory_of_tree(process))
        time.sleep(SAMPLE_SECONDS)
    return peak


def memory_of_tree(process: psutil.Process) -> int:
    """Bytes in use by a process and its descendants; a page that several share counts once (PSS, where known)."""
    total = 0
    try:
        tree = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for one in tree:
        try:
            used = one.memory_full_info()
            total += getattr(used, "pss", 0) or used.uss
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            pass  # it ended meanwhile
    return total


def bind(cores: int) -> None:
    """Keep this process, and those it starts, to ``cores`` cores (where the system can)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
