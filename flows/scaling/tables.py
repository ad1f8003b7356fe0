"""A ladder in words and tables, for the terminal, the page and MLflow."""

from __future__ import annotations

import math
from collections import defaultdict

from flows.scaling.record import Record
from llm.scaling.law import Interval, Ladder, Rung

RUNGS = ("FLOPs", "parameters", "tokens", "seeds", "bits per byte", "by the law", "off")
OPTIMA = ("FLOPs", "parameters by the parabola", "by the law", "90%", "tokens", "tokens a parameter")


def flops(number: float) -> str:
    """Write a number of FLOPs as it is typed: ``3e10``."""
    return f"{number:.3g}".replace("e+", "e")


def law_text(ladder: Ladder) -> str:
    """Write the law down."""
    law = ladder.law
    return (
        f"L(N, D) = {law.E:.4g} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f} bits per byte, "
        "N parameters in matrices, D tokens"
    )


def groups(ladder: Ladder) -> list[list[Rung]]:
    """Return the runs, those that differ in the seed alone together."""
    found: dict[tuple[float, int, int], list[Rung]] = defaultdict(list)
    for one in ladder.rungs:
        found[one.budget, one.parameters, one.tokens].append(one)
    return [found[key] for key in sorted(found)]


def rung_rows(ladder: Ladder) -> list[list[str]]:
    """Return a row for each setting: `RUNGS`."""
    rows = []
    for group in groups(ladder):
        one, loss = group[0], sum(each.loss for each in group) / len(group)
        foreseen = ladder.law.loss(one.parameters, one.tokens)
        rows.append(
            [
                flops(one.budget),
                f"{one.parameters:,}",
                f"{one.tokens:,}",
                str(len(group)),
                f"{loss:.4f}",
                f"{foreseen:.4f}",
                f"{loss / foreseen - 1:+.2%}",
            ]
        )
    return rows


def optima(ladder: Ladder) -> list[list[str]]:
    """Return a row for each budget, and for ten times the largest: `OPTIMA`."""
    rows = []
    for budget in [*ladder.budgets, 10 * ladder.budgets[-1]]:
        valley = ladder.valley(budget) if budget in ladder.budgets else None
        best = ladder.optimum(budget)
        tokens = budget / 6 / best.middle
        by_parabola = f"{valley:,.0f}" if valley else ("at an end" if budget in ladder.budgets else "")
        rows.append(
            [
                flops(budget),
                by_parabola,
                f"{best.middle:,.0f}",
                f"{best.low:,.0f} to {best.high:,.0f}",
                f"{tokens:,.0f}",
                f"{tokens / best.middle:,.1f}",
            ]
        )
    return rows


def in_short(record: Record) -> list[str]:
    """Say what a ladder shows."""
    ladder = record.ladder
    exponent = ladder.exponent()
    off = math.sqrt(float((ladder.residuals**2).mean()))
    return [
        f"the best size grows as FLOPs^{exponent.middle:.2f} (90%: {exponent.low:.2f} to {exponent.high:.2f}); "
        "Hoffmann et al. found 0.5",
        f"runs are off the law by {off:.2%} (root mean square); the law of the smaller budgets is off by "
        f"{ladder.drift:.2%} on the largest, for each factor of {math.e:.2f} in FLOPs",
    ]


def bounds(interval: Interval) -> str:
    """Write a loss with its bounds."""
    return f"{interval.middle:.4f} bits per byte (90%: {interval.low:.4f} to {interval.high:.4f})"
