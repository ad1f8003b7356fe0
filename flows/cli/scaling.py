"""Ladders of trainings, and forecasts by them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from data_pipeline.core.text import duration
from flows.cli.comparison import show_forecast
from flows.cli.options import (
    HOME,
    AsJson,
    Home,
    Jobs,
    Overrides,
    RecipePath,
    announce,
    stoppable,
    typed,
    writable,
)
from flows.engine.process import quiet_libraries, save_when_asked
from flows.engine.store import Store
from flows.prefect.servers import PrefectServer


def ladder(
    recipe: RecipePath,
    flops: Annotated[
        str, typer.Option(metavar="C,C,C", help="Budgets: FLOPs of a training, three at least.")
    ],
    sizes: Annotated[int, typer.Option(min=3, help="Models of each budget.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds of their own.")] = 2,
    jobs: Jobs = 1,
    set_: Overrides = None,
    home: Home = HOME,
) -> None:
    """Train models of some sizes on some budgets, and fit the law of their loss."""
    announce(f"reading {recipe}")
    quiet_libraries()
    save_when_asked()
    from flows.listeners.terminal import Terminal, fail

    writable(home)
    terminal = Terminal()
    with stoppable(f"stopped; the same command resumes it: {typed()}"), PrefectServer(home) as server:
        from flows.scaling.ladder import LadderRun
        from flows.scaling.rungs import merged, read_budgets, read_rungs

        rungs = read_rungs(
            recipe, set_ or (), budgets=read_budgets(flops), sizes=sizes, seeds=seeds, store=Store(home)
        )
        show_forecast([one.member for one in rungs], terminal)
        for line in merged(rungs, sizes):
            terminal.note(line, warning=True)
        server.wait()
        runs = LadderRun(rungs, home, terminal, typed())
        try:
            ended = runs.sweep.run(recipe, min(jobs, len(rungs)))
        except KeyboardInterrupt:
            runs.sweep.stop()
            raise
        record = runs.finish(ended)
    for one in ended:
        if one.failure:
            terminal.note(f"{one.member.name}: {one.failure.splitlines()[0]}", warning=True)
    if record is None:
        fail(f"not all runs ended well; the same command runs those again: {typed()}")
        raise typer.Exit(1)
    show(record, terminal)
    terminal.console.print(f"llmill forecast RECIPE --ladder {record.name} foresees others by it")


def forecast(
    recipe: RecipePath,
    ladder: Annotated[
        str,
        typer.Option(metavar="NAME", help="The ladder it is foreseen by; latest: the last that was made."),
    ] = "latest",
    set_: Overrides = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Foresee the loss of a recipe by a ladder, and seal that before it runs."""
    quiet_libraries()
    from flows.listeners.terminal import Terminal
    from flows.recipe import load_recipe
    from flows.scaling.forecast import foresee
    from flows.scaling.record import read_ladder
    from flows.scaling.tables import bounds, flops

    writable(home)
    price = load_recipe(recipe, set_ or ()).runtime.price_per_hour
    record = read_ladder(home, ladder)
    made = foresee(recipe, set_ or (), record, home)
    seconds = made.flops / record.flops_per_second if record.flops_per_second else None
    cost = seconds / 3600 * price if seconds and price else None
    if as_json:
        print(json.dumps({**asdict(made), "seconds": seconds, "price": cost}, indent=1, allow_nan=False))
        return
    console = Terminal().console
    console.print(f"forecast {made.number}: {bounds(made.interval)}")
    console.print(
        f"{made.parameters:,} parameters, {made.tokens:,} tokens, {flops(made.flops)} FLOPs: {made.beyond:.3g} times "
        f"the largest budget of ladder {made.ladder}"
    )
    if seconds is not None:
        priced = f", {cost:,.2f} at {price:g} an hour" if cost is not None else ""
        console.print(f"about {duration(seconds)} at the rate of that ladder's trainings{priced}")
    console.print("it is sealed: llmill forecasts scores it when the recipe has run")


def forecasts(home: Home = HOME, as_json: AsJson = False) -> None:
    """List all forecasts, and how those came out that have run."""
    from flows.listeners.terminal import Terminal
    from flows.scaling.forecast import calibration, scored

    found = scored(home)
    if as_json:
        told = [{**asdict(one.forecast), "measured": one.measured, "outcome": one.outcome} for one in found]
        print(json.dumps(told, indent=1, allow_nan=False))
        return
    console = Terminal().console
    if not found:
        console.print(f"{home} has no forecast yet: llmill forecast RECIPE makes one")
        return
    rows = [
        [
            str(one.forecast.number),
            one.forecast.ladder,
            f"{one.forecast.parameters:,}",
            f"{one.forecast.tokens:,}",
            f"{one.forecast.beyond:.3g}",
            f"{one.forecast.middle:.4f}",
            f"{one.forecast.low:.4f} to {one.forecast.high:.4f}",
            "" if one.measured is None else f"{one.measured:.4f}",
            one.outcome,
        ]
        for one in found
    ]
    header = (
        "",
        "ladder",
        "parameters",
        "tokens",
        "times its FLOPs",
        "foreseen",
        "90%",
        "measured",
        "outcome",
    )
    console.print(as_table(header, rows, left=(1, 8)), soft_wrap=False)
    console.print(calibration(found))


def show(record: Any, terminal: Any) -> None:
    """Print a ladder."""
    from flows.scaling.tables import OPTIMA, RUNGS, in_short, law_text, optima, rung_rows

    ladder = record.ladder
    terminal.console.print()
    terminal.console.print(as_table(RUNGS, rung_rows(ladder)), soft_wrap=False)
    terminal.console.print()
    terminal.console.print(as_table(OPTIMA, optima(ladder)), soft_wrap=False)
    terminal.console.print()
    terminal.console.print(law_text(ladder))
    for line in in_short(record):
        terminal.console.print(line)


def as_table(header: Any, rows: Any, left: tuple[int, ...] = ()) -> Any:
    """Lay out a table; columns of ``left`` are text, the others numbers."""
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    for place, column in enumerate(header):
        table.add_column(column, justify="left" if place in left else "right")
    for row in rows:
        table.add_row(*row)
    return table
