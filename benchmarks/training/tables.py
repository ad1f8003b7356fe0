"""Tables of the races."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.measure import AttentionTimes, Entry, Measured
from data_pipeline.core.processes import cores
from data_pipeline.core.text import table
from llm.machine.hardware import cpu_flags


def race_table(race: Sequence[Measured]) -> str:
    """Medians of a race, and how many times as fast the first is."""
    header = (
        *("", "tokens/s", "utilisation", "of GFLOP/s", "of torch's"),
        *("torch's GFLOP/s", "first step s", "memory MB", "first / this"),
    )
    rows = []
    for one in race:
        if one.failed is not None:
            rows.append((one.contestant.name, "failed", *("-",) * (len(header) - 2)))
            continue
        figures = (
            f"{one.rate:,.0f}",
            f"{one.utilisation():.3f}",
            f"{one.peak() / 1e9:,.0f}",
            f"{one.utilisation('torch'):.3f}",
            f"{one.peak('torch') / 1e9:,.0f}",
            f"{statistics.median(one.first):.2f}",
            f"{max(one.memory) / 1e6:,.0f}",
        )
        times = "-" if race[0].failed is not None else f"{race[0].times(one):.3f}"
        rows.append((one.contestant.name, *figures, times))
    return table(header, rows)


def parts_table(race: Sequence[Measured]) -> str:
    """Show where a step's time goes, in percent (medians over the rounds)."""
    done = [one for one in race if one.failed is None]
    names = list(dict.fromkeys(name for one in done for part in one.parts for name in part))
    names.sort(key="communication".__eq__)  # last, and the others as they come
    rows = []
    for one in done:
        total = statistics.median(sum(part.values()) for part in one.parts)
        shares = [statistics.median(part.get(name, 0.0) for part in one.parts) / total for name in names]
        rows.append((one.contestant.name, f"{total:.3f}", *(f"{100 * share:.1f}" for share in shares)))
    return table(("", "seconds a step", *(f"{name} %" for name in names)), rows)


def attention_table(race: Sequence[AttentionTimes]) -> str:
    """Medians over the rounds of what each back end took in each case."""
    header = (
        "context",
        "documents",
        "",
        "forward ms",
        "TFLOP/s",
        "backward ms",
        "TFLOP/s",
        "deviation",
        "memory MB",
    )
    rows = [
        (
            (case["context"], "several" if case["masked"] else "one"),
            (one.contestant.name, *case_cells(rounds)),
        )
        for one in race
        for rounds in zip(*one.rounds, strict=True)
        for case in rounds[:1]
    ]
    return table(header, [(*case, *cells) for case, cells in sorted(rows, key=lambda row: row[0][::-1])])


def case_cells(rounds: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return a back end's metrics in one case."""
    if failed := next((one["failed"] for one in rounds if "failed" in one), None):
        return (failed, *("-",) * 5)
    cells: list[str] = []
    for name in ("forward", "backward"):
        seconds = statistics.median(one[name] for one in rounds)
        cells += [f"{1e3 * seconds:.3f}", f"{rounds[0]['flops'][name] / seconds / 1e12:.3g}"]
    deviation = max(one["deviation"] for one in rounds)
    memory = [one["memory"] for one in rounds if one["memory"] is not None]
    return (*cells, f"{deviation:.1e}", f"{max(memory) / 1e6:,.0f}" if memory else "-")


def failures(race: Sequence[Entry]) -> list[str]:
    """Say why those that could not run could not."""
    return [f"- {one.contestant.name}: {one.failed.splitlines()[-1]}" for one in race if one.failed]


def lines_of(race: Sequence[Entry]) -> list[str]:
    """The tables of a race."""
    lines: list[str] = []
    if timed := [one for one in race if isinstance(one, AttentionTimes)]:
        lines += [attention_table(timed)]
    if trained := [one for one in race if isinstance(one, Measured)]:
        lines += [race_table(trained), "", parts_table(trained)]
    return [*lines, *([""] if any(one.failed for one in race) else []), *failures(race)]


def machine() -> dict[str, Any]:
    """Describe what the metrics were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or platform.processor() or platform.machine(),
        "cores": cores(),
        "features": sorted(cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


ABOUT = """\
Each run is a fresh process on random tokens, with AdamW where no other optimizer is named; medians over rounds in
which contestants take turns. Utilisation: model FLOPs (attention counted) as a part of the rate of large matrix
products probed in the same process, by the fastest library that torch carries and by the one that it takes for `a @
b`. Memory: the most that a rank held, on its GPU or, without one, resident. `first / this`: of tokens a second, the
median over the rounds. Communication is waited for in the steps that are timed by parts, so it is told in full, also
what would be hidden. Attention: TFLOP/s by 2 T^2 H E forwards and twice that backwards for a document of T positions;
deviation: the largest of output and gradients from float64, as a part of the largest entry."""


def write_results(races: Mapping[str, Sequence[Entry]], about: dict[str, Any], folder: Path) -> None:
    """Print the tables, and write them as ``training.md`` and, with every round, ``training.json``."""
    facts = machine()
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    lines = ["# Training", "", f"{datetime.now(UTC):%Y-%m-%d}; {told}.", "", ABOUT]
    for name, race in races.items():
        lines += ["", f"## {name}", "", *lines_of(race)]
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("training.md").write_text(text, encoding="utf-8")
    content = {name: [asdict(one) for one in race] for name, race in races.items()}
    folder.joinpath("training.json").write_text(
        json.dumps({"machine": facts, **about, "races": content}, indent=1, allow_nan=False) + "\n",
        encoding="utf-8",
    )
