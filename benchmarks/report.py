"""The results: a table with medians and ratios for a person, a JSON file with every figure for a program."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import Runs
from data_pipeline.core.text import table

PACKAGES = ("llmill", "numpy", "numba", "pyarrow", "gigatoken", "tokenizers", "datasets", "datatrove", "daft", "spacy",
            "rensa", "text-dedup", "torch", "prefect", "mlflow")  # fmt: skip


def arguments(
    description: str, *, megabytes: float, peer_megabytes: float, repeats: int
) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--megabytes", type=float, default=megabytes, help="text for llmill (default %(default)s)"
    )
    parser.add_argument(
        "--peer-megabytes",
        type=float,
        default=peer_megabytes,
        help="text for slow peers, and for llmill beside them: a random part (default %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=repeats, help="runs of each; the median counts")
    parser.add_argument("--cores", type=int, default=2, help="cores that each contestant may use")
    parser.add_argument("--no-peers", action="store_true", help="llmill alone")
    parser.add_argument(
        "--work", type=Path, default=Path(".benchmarks"), help="folder for corpora and outputs"
    )
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="folder for the tables"
    )
    return parser


@dataclass
class Report:
    """Findings of one benchmark."""

    name: str
    title: str
    settings: dict[str, Any]
    sections: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def text(self, paragraph: str) -> None:
        self.sections.append(paragraph + "\n")

    def admit_less(self, megabytes: float, size: int) -> None:
        """Say so where the installed packages hold less text (``size`` bytes) than was asked for."""
        if size < 0.95e6 * megabytes:
            self.text(
                f"The installed packages hold {size / 1e6:.0f} MB of text, not the {megabytes:g} MB asked for."
            )

    def table(self, key: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table, in the JSON too: one object a row."""
        rows = [list(row) for row in rows]
        self.data[key] = [dict(zip(header, row, strict=True)) for row in rows]
        self.sections.append(table(header, [[shown(cell) for cell in row] for row in rows]))

    def race(
        self, key: str, all_runs: Sequence[Runs], *, ours: Runs | None = None, whole: Runs | None = None
    ) -> None:
        """The table of contestants: medians, and how many times as fast llmill is.

        Compared with ``ours`` (the first, by default), llmill on the same text as its peers, and with ``whole``, if
        given, llmill on more, where the seconds that starting takes count less.
        """
        references = {"llmill / this": ours or all_runs[0]}
        if whole:
            references["llmill on the whole / this"] = whole
        header = ("", "cores", "text MB", "runs", "median s", "MB/s", "peak MB", *references)
        rows: list[list[object]] = []
        for runs in all_runs:
            one = runs.contestant
            row: list[object] = [one.name, one.cores, one.text_bytes / 1e6, len(runs.seconds)]
            if runs.missing:
                row += [None, None, None, *(runs.missing for _ in references)]
            else:
                factors = (
                    None if runs in references.values() else by.rate / runs.rate for by in references.values()
                )
                row += [runs.median, runs.rate, max(runs.peak_bytes) / 1e6, *factors]
            rows.append(row)
        self.table(key, header, rows)
        self.data[f"{key}_seconds"] = {runs.contestant.name: runs.seconds for runs in all_runs}

    def write(self, folder: Path) -> None:
        """Print the report and write it as ``<name>.md`` and ``<name>.json``."""
        facts, packages = machine(), versions()
        date = datetime.now(UTC).strftime("%Y-%m-%d")
        about = {"benchmark": self.name, "date": date, "machine": facts, "versions": packages}
        head = f"# {self.title}\n\n{date}; {facts['processor']}, {facts['cores']} cores, "
        head += f"{facts['memory_gb']} GB of memory; Python {facts['python']}; "
        head += ", ".join(f"{name} {version}" for name, version in packages.items()) + ".\n"
        markdown = "\n".join([head, *self.sections])
        print(markdown)
        folder.mkdir(parents=True, exist_ok=True)
        folder.joinpath(f"{self.name}.md").write_text(markdown, encoding="utf-8")
        content = (
            json.dumps(
                about | {"settings": self.settings} | self.data, indent=1, default=str, allow_nan=False
            )
            + "\n"
        )
        folder.joinpath(f"{self.name}.json").write_text(content, encoding="utf-8")


def shown(cell: object) -> str:
    """A figure with three digits that mean something; nothing as a dash."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return str(cell)


def machine() -> dict[str, Any]:
    """Describe what the metrics were measured on."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def processor() -> str:
    """The processor's model, as the system names it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what took part, as far as installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
