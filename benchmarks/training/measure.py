"""How contestants are timed: in turns, each run in a process (or, as ranks, several) of its own, which first and last
probes what the machine's matrix products reach."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.attention import time_attention
from benchmarks.training.contestants import WARM_UP, WORK, Contestant, Shape
from data_pipeline.core.text import last_lines
from llm.machine.environment import rank_environment
from llm.training.probe import matmul_rates, memory_bytes


def run_child(job_path: Path, result_path: Path) -> None:
    """Do the work of a contestant's process; every rank of it."""
    told = json.loads(job_path.read_text(encoding="utf-8"))
    job = Contestant(**{**told["contestant"], "shape": Shape(**told["contestant"]["shape"])})
    torch.manual_seed(0)
    precision = job.settings.get("precision", "fp32")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = matmul_rates(device, precision)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = {
        **(WORK | {"attention": time_attention})[job.kind](job, told["steps"]),
        "memory": memory_bytes(),
    }
    after = matmul_rates(device, precision)
    result["matmul_flops"] = {name: max(rate, after[name]) * job.ranks for name, rate in before.items()}
    if os.environ.get("RANK", "0") == "0":
        result_path.write_text(json.dumps(result, allow_nan=False), encoding="utf-8")


@dataclass
class Entry:
    """Results of the runs of a contestant, a number a round."""

    contestant: Contestant
    failed: str | None = None
    """Why it could not run."""

    def add(self, result: dict[str, Any]) -> str:
        """Add a run's result; return a line that reports it."""
        raise NotImplementedError


@dataclass
class AttentionTimes(Entry):
    """Times of a back end of attention."""

    rounds: list[list[dict[str, Any]]] = field(default_factory=list)
    """Results by round: what `benchmarks.training.attention.time_case` reported of each case."""

    def add(self, result: dict[str, Any]) -> str:
        self.rounds.append(result["cases"])
        return f"{len(result['cases'])} cases"


@dataclass
class Measured(Entry):
    """Measurements of a training."""

    rates: list[float] = field(default_factory=list)
    """Tokens a second, of the round's median step."""
    peaks: list[dict[str, float]] = field(default_factory=list)
    """Operations a second of large matrix products by each library, all ranks together."""
    first: list[float] = field(default_factory=list)
    """Seconds of the first step, with all that is compiled or allocated in it."""
    memory: list[float] = field(default_factory=list)
    """Bytes that rank 0 held, at most."""
    parts: list[dict[str, float]] = field(default_factory=list)
    """Seconds a step by part."""

    def add(self, result: dict[str, Any]) -> str:
        shape = self.contestant.shape
        median = statistics.median(result["seconds"][WARM_UP:])
        self.rates.append(shape.batch_sequences * shape.context / median)
        self.peaks.append(result["matmul_flops"])
        self.first.append(result["seconds"][0])
        self.memory.append(result["memory"])
        self.parts.append(result["parts"])
        return f"{self.rates[-1]:,.0f} tokens/s, utilisation {self.utilisation():.3f}"

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def peak(self, library: str | None = None) -> float:
        """Median over the rounds of what matrix products reached, by that library or by the fastest."""
        return statistics.median(peak[library] if library else max(peak.values()) for peak in self.peaks)

    def utilisation(self, library: str | None = None) -> float:
        """Median over the rounds of model FLOPs as a part of `peak`, each by what was probed in the same process."""
        flops = self.contestant.shape.model.flops_per_token()
        return statistics.median(
            rate * flops / (peak[library] if library else max(peak.values()))
            for rate, peak in zip(self.rates, self.peaks, strict=True)
        )

    def times(self, other: Measured) -> float:
        """Return how many times as fast as ``other``: the median over the rounds."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.rates, other.rates, strict=True))


def measure_once(one: Contestant, steps: int, folder: Path) -> dict[str, Any]:
    """Run a contestant in a process (or, as ranks, several) of its own.

    Raises:
        RuntimeError: it failed; the message holds the end of its output.
    """
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps({"contestant": asdict(one), "steps": steps}, allow_nan=False), encoding="utf-8")
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m"]
    environment = dict(os.environ) | (rank_environment(one.ranks) if one.allocator else {})
    if one.ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={one.ranks}", "-m"]
    else:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        environment |= {**alone, "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [*command, "benchmarks.training.measure", str(job), str(result)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode or not result.exists():
        raise RuntimeError(last_lines(done.stdout + done.stderr, 12))
    return dict(json.loads(result.read_text(encoding="utf-8")))


def free_port() -> int:
    """A port on loopback that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def alternate(entries: Sequence[Entry], rounds: int, steps: int) -> Sequence[Entry]:
    """Run all in turns, ``rounds`` times; ``entries``. One that fails is left out from then on, and says why."""
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for entry in entries:
                if entry.failed is None:
                    add_run(entry, steps, Path(folder))
    return entries


def add_run(entry: Entry, steps: int, folder: Path) -> None:
    """Run a contestant once more, and say so on standard error."""
    one = entry.contestant
    print(f"  {one.name} ...", end=" ", flush=True, file=sys.stderr)
    try:
        result = measure_once(one, steps, folder)
    except RuntimeError as error:
        entry.failed = str(error)
        print(f"failed:\n{error}", file=sys.stderr)
        return
    print(entry.add(result), file=sys.stderr)


if __name__ == "__main__":
    run_child(Path(sys.argv[1]), Path(sys.argv[2]))
