"""The races."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import torch

import benchmarks.training
from benchmarks.training.contestants import ATTENTION, SHAPES, Contestant, Shape
from benchmarks.training.measure import AttentionTimes, Entry, Measured, alternate
from benchmarks.training.tables import write_results
from llm.kernels.attention import missing
from llm.kernels.names import BackEnd
from llm.machine.hardware import device_kind

RACES = ("trainer", "compile", "zero", "attention")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=benchmarks.training.__doc__
    )
    parser.add_argument(
        "--shapes", nargs="+", default=["124M", "350M", "1B"] if on_gpu else ["7M"], choices=SHAPES
    )
    parser.add_argument(
        "--races",
        nargs="+",
        default=["all"] if on_gpu else ["trainer"],
        choices=[*RACES, "all"],
        help="default: all on a GPU, trainer on a CPU",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant (default %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps a run, the first two uncounted")
    parser.add_argument("--precision", default="bf16" if on_gpu else "fp32", choices=["fp32", "bf16"])
    parser.add_argument(
        "--micro-batch", type=int, help="windows a rank works on at once (default: llmill's choice)"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=torch.cuda.device_count() if on_gpu else 2,
        help="of the race between ZeRO stages (default: all GPUs, or 2)",
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="of ZeRO, in that race")
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[1024, 2048, 4096, 8192] if on_gpu else [256, 1024],
        help="of the race between attention back ends",
    )
    parser.add_argument("--repeats", type=int, default=50, help="of each pass through attention in a run")
    parser.add_argument("--no-peers", action="store_true", help="llmill alone")
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results"), help="folder for the tables"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    wanted = RACES if "all" in options.races else options.races
    settings: dict[str, Any] = {
        "precision": options.precision,
        "optimizer": {"kind": "adamw"},
    }  # as the plain loop's
    if options.micro_batch:
        settings["runtime"] = {"micro_batch": options.micro_batch}
    races: dict[str, Sequence[Entry]] = {}
    for name in options.shapes:
        fields = {
            "trainer": trainers(SHAPES[name], settings)[: 1 if options.no_peers else None],
            "compile": compiled_and_eager(SHAPES[name], settings),
            "zero": zero_stages(SHAPES[name], settings, options.ranks, options.stages),
        }
        for race, contestants in fields.items():
            if race in wanted:
                entries = [Measured(one) for one in contestants]
                races[f"{name}: {race}"] = alternate(entries, options.rounds, options.steps)
    if "attention" in wanted:
        shape = ATTENTION[device_kind()]
        back_ends = attention_back_ends(shape, options.precision, options.contexts)
        title = f"attention: {shape.heads} heads of {shape.model.head_width}, {options.precision}"
        races[title] = alternate(back_ends, options.rounds, options.repeats)
    about = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "options": {k: str(v) for k, v in vars(options).items() if k != "results"},
    }
    write_results(races, about, options.results)


def trainers(shape: Shape, settings: dict[str, Any]) -> list[Contestant]:
    """Our trainer and, on a CPU, the same with torch's own choice of library; what it would do without DeepSpeed; the
    plain loop in both environments; and our trainer with a recipe's own optimizer."""
    plain = ours("llmill, matrix products as torch takes them", shape, settings, matmul="torch")
    muon = {**settings, "optimizer": {"kind": "muon"}}
    return [
        Contestant(name="llmill", kind="llmill", shape=shape, settings=settings),
        *([] if torch.cuda.is_available() else [plain]),
        Contestant(
            name="llmill's model and optimizer in a bare loop", kind="plain", shape=shape, settings=settings
        ),
        Contestant(
            name="transformers, plain loop",
            kind="transformers",
            shape=shape,
            settings=settings,
            allocator=False,
        ),
        Contestant(
            name="transformers, plain loop, our allocator settings",
            kind="transformers",
            shape=shape,
            settings=settings,
        ),
        Contestant(name="llmill with Muon", kind="llmill", shape=shape, settings=muon),
    ]


def compiled_and_eager(shape: Shape, settings: dict[str, Any]) -> list[Contestant]:
    """Our trainer with compiled layers and without."""
    return [
        ours("compiled layers", shape, settings, compile=True),
        ours("eager", shape, settings),
    ]


def zero_stages(
    shape: Shape, settings: dict[str, Any], ranks: int, stages: Sequence[int]
) -> list[Contestant]:
    """Our trainer at several ZeRO stages."""
    return [
        ours(f"ranks {ranks}, ZeRO {stage}", shape, settings, ranks=ranks, zero_stage=stage)
        for stage in stages
    ]


def ours(name: str, shape: Shape, settings: dict[str, Any], **runtime: Any) -> Contestant:
    """Our trainer with some more of ``pretrain.runtime``."""
    runtime = {**settings.get("runtime", {}), **runtime}
    return Contestant(
        name=name,
        kind="llmill",
        shape=shape,
        settings={**settings, "runtime": runtime},
        ranks=runtime.get("ranks", 1),
    )


def attention_back_ends(shape: Shape, precision: str, contexts: Sequence[int]) -> list[AttentionTimes]:
    """Each back end; those that cannot run here say why."""
    return [
        AttentionTimes(
            Contestant(
                name=name,
                kind="attention",
                shape=shape,
                settings={"precision": precision, "attention": name, "contexts": list(contexts)},
            ),
            failed=missing(name, device_kind(), precision, shape.model.head_width),
        )
        for name in get_args(BackEnd)
    ]


if __name__ == "__main__":
    main()
