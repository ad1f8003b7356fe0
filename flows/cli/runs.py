"""Run a recipe, say what a run would do, and take part in one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.core.errors import UserError
from flows.cli.completion import steps
from flows.cli.options import (
    HOME,
    AsJson,
    Home,
    Overrides,
    RecipePath,
    announce,
    at_home,
    stoppable,
    typed,
    writable,
)
from flows.engine.process import quiet_libraries, save_when_asked

if TYPE_CHECKING:
    from flows.engine.plan import Planned


def run(
    recipe: RecipePath,
    set_: Overrides = None,
    start: Annotated[
        str | None,
        typer.Option("--from", help="Run from this step on; earlier ones are sealed.", autocompletion=steps),
    ] = None,
    stop: Annotated[
        str | None, typer.Option("--to", help="Run no step after this one.", autocompletion=steps)
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="Run this step alone; its inputs are sealed.", autocompletion=steps),
    ] = None,
    force: Annotated[
        str | None,
        typer.Option(help="Build this step again although it is sealed.", autocompletion=steps),
    ] = None,
    home: Home = HOME,
    debug: Annotated[bool, typer.Option(help="Show the trace of an error.")] = False,
) -> None:
    """Run a recipe: reuse what is sealed, resume what is unfinished, build the rest."""
    announce(f"reading {recipe}")
    quiet_libraries()
    from flows.engine.plan import Planned, Selection
    from flows.recipe import load_recipe, shown

    selection, loaded = (
        Selection(start=start, stop=stop, only=only, force=force),
        load_recipe(recipe, set_ or ()),
    )
    writable(home)
    with stoppable(f"stopped; the same command goes on from here: {typed()}"):
        save_when_asked()
        planned = Planned.of(loaded, home, selection)
        chosen = {"start": start, "stop": stop, "only": only, "force": force}
        parameters = {
            "recipe": str(recipe.resolve()),
            "settings": [shown(setting) for setting in set_ or ()],
            "stages": {name: stage for name, stage in chosen.items() if stage},
            "home": str(home.resolve()),
        }
        carry_out(planned, home, f"{loaded.name}  ·  {recipe}  ·  {home}", parameters)


def carry_out(planned: Planned, home: Path, title: str, parameters: dict[str, Any]) -> None:
    """Run what was planned, told to Prefect: to a server of this home or of the environment, else to one of our own.

    A run that builds nothing needs none of our own.
    """
    from flows.listeners.terminal import Terminal
    from flows.prefect.servers import PrefectServer

    terminal = Terminal()
    terminal.title(title)
    with PrefectServer(home, wanted=planned.builds or bool(planned.recipe.runtime.notify)) as server:
        from flows.prefect.pipeline import Run  # Prefect reads its settings when it is imported

        pipeline = Run(planned.recipe, home, planned.selection, terminal, typed(), planned=planned)
        pipeline.prepare()
        server.wait()
        if server.absent:
            instead = "to a server of its own" if server.there else "nobody, for it builds nothing"
            terminal.note(
                f"Prefect at {server.absent} does not answer; this run is told {instead}", warning=True
            )
        if server.there:
            pipeline.execute(parameters)
        else:
            pipeline.work()
        report(pipeline, home)


def report(pipeline: Any, home: Path) -> None:
    """The end of a run: the table, what it cost, and where to look."""
    from flows.listeners.terminal import duration

    console, results = pipeline.terminal.console, pipeline.results.values()
    pipeline.terminal.summary((result.artifact, result.how, result.seconds) for result in results)
    reused = sum(result.how == "reused" for result in results)
    seconds = duration(sum(result.seconds for result in results))
    what = "every stage was reused" if reused == len(results) else f"{reused} of {len(results)} stages reused"
    console.print(f"\n{what}; stages {seconds}, everything else {duration(pipeline.overhead_seconds)}")
    if exported := pipeline.results.get("export"):
        console.print(f"model   {exported.artifact.path}")
    option = at_home(home)
    tracker = pipeline.tracker
    if tracker.failure:
        pipeline.terminal.note(
            f"not all figures reached MLflow at {tracker.place} ({tracker.failure}); they are kept, and sent by the "
            f"next run or: llmill sync{option}",
            warning=True,
        )
    elif tracker.parent_name:
        console.print(f"MLflow  run “{tracker.parent_name}” of experiment {pipeline.recipe.name}")
    speak = ""
    if exported:
        newest = pipeline.store.artifacts("export")[-1].fingerprint  # which is taken where none is named
        ours = exported.artifact.fingerprint
        model = "" if ours == newest else f" --model {ours}"
        speak = f'   ·   llmill generate{option}{model} --prompt "..."'
    console.print(f"next    llmill ui{option}{speak}")


def plan(recipe: RecipePath, set_: Overrides = None, home: Home = HOME, as_json: AsJson = False) -> None:
    """Say what a run would do, step by step, and why; runs nothing."""
    from flows.engine.plan import make_plan
    from flows.engine.store import Store
    from flows.listeners.terminal import Terminal, headline
    from flows.recipe import load_recipe

    quiet_libraries()
    steps = make_plan(load_recipe(recipe, set_ or ()), Store(home))
    if as_json:
        print(json.dumps([step.as_json() for step in steps], indent=1, allow_nan=False))
        return
    console = Terminal().console
    for step in steps:
        mark = {"reuse": "= reuse  ", "run": "+ run    ", "resume": "> resume ", "unknown": "? unknown"}[
            step.action
        ]
        first, *rest = step.why or [headline(step.artifact) if step.artifact else ""]
        console.print(f"{mark} {step.name:<16}{step.fingerprint or '-':<18}{first}")
        for line in [*rest, *step.predicted]:
            console.print(f"{'':<44}{line}")


def join(
    job: Annotated[Path, typer.Argument(help="The job.json that the first machine names.")],
) -> None:
    """Run this machine's part of a training that another machine started; see docs/training.md."""
    from flows.engine import launch
    from llm.training.job import Job

    if not job.is_file():
        raise UserError(f"{job}: there is no such file; the machines must see the store under one path")
    ranks = Job.model_validate_json(job.read_text(encoding="utf-8")).config.runtime.ranks
    with stoppable("stopped"):
        sys.exit(launch.join("llm.training.trainer", job, ranks))
