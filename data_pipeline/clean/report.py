"""The metrics of stage ``clean``: a tally for each shard, added up into a page for people and JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.clean.text_stats import TextStats
from data_pipeline.clean.verdicts import KEPT, Verdicts
from data_pipeline.core.files import atomic_path
from data_pipeline.core.text import excerpt, human_bytes, table
from data_pipeline.documents import add_up
from data_pipeline.stage import Metrics

EXAMPLES = 3
"""Documents that the report shows for each reason."""
BAR = 30

EDGES: dict[str, list[float]] = {
    "characters": [0, *(10.0**power * step for power in range(2, 7) for step in (1, 2, 5))],
    "words": [0, *(10.0**power * step for power in range(1, 6) for step in (1, 2, 5))],
    "mean word length": [float(edge) for edge in (*range(13), 15, 20)],
    "alphabetic words": [edge / 10 for edge in range(11)],
    "language score": [edge / 10 for edge in range(11)],
}
"""Lower edges of the bins of each histogram; the last bin has no end."""

Values = Mapping[str, NDArray[np.float64]]


class Tally:
    """Counts of what happened to the documents of one shard; `as_json` of several are added up by `summarise`."""

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, list[int]]] = {}
        """Documents, bytes in, bytes out, by source and by verdict."""
        self.examples: dict[str, list[list[str]]] = {}
        self.counts: dict[str, int] = {}
        """Other metrics by name: ``masked/email``, ``lines_removed/javascript``."""
        self.histograms: dict[str, list[list[int]]] = {}
        """Documents that fall into each bin of `EDGES`, of all and of those kept, by name."""

    def add_groups(
        self, sources: pa.Array, verdicts: Verdicts, bytes_in: pa.Array, bytes_out: pa.Array
    ) -> None:
        rows = pa.table({"source": sources, "code": verdicts.codes, "in": bytes_in, "out": bytes_out})
        totals = rows.group_by(["source", "code"], use_threads=False).aggregate(
            [("in", "count"), ("in", "sum"), ("out", "sum")]
        )
        for row in totals.to_pylist():
            reason = verdicts.reasons[row["code"]]
            group = self.groups.setdefault(row["source"], {}).setdefault(reason, [0, 0, 0])
            kept = reason == KEPT
            for at, value in enumerate((row["in_count"], row["in_sum"], row["out_sum"] if kept else 0)):
                group[at] += value

    def add_example(self, reason: str, id: str, shown: str) -> None:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append([id, excerpt(shown, 100)])

    def count(self, name: str, amount: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount

    def add_values(self, values: Values, kept: NDArray[np.bool_]) -> None:
        """Put each value (NaN where it is not known) into its bin."""
        for name, found in values.items():
            edges = EDGES[name]
            known = ~np.isnan(found)
            bins = np.clip(np.searchsorted(edges, found[known], side="right") - 1, 0, None)
            of_all = np.bincount(bins, minlength=len(edges))
            of_kept = np.bincount(bins[kept[known]], minlength=len(edges))
            held = self.histograms.setdefault(name, [[0] * len(edges), [0] * len(edges)])
            self.histograms[name] = (np.array(held) + np.array([of_all, of_kept])).tolist()

    def as_json(self) -> dict[str, Any]:
        return vars(self)


def values_of(stats: TextStats) -> dict[str, NDArray[np.float64]]:
    """Return what the histograms show of texts' counts, by name."""
    words = np.maximum(1, stats.words)
    return {
        "characters": stats.characters.astype(np.float64),
        "words": stats.words.astype(np.float64),
        "mean word length": stats.word_characters / words,
        "alphabetic words": stats.alphabetic_words / words,
    }


