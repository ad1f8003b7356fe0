"""A comparison for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.compare import heat
from flows.compare.cells import Section, runs_table, sections, split
from flows.compare.compare import Comparison

DESCRIBED, RUN = 34, 22
"""Columns of the terminal that a row's name takes, and a run, about."""


def show(comparison: Comparison, console: Console) -> None:
    """Print it; the verdict comes last, where a person looks first."""
    most = max(2, (console.width - DESCRIBED) // RUN)
    print_section(runs_table(comparison), console)
    for section in sections(comparison):
        for part in split(section, most):
            print_section(part, console)
    show_where(comparison, console)
    verdict = comparison.verdict
    console.print()
    for warning in comparison.warnings:
        console.print(Text.assemble(("Warning  ", "bold yellow"), warning), soft_wrap=False)
    said = (
        ("Models", verdict.about_models),
        ("Recipes", verdict.about_recipes),
        ("Budget", comparison.budget),
    )
    for name, text in said:
        if not text:
            continue
        console.print(Text.assemble((f"{name:<9}", "bold"), text), soft_wrap=False)


def show_where(comparison: Comparison, console: Console) -> None:
    """Print where one of two is better, shortly: the page has all of it."""
    for one in comparison.where:
        names = comparison.subjects[0].label, comparison.subjects[1].label
        for table in heat.tables(one, names):
            print_section(table, console)
        heat.show(one, names, console)
    if comparison.is_where_left_out:
        console.print(Text(heat.OF_TWO, "dim"), soft_wrap=False)
    if comparison.where:
        console.print()
        console.print(Text(heat.DESCRIBED, "dim"), soft_wrap=False)


def print_section(section: Section, console: Console) -> None:
    if not (section.rows or section.empty):
        return
    console.print()
    console.print(Text(section.heading, "bold"))
    if not section.rows:
        console.print(section.empty)
        return
    table = Table(box=None, header_style="dim", pad_edge=False)
    for place, name in enumerate(section.header):
        right = place >= section.fixed
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in section.rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)
