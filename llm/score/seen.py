"""Which items and documents that a model is scored on stand in the documents that it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.core.text import table
from data_pipeline.stage import Metrics
from llm.score.config import FixedConfig
from llm.score.items import read_items
from llm.score.prompts import Kind, render
from llm.score.sets import first_texts

if TYPE_CHECKING:
    from data_pipeline.overlap import Overlap

Row = dict[str, Any]
Rows = Mapping[str, Sequence[Row]]
SEEN_SHARE = 0.5
"""A set's document is seen where at least this share of its n-grams is; of a task's item, any is enough."""
ASKED: dict[Kind, str] = {
    "choice": "query",
    "schema": "context_options",
    "continuation": "context",
    "generation": "question",
}
"""Kind -> the field with what is asked, which is sought alone, too: it may stand before other answers."""
NOT_HERE = "the corpus is not here"
WITHOUT = {
    one: one.replace(name, f"{name}_unseen")
    for name in ("accuracy", "bits_per_byte", "gold_bits_per_byte")
    for one in (name, f"{name}_low", f"{name}_high")
}
"""Metrics that are also computed without what was seen, and what they are called then."""


def scored_texts(config: FixedConfig, sets: Rows, tasks: Rows) -> Iterator[tuple[Row, str]]:
    """Yield (row, text) of all that was scored; an item has what is asked and, behind that, each option; no shots."""
    for one, file in zip(config.sets, config.set_files, strict=True):
        for row, (_, text) in zip(sets[one.name], first_texts(one, file), strict=True):
            yield row, text
    for task, file in zip(config.tasks, config.task_files, strict=True):
        for row, item in zip(tasks[task.name], read_items(task, file), strict=False):
            asked = item[ASKED[task.kind]] if task.kind in ASKED else []
            alone = [asked] if isinstance(asked, str) else asked
            yield from ((row, text) for text in [*alone, *render(task.kind, item, (), task.delimiter).texts])


def mark_seen(rows: Sequence[Row], overlap: Overlap) -> None:
    """Give the row of each text the share of its n-grams that were found, over all of the row's texts; None where
    they are too short to have any."""
    places = {id(row): place for place, row in enumerate(rows)}
    owners = np.array([places[id(row)] for row in rows])
    seen, sought = (np.bincount(owners, counts) for counts in (overlap.seen, overlap.sought))
    for place, row in zip(owners.tolist(), rows, strict=True):
        row["seen"] = float(seen[place] / sought[place]) if sought[place] else None


def is_seen(row: Mapping[str, Any]) -> bool:
    """Return whether an item's or document's row counts as seen."""
    share = row.get("seen") or 0.0  # older rows have none
    return bool(share > 0 if "task" in row else share >= SEEN_SHARE)


def of_seen(rows: Sequence[Row], metrics: Metrics, summarised: Callable[[Sequence[Row]], Metrics]) -> Metrics:
    """Compute a set's or task's metrics of what was seen, and some of its others without that, where any is left.

    Args:
        metrics: those of all rows, as ``summarised`` makes them.
    """
    unseen = [row for row in rows if not is_seen(row)]
    found = {"seen": float(len(rows) - len(unseen))}
    if short := sum(row["seen"] is None for row in rows):
        found["too_short"] = float(short)
    if len(unseen) < len(rows):
        metrics = summarised(unseen) if unseen else {}
    return found | {WITHOUT[name]: value for name, value in metrics.items() if name in WITHOUT}


def described(name: str, metrics: Mapping[str, float]) -> str:
    """Describe in a line what of a set or task was seen, and what it is scored with and without."""
    key, form = ("accuracy", ".1%") if "accuracy" in metrics else ("bits_per_byte", ".4f")
    kind = "items" if "items" in metrics else "documents"
    without = WITHOUT[key]
    figures = f"{key.replace('_', ' ')} {metrics[key]:{form}}"
    left = f"without them {metrics[without]:{form}}" if without in metrics else "no others are left"
    short = f" ({metrics['too_short']:,.0f} too short to tell)" if "too_short" in metrics else ""
    return (
        f"{name}: {metrics['seen']:,.0f} of {metrics[kind]:,.0f} {kind} occur in the training documents{short}; "
        f"{figures}, {left}"
    )


def not_sought(why: str) -> str:
    """Describe in a line that nothing was looked for."""
    return f"sets and tasks were not looked for in the training documents: {why}"


def seen_table(metrics: Mapping[str, Mapping[str, float]], unsought: str) -> str:
    """Return the section of the report on what was seen, in Markdown; ``unsought`` is why it was not looked for."""
    heading = "## Seen in training\n\n"
    if unsought:
        return f"{heading}Not looked for: {unsought}.\n"
    rows = []
    for name, one in metrics.items():
        key, form = ("accuracy", ".1%") if "accuracy" in one else ("bits_per_byte", ".4f")
        without = WITHOUT[key]
        ends = [one.get(f"{without}{end}") for end in ("_low", "_high")]
        interval = f" ({ends[0]:{form}} to {ends[1]:{form}})" if None not in ends else ""
        left = f"{one[without]:{form}}{interval}" if without in one else ""
        scored, short = one.get("items", one.get("documents", 0)), one.get("too_short", 0)
        rows.append(
            (name, f"{scored:,.0f}", f"{one['seen']:,.0f}", f"{short:,.0f}", f"{one[key]:{form}}", left)
        )
    header = ("set or task", "scored", "seen", "too short to be looked for", "score", "without what was seen")
    return heading + table(header, rows, ["---", *["---:"] * 5])
