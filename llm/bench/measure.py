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

from data_pipeline.context import last_lines
from llm.bench.contestants import WARM_UP, WORK, Contestant, Shape
from llm.environment import rank_environment
from llm.probe import matmul_flops, memory_bytes


def run_child(job_path: Path, result_path: Path) -> None:
    """What a contestant's process does; every rank of it."""
    told = json.loads(job_path.read_text(encoding="utf-8"))
    job = Contestant(**{**told["contestant"], "shape": Shape(**told["contestant"]["shape"])})
    torch.manual_seed(0)
    precision = job.settings.get("precision", "fp32")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = matmul_flops(device, precision)
    result = WORK[job.kind](job, told["steps"])
    result |= {
        "peak_flops": max(before, matmul_flops(device, precision)) * job.ranks,
        "memory": memory_bytes(),
    }
    if os.environ.get("RANK", "0") == "0":
        result_path.write_text(json.dumps(result), encoding="utf-8")


@dataclass
class Measured:
    """What the runs of a contestant gave, a figure a round."""

    contestant: Contestant
    rates: list[float] = field(default_factory=list)
    """Tokens a second, of the round's median step."""
    peaks: list[float] = field(default_factory=list)
    """Operations a second of large matrix products, all ranks together."""
    memory: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    """Seconds a step by part."""
    failed: str | None = None
    """Why it could not run."""

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def utilisation(self) -> float:
        """Median over the rounds of model FLOPs as a part of what was probed in the same process."""
        flops = self.contestant.shape.model.flops_per_token()
        return statistics.median(
            rate * flops / peak for rate, peak in zip(self.rates, self.peaks, strict=True)
        )

    def times(self, other: Measured) -> float:
        """How many times as fast as ``other``: the median over the rounds."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.rates, other.rates, strict=True))


def measure_once(one: Contestant, steps: int, folder: Path) -> dict[str, Any]:
    """Run a contestant in a process (or, as ranks, several) of its own.

    Raises:
        RuntimeError: it failed; the message holds the end of its output.
    """
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps({"contestant": asdict(one), "steps": steps}), encoding="utf-8")
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m"]
    environment = dict(os.environ) | (rank_environment(one.ranks) if one.allocator else {})
    if one.ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={one.ranks}", "-m"]
    else:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        environment |= {**alone, "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [*command, "llm.bench.measure", str(job), str(result)],
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


def alternate(contestants: Sequence[Contestant], rounds: int, steps: int) -> list[Measured]:
    """Run all in turns, ``rounds`` times. One that fails is left out from then on, and says why."""
    all_measured = [Measured(one) for one in contestants]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for measured in all_measured:
                if measured.failed is None:
                    add_run(measured, steps, Path(folder))
    return all_measured


def add_run(measured: Measured, steps: int, folder: Path) -> None:
    """Run a contestant once more, and say so on standard error."""
    one = measured.contestant
    print(f"  {one.name} ...", end=" ", flush=True, file=sys.stderr)
    try:
        result = measure_once(one, steps, folder)
    except RuntimeError as error:
        measured.failed = str(error)
        print(f"failed:\n{error}", file=sys.stderr)
        return
    seconds = statistics.median(result["seconds"][WARM_UP:])
    measured.rates.append(one.shape.batch_windows * one.shape.context / seconds)
    measured.peaks.append(result["peak_flops"])
    measured.memory.append(result["memory"])
    measured.parts.append(result["parts"])
    print(f"{measured.rates[-1]:,.0f} tokens/s, utilisation {measured.utilisation:.3f}", file=sys.stderr)


if __name__ == "__main__":
    run_child(Path(sys.argv[1]), Path(sys.argv[2]))
