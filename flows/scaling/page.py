"""A ladder as one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from flows.compare.cells import Section
from flows.compare.page import STYLE, table
from flows.compare.svg import Line, plot, style
from flows.scaling.record import Record
from flows.scaling.tables import OPTIMA, RUNGS, flops, groups, in_short, law_text, optima, rung_rows
from llm.scaling.law import Ladder, Rung

OFF = "off the law (%)"
CURVE = 40
"""Points of a drawn law."""


def page(record: Record) -> str:
    """The whole page."""
    ladder, title = record.ladder, f"Ladder {record.name}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<dl class="verdict"><dt>The law</dt><dd>{escape(law_text(ladder))}</dd>',
        *(f"<dd>{escape(line)}</dd>" for line in in_short(record)),
        "</dl>",
        '<div class="plots">',
        figure(measured(ladder), "Measured: a line for each budget"),
        figure(drawn(ladder), "The law, at the same budgets"),
        figure(residuals(ladder), "What is left: measured over the law's", OFF),
        "</div>",
        table(Section(heading="The best size", header=[*OPTIMA], rows=optima(ladder), empty="", fixed=1)),
        table(Section(heading="Runs", header=[*RUNGS], rows=rung_rows(ladder), empty="", fixed=1)),
        '<p class="quiet">Hoffmann et al. 2022, arXiv:2203.15556: approach 2 is the parabola through a budget\'s runs, '
        "approach 3 the law. Bounds hold nine times in ten, by a bootstrap over runs and seeds.</p>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>'
        + "\n".join(body)
        + "</body></html>\n"
    )


def figure(lines: list[Line], caption: str, y_name: str = "bits per byte") -> str:
    """A plot over the logarithm of size, with its key."""
    keys = " ".join(
        f'<span style="white-space: nowrap"><span class="key {style(place)}"></span>{escape(line.name)}</span>'
        for place, line in enumerate(lines)
    )
    drawing = plot(lines, "log10 of parameters", y_name)
    return f"<figure>{drawing}<figcaption>{escape(caption)}<br>{keys}</figcaption></figure>"


def measured(ladder: Ladder) -> list[Line]:
    """A line for each budget: the mean of the seeds by size."""
    return by_size(ladder, lambda one: one.loss)


def residuals(ladder: Ladder) -> list[Line]:
    """A line for each budget: how far off the law its runs are, in percent, the mean of the seeds by size."""
    return by_size(ladder, lambda one: 100 * (one.loss / ladder.law.loss(one.parameters, one.tokens) - 1))


def by_size(ladder: Ladder, value: Callable[[Rung], float]) -> list[Line]:
    """A line for each budget: some value of its runs, the mean of the seeds by size."""
    lines = []
    for budget in ladder.budgets:
        found = [group for group in groups(ladder) if group[0].budget == budget]
        x = [math.log10(group[0].parameters) for group in found]
        y = [sum(map(value, group)) / len(group) for group in found]
        lines.append(Line(f"{flops(budget)} FLOPs", x, y))
    return lines


def drawn(ladder: Ladder) -> list[Line]:
    """The law at each budget, over the sizes that were measured there."""
    lines = []
    for budget in ladder.budgets:
        sizes = [math.log10(one.parameters) for one in ladder.rungs if one.budget == budget]
        low, high = min(sizes), max(sizes)
        x = [low + (high - low) * place / (CURVE - 1) for place in range(CURVE)]
        y = [ladder.law.loss(10**one, budget / 6 / 10**one) for one in x]
        lines.append(Line(f"{flops(budget)} FLOPs", x, y))
    return lines