def add_tallies(tallies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the tallies of all shards as one, its keys in order."""
    groups: dict[str, dict[str, list[int]]] = {}
    histograms: dict[str, Any] = {}
    examples: dict[str, list[list[str]]] = {}
    for tally in tallies:
        for source, reasons in tally["groups"].items():
            for reason, counts in reasons.items():
                held = groups.setdefault(source, {}).setdefault(reason, [0, 0, 0])
                held[:] = [a + b for a, b in zip(held, counts, strict=True)]
        for name, bins in tally["histograms"].items():
            histograms[name] = (np.array(bins) + histograms.get(name, 0)).tolist()
        for reason, shown in tally["examples"].items():
            held_examples = examples.setdefault(reason, [])
            held_examples += shown[: EXAMPLES - len(held_examples)]
    return {
        "groups": {source: dict(sorted(groups[source].items())) for source in sorted(groups)},
        "counts": add_up(tally["counts"] for tally in tallies),
        "histograms": {name: histograms[name] for name in EDGES if name in histograms},
        "examples": dict(sorted(examples.items())),
    }


def total(groups: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """Return documents, bytes in, bytes out by verdict, over all sources."""
    sums: dict[str, list[int]] = {}
    for reasons in groups.values():
        for reason, counts in reasons.items():
            sums[reason] = [a + b for a, b in zip(sums.get(reason, [0, 0, 0]), counts, strict=True)]
    return dict(sorted(sums.items()))


def summarise(tallies: Sequence[Mapping[str, Any]], out: Path, notes: Iterable[str] = ()) -> Metrics:
    """Write ``report.md`` and ``report.json`` into ``out``; return the metrics. ``notes`` are lines for the page."""
    whole = add_tallies(tallies)
    reasons = total(whole["groups"])
    kept, _, bytes_out = reasons.get(KEPT, [0, 0, 0])
    totals = {
        "documents": sum(one[0] for one in reasons.values()),
        "kept": kept,
        "bytes_in": sum(one[1] for one in reasons.values()),
        "bytes_out": bytes_out,
    }
    dropped = {reason: one for reason, one in reasons.items() if reason != KEPT}
    metrics = totals | {f"dropped/{reason}": one[0] for reason, one in dropped.items()} | whole["counts"]
    write_text(
        out / "report.json", json.dumps(totals | machine_readable(whole), indent=1, allow_nan=False) + "\n"
    )
    write_text(out / "report.md", page(totals, whole, dropped, notes))
    return {name: float(value) for name, value in metrics.items()}


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def machine_readable(whole: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tally with its numbers named."""
    return {
        "sources": {
            source: {
                reason: dict(zip(("documents", "bytes_in", "bytes_out"), counts, strict=True))
                for reason, counts in reasons.items()
            }
            for source, reasons in whole["groups"].items()
        },
        "counts": whole["counts"],
        "histograms": {
            name: {"from": EDGES[name], "documents": of_all, "kept": of_kept}
            for name, (of_all, of_kept) in whole["histograms"].items()
        },
    }


def page(
    totals: Mapping[str, int],
    whole: Mapping[str, Any],
    dropped: Mapping[str, Sequence[int]],
    notes: Iterable[str],
) -> str:
    text = (
        f"# Clean\n\nKept {totals['kept']} of {totals['documents']} documents, "
        f"{human_bytes(totals['bytes_out'])} of {human_bytes(totals['bytes_in'])} of text.\n"
    )
    text += "".join(f"\n{note}\n" for note in notes)
    if dropped:
        rows = sorted(dropped.items(), key=lambda item: (-item[1][0], item[0]))
        of_all = totals["documents"]
        text += "\n" + table(
            ("reason", "documents", "of all", "text"),
            ((reason, n, f"{n / of_all:.1%}", human_bytes(size)) for reason, (n, size, _) in rows),
        )
    if whole["counts"]:
        text += "\n" + table(("changed within documents", "times"), whole["counts"].items())
    text += "\n## By source\n\n" + table(
        ("source", "verdict", "documents", "text in", "text out"),
        (
            (source, reason, n, human_bytes(size_in), human_bytes(size_out) if reason == KEPT else "")
            for source, reasons in whole["groups"].items()
            for reason, (n, size_in, size_out) in reasons.items()
        ),
    )
    for name, (of_all, of_kept) in whole["histograms"].items():
        text += f"\n## Documents by {name}\n\n" + histogram(EDGES[name], of_all, of_kept)
    for reason, shown in whole["examples"].items():
        safe = [
            (id, begins.replace("<", r"\<")) for id, begins in shown
        ]  # ``<!--`` would hide the rest of the page
        text += f"\n## Examples: {reason}\n\n" + table(("document", "begins"), safe)
    return text


def histogram(edges: Sequence[float], of_all: Sequence[int], of_kept: Sequence[int]) -> str:
    """Return a table with a bar a bin: full where documents were kept, light where they were dropped."""
    filled = [at for at, count in enumerate(of_all) if count]
    if not filled:
        return "None.\n"
    most = max(of_all)
    rows = []
    for at in range(filled[0], filled[-1] + 1):
        solid, whole = round(BAR * of_kept[at] / most), round(BAR * of_all[at] / most)
        rows.append((f"{edges[at]:g}", of_all[at], of_kept[at], "█" * solid + "░" * (whole - solid)))
    return table(("from", "in", "kept", ""), rows)
