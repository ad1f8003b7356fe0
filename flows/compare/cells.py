"""The contents of a comparison's tables, for the terminal and for the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.core.text import duration, p_text
from flows.compare.claims import Claim
from flows.compare.compare import Comparison
from flows.compare.curves import curve_rows
from flows.compare.fixed import MEASURES, Answer
from flows.compare.groups import Group
from flows.compare.rows import ABSENT, Row, marked
from flows.headline import quantity

LONGEST = 40
"""Characters of a setting's value, at most."""
BITS = ("bits_per_byte", "loss", "perplexity")
"""Metrics of which every digit counts."""


@dataclass(frozen=True)
class Section:
    """A table with a heading; where it has no rows, ``empty`` says why."""

    heading: str
    header: list[str]
    rows: list[list[str]]
    empty: str
    fixed: int
    """Columns that describe a row; the others are one a run."""


def sections(comparison: Comparison) -> list[Section]:
    """All tables, in their order."""
    labels = [one.label for one in comparison.subjects]
    settings = [[row.stage, row.name, *map(setting, row.values)] for row in comparison.settings]
    way = curve_rows(comparison.curves, comparison.subjects[0].made.stage)
    if comparison.warnings:
        way = [marked(row) for row in way]
    found = [
        Section(
            heading="Settings that differ",
            header=["stage", "setting", *labels],
            rows=settings,
            empty="none: all are the same",
            fixed=2,
        )
    ]
    for heading, rows, empty in (
        ("Metrics", comparison.metrics, ""),
        (
            "Data that differs",
            [row for row in comparison.data if row.differs],
            "none: all read the same data",
        ),
        ("On the way", way, ""),
    ):
        lines = [[row.stage, row.name.replace("_", " "), *metric_cells(row)] for row in rows]
        found.append(
            Section(heading=heading, header=["stage", "metric", *labels], rows=lines, empty=empty, fixed=2)
        )
    return [*found, *claims(comparison), *fixed(comparison)]


def claims(comparison: Comparison) -> list[Section]:
    """The tests, where there are several."""
    verdict = comparison.verdict
    head = ["", "second − first", "95% interval", "p", "adjusted p", "smallest seen", "outcome"]
    found = []
    if len(verdict.models) > 1:
        rows = [claim_cells(claim) for claim in verdict.models]
        found.append(
            Section(
                heading="Models, by held-out documents", header=head, rows=rows, empty="", fixed=len(head)
            )
        )
    if any(len(group.models) > 1 for group in verdict.groups):
        rows = [group_cells(group) for group in verdict.groups]
        on = f" on {verdict.ranking.name}" if verdict.ranking and verdict.refused else ""
        header = ["recipe", "runs", "seeds", f"mean bits per byte{on}", "standard deviation"]
        found.append(Section(heading="Recipes", header=header, rows=rows, empty="", fixed=len(header)))
    if len(verdict.recipes) > 1:
        rows = [claim_cells(claim) for claim in verdict.recipes]
        found.append(
            Section(
                heading="Recipes against each other, over seeds",
                header=head,
                rows=rows,
                empty="",
                fixed=len(head),
            )
        )
    return found


def fixed(comparison: Comparison) -> list[Section]:
    """The models on sets and tasks, and the recipes over seeds, where there are any."""
    labels = [one.label for one in comparison.subjects]
    verdict = comparison.verdict
    recipes = [group.name for group in verdict.groups if len(group.models) > 1]
    tables = (
        answers("Sets and tasks", verdict.fixed, labels),
        answers("Recipes on sets and tasks, over seeds", verdict.fixed_recipes, recipes),
    )
    return [one for one in tables if one.rows]


def answers(heading: str, found: Sequence[Answer], labels: Sequence[str]) -> Section:
    """A table of answers; of two runs or recipes without a column that names them."""
    first, second = labels if len(labels) == 2 else ("first", "second")
    header = [
        "set or task",
        "metric",
        first,
        second,
        f"{second} − {first} (95% interval)",
        "adjusted p",
        "outcome",
    ]
    rows = [answer_cells(answer) for answer in found]
    if len(labels) > 2:
        header.insert(0, "")
        rows = [
            [f"{one.claim.first}, {one.claim.second}", *row] for one, row in zip(found, rows, strict=True)
        ]
    return Section(heading=heading, header=header, rows=rows, empty="", fixed=len(header))


def answer_cells(answer: Answer) -> list[str]:
    adjusted = p_text(answer.claim.adjusted) if answer.claim.adjusted is not None else ""
    values = [answer.value_text(0), answer.value_text(1)]
    return [answer.name, MEASURES[answer.metric], *values, answer.difference, adjusted, answer.outcome]


def claim_cells(claim: Claim) -> list[str]:
    pair, found = f"{claim.first}, {claim.second}", claim.estimate
    if found is None:
        return [pair, *[""] * 5, claim.outcome]
    numbers = [f"{found.difference:+.4f}", f"{found.low:+.4f} to {found.high:+.4f}", p_text(found.p_value)]
    adjusted = p_text(claim.adjusted) if claim.adjusted is not None else ""
    return [pair, *numbers, adjusted, f"{found.smallest:.4f}", claim.outcome]


def group_cells(group: Group) -> list[str]:
    spread = f"{group.spread:.4f}" if group.spread is not None else ""
    return [group.name, " ".join(group.runs), str(len(group.models)), f"{group.mean:.4f}", spread]


def setting(value: Any) -> str:
    """A setting as a recipe would have it, shortened."""
    text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def metric_cells(row: Row) -> list[str]:
    """Each run's value; from the second on with the difference to the first."""
    first = row.values[0]
    return [
        metric_cell(row.name, value) + (change(row.name, first, value) if place and row.comparable else "")
        for place, value in enumerate(row.values)
    ]


def metric_cell(name: str, value: float | None) -> str:
    if value is None:
        return ABSENT
    if name.startswith("seconds"):
        return duration(value)
    return f"{value:.4f}" if exact(name) else quantity(value, name)


def exact(name: str) -> bool:
    return name.startswith("loss") or name.endswith(BITS)


def change(name: str, first: float | None, value: float | None) -> str:
    """`` (+0.0213)``; nothing where there is no change."""
    if first is None or value is None or first == value:
        return ""
    difference = value - first
    sign = "+" if difference > 0 else "-"
    return f" ({sign}{metric_cell(name, abs(difference))})"


def runs_table(comparison: Comparison) -> Section:
    """Who is compared."""
    rows = []
    for one in comparison.subjects:
        recipe = one.recipe
        run = one.run.run_id[:8] if one.run else ABSENT
        rows.append([one.label, one.name, recipe, run, one.evaluation.fingerprint])
    header = ["", "run", "recipe", "MLflow", "scores"]
    return Section(heading="Runs", header=header, rows=rows, empty="", fixed=len(header))


def split(section: Section, most: int) -> Sequence[Section]:
    """The same in several tables, where more than ``most`` runs stand side by side."""
    runs = len(section.header) - section.fixed
    if runs <= most:
        return [section]
    parts = []
    for start in range(section.fixed, len(section.header), most):
        header, *rows = (
            line[: section.fixed] + line[start : start + most] for line in (section.header, *section.rows)
        )
        parts.append(
            Section(
                heading=section.heading, header=header, rows=rows, empty=section.empty, fixed=section.fixed
            )
        )
    return parts
