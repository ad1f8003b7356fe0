"""Put runs side by side, and try settings out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.core.errors import UserError
from flows.cli.options import (
    HOME,
    AsJson,
    Home,
    Jobs,
    Overrides,
    RecipePath,
    announce,
    is_read_only,
    stoppable,
    typed,
    writable,
)
from flows.cli.score import Most, SetFiles, TaskFiles, score_all
from flows.engine.process import quiet_libraries, save_when_asked
from flows.engine.store import Store
from flows.prefect.servers import PrefectServer

Budget = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="Share of false findings among those found, over all comparisons of this home."
    ),
]


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="A run's name or id in MLflow, a fingerprint, models:/NAME/VERSION, latest or latest~1; or any other "
            "model that llmill score takes.",
            metavar="RUN RUN [...]",
        ),
    ],
    as_json: AsJson = False,
    sets: SetFiles = None,
    tasks: TaskFiles = None,
    most: Most = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the page with plots there.", metavar="FILE")
    ] = None,
    least: Annotated[
        float, typer.Option(min=0, help="Bits per byte below which a difference doesn't matter.")
    ] = 0.0,
    least_accuracy: Annotated[
        float, typer.Option(min=0, max=1, help="The same of the share of a task's items that is right.")
    ] = 0.0,
    budget: Budget = None,
    log: Annotated[bool, typer.Option(help="Keep page and JSON in MLflow, as a run.")] = True,
    home: Home = HOME,
) -> None:
    """Show in what runs differ, and whether one's model or recipe is better than another's.

    With sets or tasks, all models are scored on these first.
    """
    quiet_libraries()
    from flows.compare.claims import Least
    from flows.compare.classifiers import classifiers_of
    from flows.compare.models import find_subjects
    from flows.compare.page import page
    from flows.compare.scoring import scoring_config
    from flows.compare.show import show
    from flows.listeners.terminal import Screen, Terminal

    if not math.isfinite(least + least_accuracy):
        raise UserError("--least and --least-accuracy are finite numbers")
    if budget is not None and not 0 < budget < 1:
        raise UserError("--budget is a share between 0 and 1, as 0.1")
    terminal = Terminal(Screen(stderr=True) if as_json else None)
    if sets or tasks:
        score_all(runs, scoring_config(sets or (), tasks or (), most), home=home, terminal=terminal)
    if given := classifiers_of(runs, Store(home)):
        return compare_labels(given, terminal, as_json=as_json)
    subjects = find_subjects(runs, Store(home))
    if len(subjects) < 2:
        raise UserError("name two runs at least: llmill compare latest~1 latest")
    comparison = compared(subjects, Least(least, least_accuracy), budget, home)
    if html:
        write_page(html, page(comparison))
    if as_json:
        print(json.dumps(comparison.as_json(), indent=1, allow_nan=False))
    else:
        show(comparison, terminal.console)
    if log:
        keep(comparison, home, terminal)


def compare_labels(given: Any, terminal: Any, *, as_json: bool) -> None:
    """Show which of some models that give labels is more often right.

    Raises:
        UserError: there is one only, or they held out no texts in common.
    """
    from flows.compare.classifiers import compare

    if len(given) < 2:
        raise UserError("name two classifiers at least")
    comparison = compare(given)
    if as_json:
        print(json.dumps(comparison.as_json(), indent=1, allow_nan=False))
    else:
        comparison.show(terminal.console)


def compared(subjects: Any, least: Any, budget: float | None, home: Path) -> Any:
    """Put runs side by side, paid from a budget of false findings where there is one."""
    from flows.compare.budget import look, pay
    from flows.compare.compare import compare

    if budget is None:
        return compare(subjects, least)
    writable(home)
    paid = look(home, subjects, budget)
    comparison = compare(subjects, replace(least, correction=paid.correction))
    pay(home, paid, comparison.verdict, [one.name for one in subjects])
    return replace(comparison, budget=paid.in_words())


def write_page(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {path}: {error.strerror}") from None


def keep(comparison: Any, home: Path, terminal: Any) -> None:
    """Log a comparison to MLflow, or warn why it is not there."""
    from flows.compare.log import log

    if is_read_only(home):
        terminal.note(f"not in MLflow: {home} can't be written to", warning=True)
        return
    where, why_not = log(comparison, home)
    if why_not:
        terminal.note(f"not in MLflow yet: {why_not}; llmill sync sends it, or the next run", warning=True)
    else:
        terminal.note(f"in MLflow: {where}")


def sweep(
    recipe: RecipePath,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP.FIELD=VALUE,VALUE", help="Run with each of these values; repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each combination, with seeds of their own.")] = 1,
    jobs: Jobs = 1,
    set_: Overrides = None,
    home: Home = HOME,
) -> None:
    """Run a recipe with all combinations of some settings, and compare what comes out."""
    announce(f"reading {recipe}")
    quiet_libraries()
    save_when_asked()
    from flows.compare.show import show
    from flows.listeners.terminal import Terminal, fail

    writable(home)
    terminal = Terminal()
    with stoppable(f"stopped; the same command resumes it: {typed()}"), PrefectServer(home) as server:
        from flows.compare.members import read_grid, read_members
        from flows.compare.sweep import Sweep, foresee

        members = read_members(recipe, set_ or (), read_grid(grid or ()), seeds, Store(home))
        show_forecast(members, terminal)
        for warning in foresee(members):
            terminal.note(warning, warning=True)
        server.wait()
        runs = Sweep(members, home, terminal, typed())
        try:
            ended = runs.run(recipe, min(jobs, len(members)))
        except KeyboardInterrupt:
            runs.stop()
            raise
        comparison = runs.finish(ended)
    if comparison:
        show(comparison, terminal.console)
    failed = [one for one in ended if one.failure]
    for one in failed:
        terminal.note(f"{one.member.name}: {one.failure.splitlines()[0]}", warning=True)
    if failed:
        fail(f"{len(failed)} of {len(ended)} runs failed; the same command runs them again: {typed()}")
        raise typer.Exit(1)


def show_forecast(members: Any, terminal: Any) -> None:
    """Print what a sweep will run, and how much of it is shared."""
    from rich.table import Table

    from flows.compare.sweep import forecast

    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("run", "settings", "sealed", "shared", "to be built"):
        table.add_column(column, justify="right" if column in ("run", "sealed", "shared") else "left")
    built = steps = 0
    for number, (member, sealed, shared, builds) in enumerate(forecast(members), 1):
        table.add_row(str(number), member.name, str(sealed), str(shared), ", ".join(builds) or "nothing")
        built, steps = built + len(builds), steps + len(member.steps)
    terminal.console.print(table, soft_wrap=False)
    terminal.console.print(
        f"{len(members)} runs of {steps} steps, of which {built} are built and {steps - built} shared or sealed"
    )
