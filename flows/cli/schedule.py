"""Have a recipe run by itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_pipeline.core.errors import UserError
from flows.cli.options import HOME, Home, Overrides, RecipePath, announce
from flows.engine.ports import answers
from flows.engine.process import quiet_libraries
from flows.engine.services import prefect_api
from flows.prefect.schedules import Wanted, expression, meaning, moment, next_times
from flows.prefect.servers import CLIENT_SETTINGS

Cron = Annotated[
    list[str] | None,
    typer.Option(help='When it runs by itself, such as "0 2 * * *" for each night at two; repeatable.'),
]
Every = Annotated[
    list[str] | None,
    typer.Option(metavar="DURATION", help="How often, such as 30m, 6h or 1d; repeatable."),
]
Rrule = Annotated[
    list[str] | None,
    typer.Option(
        help='The same by a rule of iCalendar, such as "FREQ=WEEKLY;BYDAY=MO;BYHOUR=3"; repeatable.'
    ),
]
Timezone = Annotated[str | None, typer.Option(help="Of the schedules, such as Europe/Berlin; else UTC.")]
Paused = Annotated[
    bool,
    typer.Option("--paused", help="Make these schedules, switched off: Prefect's page switches them on."),
]
Pool = Annotated[str | None, typer.Option(help="The work pool whose workers run it; at first: llmill.")]
GpuPool = Annotated[
    str | None, typer.Option(help="Another pool for pretrain and evaluate, which are then flow runs there.")
]
Collision = Annotated[
    Literal["enqueue", "cancel-new"] | None,
    typer.Option(help="When the run before is still going: wait for it (at first), or skip the new one."),
]
Param = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Of the flow, such as stages.stop=tokenize."),
]
Replace = Annotated[
    bool, typer.Option("--replace", help="Replace what was changed on Prefect's pages by what the file says.")
]
File = Annotated[Path, typer.Option(help="Where the deployments are kept, to be edited.")]

SHOWN_TIMES = 2


def deploy(
    recipe: RecipePath,
    cron: Cron = None,
    every: Every = None,
    rrule: Rrule = None,
    timezone: Timezone = None,
    paused: Paused = False,
    pool: Pool = None,
    gpu_pool: GpuPool = None,
    collision: Collision = None,
    set_: Overrides = None,
    param: Param = None,
    replace: Replace = False,
    file: File = Path("prefect.yaml"),
    home: Home = HOME,
) -> None:
    """Register a recipe with Prefect: one deployment for the pipeline, and one for each step."""
    announce(f"reading {recipe}")
    quiet_libraries()
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    api = prefect_api(home)
    if not api or not answers(api):
        where = f"Prefect at {api} does not answer" if api else "there is no Prefect server"
        raise UserError(f"{where}; start one with: llmill up")
    os.environ["PREFECT_API_URL"] = api
    from flows.listeners.terminal import Terminal
    from flows.prefect.deploy import Options, names_of, offer_fields, pools_of, register, write_deployments
    from flows.prefect.page_edits import remember
    from flows.prefect.pools import deployments_of, make_ready
    from flows.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or ())
    options = Options(
        schedules=Wanted(
            cron=cron or (), every=every or (), rrule=rrule or (), timezone=timezone, paused=paused
        ),
        pool=pool,
        gpu_pool=gpu_pool,
        collision=collision,
        settings=set_,
        parameters=tuple(param or ()),
        replace=replace,
    )
    server = deployments_of(api, names_of(loaded))
    written = write_deployments(file, recipe=loaded, path=recipe, home=home, options=options, server=server)
    terminal = Terminal()
    for edit in written.kept:
        terminal.note(f"{edit}: kept, and written to {file}; --replace takes the file's", warning=True)
    for edit in written.replaced:
        terminal.note(f"{edit}: replaced", warning=True)
    make_ready(api, pools_of(file, written.names))
    register(file, written.names)
    offer_fields(api, loaded, recipe)
    entries = deployments_of(api, written.names)
    remember(home, entries)
    console = terminal.console
    show(console, api, entries)
    console.print(f"edit    {file}, then the same command again")


def show(console: Any, api: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each deployment, as the server has it now."""
    for entry in entries:
        count = len(entry["schedules"])
        when = f"{count} schedule{'s' * (count > 1)}" if count else "when asked"
        paused = "  (paused)" if entry["paused"] else ""
        console.print(f"✓ {entry['name']:<28}pool {entry['work_pool_name']:<12}{when}{paused}")
        for schedule in entry["schedules"]:
            due = schedule["active"] and not entry["paused"]
            console.print(
                f"    {said(schedule['schedule'])}: {coming(schedule['schedule']) if due else 'paused'}"
            )
    place = f"{api.removesuffix('/api')}/deployments/deployment/{entries[0]['id']}"
    console.print(f"open    {place}  (Run there starts one now)")


def said(schedule: Mapping[str, Any]) -> str:
    """Write a schedule on one line; a cron is followed by what it means."""
    text, means = expression(schedule), meaning(schedule)
    return text if not means or text.startswith(means) else f"{text}, {means}"


def coming(schedule: Mapping[str, Any]) -> str:
    """Write the next times of a schedule."""
    times = next_times(schedule, SHOWN_TIMES, datetime.now(UTC))
    return f"next {', '.join(map(moment, times))}" if times else "no more times"
