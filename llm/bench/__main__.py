"""The races, and what is written of them."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import llm.bench
from data_pipeline.context import cores
from llm.bench.contestants import SHAPES, Contestant, Shape
from llm.bench.measure import Measured, alternate
from llm.hardware import cpu_flags
from llm.model_card import table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m llm.bench", description=llm.bench.__doc__)
    parser.add_argument(
        "--shapes", nargs="+", default=["124M", "350M", "1B"] if on_gpu else ["7M"], choices=SHAPES
    )
    parser.add_argument("--races", nargs="+", default=["trainer"], choices=["trainer", "zero"])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant (default %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps a run, the first two uncounted")
    parser.add_argument("--precision", default="bf16" if on_gpu else "fp32", choices=["fp32", "bf16"])
    parser.add_argument(
        "--micro-batch", type=int, help="windows a rank works on at once (default: llmill's choice)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="of the race between ZeRO stages")
    parser.add_argument("--no-peers", action="store_true", help="llmill alone")
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results"), help="folder for the tables"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    settings: dict[str, Any] = {"precision": options.precision}
    if options.micro_batch:
        settings["runtime"] = {"micro_batch": options.micro_batch}
    races: dict[str, list[Measured]] = {}
    for name in options.shapes:
        shape = SHAPES[name]
        if "trainer" in options.races:
            contestants = trainers(shape, settings)
            chosen = contestants[:1] if options.no_peers else contestants
            races[f"{name}: trainers"] = alternate(chosen, options.rounds, options.steps)
        if "zero" in options.races:
            contestants = zero_stages(shape, settings, options.ranks)
            races[f"{name}: ZeRO stages"] = alternate(contestants, options.rounds, options.steps)
    about = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "options": {k: str(v) for k, v in vars(options).items()},
    }
    write_results(races, about, options.results)


def trainers(shape: Shape, settings: dict[str, Any]) -> list[Contestant]:
    """Our trainer, what it would do without DeepSpeed, and the plain loop in both environments."""
    return [
        Contestant("llmill", "llmill", shape, settings),
        Contestant("llmill's model and optimizer in a bare loop", "plain", shape, settings),
        Contestant("transformers, plain loop", "transformers", shape, settings, allocator=False),
        Contestant("transformers, plain loop, our allocator settings", "transformers", shape, settings),
    ]


def zero_stages(shape: Shape, settings: dict[str, Any], ranks: int) -> list[Contestant]:
    """Our trainer at each ZeRO stage."""
    runtime = settings.get("runtime", {})
    return [
        Contestant(
            f"{ranks} ranks, ZeRO {stage}",
            "llmill",
            shape,
            {**settings, "runtime": {**runtime, "ranks": ranks, "zero_stage": stage}},
            ranks=ranks,
        )
        for stage in range(4)
    ]


def race_table(race: Sequence[Measured]) -> str:
    """Medians of a race, and how many times as fast the first is."""
    header = ("", "tokens/s", "utilisation", "probed GFLOP/s", "memory MB", "llmill / this")
    rows = []
    for one in race:
        if one.failed is not None or race[0].failed is not None:
            rows.append((one.contestant.name, "failed", "-", "-", "-", "-"))
            continue
        peak, memory = statistics.median(one.peaks) / 1e9, max(one.memory) / 1e6
        figures = (f"{one.rate:,.0f}", f"{one.utilisation:.3f}", f"{peak:,.0f}", f"{memory:,.0f}")
        rows.append((one.contestant.name, *figures, f"{race[0].times(one):.3f}"))
    return table(header, rows)


def parts_table(race: Sequence[Measured]) -> str:
    """Where a step's time goes, in percent (medians over the rounds)."""
    done = [one for one in race if one.failed is None]
    names = list(dict.fromkeys(name for one in done for part in one.parts for name in part))
    rows = []
    for one in done:
        total = statistics.median(sum(part.values()) for part in one.parts)
        shares = [statistics.median(part.get(name, 0.0) for part in one.parts) / total for name in names]
        rows.append((one.contestant.name, f"{total:.3f}", *(f"{100 * share:.1f}" for share in shares)))
    return table(("", "seconds a step", *(f"{name} %" for name in names)), rows)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or platform.processor() or platform.machine(),
        "cores": cores(),
        "features": sorted(cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_results(races: Mapping[str, Sequence[Measured]], about: dict[str, Any], folder: Path) -> None:
    """Print the tables, and write them as ``training.md`` and, with every round, ``training.json``."""
    facts = machine()
    lines = [
        "# Training",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}; {', '.join(f'{name} {value}' for name, value in facts.items())}.",
        "",
        "Each run is a fresh process on random tokens; medians over rounds in which contestants take turns. "
        "Utilisation: model FLOPs (attention counted) as a part of the rate of large matrix products probed in the "
        "same process. `llmill / this`: of tokens a second, the median over the rounds.",
    ]
    for name, race in races.items():
        lines += ["", f"## {name}", "", race_table(race), parts_table(race)]
    text = "\n".join(lines)
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("training.md").write_text(text, encoding="utf-8")
    content = {name: [asdict(one) for one in race] for name, race in races.items()}
    folder.joinpath("training.json").write_text(
        json.dumps({"machine": facts, **about, "races": content}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
