"""Loss for compute: held-out bits per byte over tokens of a recipe as it is shipped, and of the same recipe with
nanoGPT's model and optimizer, on one corpus, with one tokenizer, the same batches and several seeds."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
from matplotlib.figure import Figure

from benchmarks.report import Report
from data_pipeline.core.processes import cores
from flows.engine.plan import make_plan
from flows.engine.store import Store
from flows.recipe import load_recipe
from llm.pretrain.config import PretrainConfig

NANOGPT = {
    "pretrain.model.positions": "learned",
    "pretrain.model.qk_norm": "false",
    "pretrain.optimizer.kind": "adamw",
    "pretrain.lr": "1e-3",
    "pretrain.betas": "[0.9, 0.99]",
    "pretrain.schedule.warmup_steps": "100",
}
"""Settings of nanoGPT's config/train_shakespeare_char.py for small models, as overrides; it shares weight decay (0.1),
clipping (1.0), the cosine down to a tenth and the initial weights with our defaults. No dropout: no text is read twice.
"""
RIVALS: dict[str, dict[str, str]] = {"llmill": {}, "nanoGPT-style": NANOGPT}


@dataclass
class Curve:
    """Result of one training."""

    name: str
    seed: int
    parameters: int
    tokens: list[int]
    bits_per_byte: list[float]

    def reaches(self, goal: float) -> int | None:
        """Tokens read at the first check that is no worse than ``goal``."""
        return next((t for t, b in zip(self.tokens, self.bits_per_byte, strict=True) if b <= goal), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path, help="folder of .txt or .txt.gz files")
    parser.add_argument("--recipe", type=Path, default=Path("flows/recipes/books.yaml"))
    parser.add_argument("--tokens", type=int, default=4_096_000, help="tokens that each trains on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="as of llmill run, for all rivals")
    parser.add_argument("--work", type=Path, default=Path(".benchmarks"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    home = options.work.resolve() / "loss"
    shared = [
        f"download.sources.0.path={options.texts.resolve()}",
        f"pretrain.tokens={options.tokens}",
        *options.set,
    ]
    llmill(home, options.recipe, shared, "tokenize")
    jobs = [(name, seed) for seed in range(options.seeds) for name in RIVALS]

    def train(job: tuple[str, int]) -> Curve:
        name, seed = job
        overrides = [
            *shared,
            *(f"{key}={value}" for key, value in RIVALS[name].items()),
            f"pretrain.seed={seed}",
        ]
        llmill(home, options.recipe, overrides, "pretrain")
        print(f"{name}, seed {seed}: trained", file=sys.stderr, flush=True)
        return curve(name, seed, home, options.recipe, overrides)

    with ThreadPoolExecutor(cores()) as pool:
        curves = list(pool.map(train, jobs))
    tell(curves, options)


def llmill(home: Path, recipe: Path, overrides: list[str], last: str) -> None:
    """Run a recipe up to the stage ``last``, on one core.

    Raises:
        RuntimeError: it failed; the message is the end of what it printed.
    """
    command = [
        str(Path(sys.executable).with_name("llmill")),
        "run",
        str(recipe),
        "--home",
        str(home),
        "--to",
        last,
    ]
    for override in overrides:
        command += ["--set", override]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-2000:])


def curve(name: str, seed: int, home: Path, recipe: Path, overrides: list[str]) -> Curve:
    """The checks of a training that `llmill` sealed."""
    plan = make_plan(load_recipe(recipe, overrides), Store(home))
    step = next(step for step in plan if step.stage.name == "pretrain")
    assert step.artifact is not None, step.why
    assert isinstance(step.config, PretrainConfig)
    checks = pq.read_table(step.artifact.path / "validation.parquet").to_pydict()
    tokens = [step.config.tokens_after(done) for done in checks["step"]]
    parameters = int(step.artifact.metrics["parameters"])
    return Curve(
        name=name, seed=seed, parameters=parameters, tokens=tokens, bits_per_byte=checks["bits_per_byte"]
    )


def tell(curves: list[Curve], options: argparse.Namespace) -> None:
    """The table, and both curves in one plot."""
    told = {
        "recipe": options.recipe.name,
        "tokens": options.tokens,
        "seeds": options.seeds,
        "set": options.set,
    }
    report = Report("loss", "Loss for compute", told)
    report.text(
        f"Held-out bits per byte of `{options.recipe.name}` and of its rivals on the same {options.tokens:,} tokens, "
        "in the same order for a seed. `reached` is the first check at which llmill, in its one full run, is no worse "
        "than the rival at its end: tokens, and as a part of the rival's."
    )
    report.text("![held-out bits per byte over tokens](loss.svg)")
    ours = {curve.seed: curve for curve in curves if curve.name == "llmill"}
    header = ("", "seed", "parameters", "bits per byte", "llmill's", "reached", "part")
    rows: list[list[Any]] = []
    parts: dict[str, list[float]] = {}
    for rival in sorted(curves, key=lambda curve: list(RIVALS).index(curve.name)):
        mine, last = ours[rival.seed], rival.bits_per_byte[-1]
        row: list[Any] = [rival.name, rival.seed, f"{rival.parameters:,}", f"{last:.4f}"]
        if rival.name == "llmill":
            rows.append([*row, None, None, None])
            continue
        reached = mine.reaches(last)
        part = None if reached is None else reached / rival.tokens[-1]
        parts.setdefault(rival.name, []).append(part or float("inf"))
        shown = None if reached is None else f"{reached:,}"
        rows.append([*row, f"{mine.bits_per_byte[-1]:.4f}", shown, part])
    report.table("seeds", header, rows)
    for name, values in parts.items():
        report.text(
            f"{name}: reached in {median(values):.0%} of the tokens (median), {max(values):.0%} at most."
        )
    report.data["curves"] = [vars(curve) for curve in curves]
    report.write(options.results)
    draw(curves).savefig(options.results / "loss.svg", metadata={"Date": None})


def draw(curves: list[Curve]) -> Figure:
    """A line a training, a colour a rival."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel="held-out bits per byte")
    for number, name in enumerate(RIVALS):
        for curve in (curve for curve in curves if curve.name == name):
            label = name if curve.seed == 0 else None
            axes.plot(curve.tokens, curve.bits_per_byte, f"C{number}", linewidth=1, label=label)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
