"""Run a recipe, show what a run would do, and take part in one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.core.errors import UserError
from data_pipeline.core.text import duration
from flows.cli.completion import steps
from flows.cli.models import gives_labels
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
from flows.engine import launch
from flows.engine.process import quiet_libraries, save_when_asked
from flows.engine.store import Store
from flows.listeners.lines import LinesListener
from flows.prefect.servers import PrefectServer

if TYPE_CHECKING:
    from flows.engine.log import Listener
    from flows.engine.order import Order
    from flows.listeners.terminal import Terminal
    from flows.prefect.pipeline import Pipeline


From = Annotated[
    str | None,
    typer.Option("--from", help="Run from this step on; earlier ones are sealed.", autocompletion=steps),
]
To = Annotated[str | None, typer.Option("--to", help="Run no step after this one.", autocompletion=steps)]
Only = Annotated[
    str | None, typer.Option(help="Run this step alone; its inputs are sealed.", autocompletion=steps)
]
Force = Annotated[
    str | None, typer.Option(help="Build this step again although it is sealed.", autocompletion=steps)
]


def run(
    recipe: RecipePath,
    set_: Overrides = None,
    start: From = None,
    stop: To = None,
    only: Only = None,
    force: Force = None,
    name: Annotated[
        str, typer.Option(help="Name of this run in Prefect and MLflow; otherwise it says what was set.")
    ] = "",
    note: Annotated[str, typer.Option(help="What to remember of this run; it stands on its pages.")] = "",
    home: Home = HOME,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the events of the run as they come, one JSON object a line.")
    ] = False,
    debug: Annotated[bool, typer.Option(help="Show the trace of an error.")] = False,
) -> None:
    """Run a recipe: reuse what is sealed, resume what is unfinished, build the rest."""
    if not as_json:
        announce(f"reading {recipe}")
    quiet_libraries()
    from flows.compare.predecessor import with_predecessors
    from flows.engine.naming import name_run
    from flows.engine.order import Order
    from flows.engine.plan import Planned, Selection
    from flows.listeners.terminal import Screen, Terminal
    from flows.recipe import load_recipe

    chosen = {"start": start, "stop": stop, "only": only, "force": force}
    loaded = load_recipe(recipe, set_ or ())
    writable(home)
    with stoppable(f"stopped; the same command resumes it: {typed()}"):
        save_when_asked()
        planned = Planned.of(loaded, home, Selection(**chosen))
        terminal = Terminal(Screen(stderr=True) if as_json else None)

        order = Order(
            planned=planned,
            name=name_run(planned, set_ or (), name),
            command=typed(),
            note=note,
            conclude=with_predecessors,
        )
        terminal.title(f"{loaded.name}  ·  {recipe}  ·  {home}  ·  run “{order.name}”")
        # A run that builds nothing needs no server of our own.
        with PrefectServer(home, wanted=planned.builds or bool(loaded.runtime.notify)) as server:
            with (
                pipeline_of(order, listeners(terminal, as_json)) as pipeline,
                ready(pipeline, server, parameters_of(recipe, set_ or (), chosen, home)) as begin,
            ):
                begin()
            if not as_json:
                report(pipeline, terminal, home)


def pipeline_of(order: Order, shown: Mapping[str, Listener]) -> Pipeline:
    """A run of what is ordered. Prefect reads its settings when it is imported: when its server is known."""
    from flows.prefect.pipeline import Pipeline

    return Pipeline(order, shown)


@contextmanager
def ready(
    pipeline: Pipeline, server: PrefectServer, parameters: Mapping[str, Any]
) -> Iterator[Callable[[], Any]]:
    """Give what to call to carry a run out, as a flow of Prefect's where there is a server."""
    pipeline.prepare()
    server.wait()
    if server.absent:
        instead = "to a server of its own" if server.there else "to nobody, for it builds nothing"
        pipeline.log.warn(f"Prefect at {server.absent} does not answer; this run is reported {instead}")
    if server.there:
        with pipeline.flow(parameters) as begin:
            yield begin
    else:
        yield pipeline.run


def listeners(terminal: Any, as_json: bool) -> dict[str, Listener]:
    """Those who show the run to a person or to a script."""
    from flows.listeners.terminal import TerminalListener

    return {"the terminal": LinesListener(sys.stdout) if as_json else TerminalListener(terminal)}


def parameters_of(
    recipe: Path, settings: Sequence[str], chosen: Mapping[str, str | None], home: Path
) -> dict[str, Any]:
    """The parameters by which a deployment would run the same."""
    from flows.recipe import shown

    return {
        "recipe": str(recipe.resolve()),
        "settings": [shown(setting) for setting in settings],
        "stages": {name: step for name, step in chosen.items() if step},
        "home": str(home.resolve()),
    }


def warn_of_mlflow(pipeline: Pipeline, terminal: Terminal, home: Path) -> bool:
    """Warn where MLflow has not all of a run that is over, and return whether that is so."""
    mlflow = pipeline.mlflow
    if mlflow.failure:
        terminal.note(
            f"not all metrics reached MLflow at {mlflow.place} ({mlflow.failure}); they are kept, and sent by the "
            f"next run or: llmill sync{at_home(home)}",
            warning=True,
        )
    return bool(mlflow.failure)


def report(pipeline: Pipeline, terminal: Terminal, home: Path) -> None:
    """Print the end of a run: the table, what it cost, and where to look."""

    console, executor, mlflow = terminal.console, pipeline.executor, pipeline.mlflow
    results = executor.results
    terminal.summary((name, one.artifact, one.how, one.seconds) for name, one in results.items())
    reused = sum(result.how == "reused" for result in results.values())
    seconds = duration(sum(result.seconds for result in results.values()))
    what = "every step was reused" if reused == len(results) else f"{reused} of {len(results)} steps reused"
    console.print(f"\n{what}; steps {seconds}, everything else {duration(executor.overhead_seconds)}")
    exported = [one.artifact for one in results.values() if one.artifact.stage == "export"]
    for artifact in exported:
        console.print(f"model   {artifact.path}")
    option = at_home(home)
    if not warn_of_mlflow(pipeline, terminal, home):
        console.print(f"MLflow  run “{executor.order.name}” of experiment {executor.order.recipe.name}")
        if mlflow.table:
            console.print(f"        beside the others: {mlflow.table}", soft_wrap=True)
    speak = f"   ·   {say(exported[0], executor.store, option)}" if exported else ""
    console.print(f"next    llmill ui{option}{speak}")


def say(export: Any, store: Any, option: str) -> str:
    """Return the command that uses an export: for one that gives labels, or continues texts."""
    labels = gives_labels(export.path)
    alike = [one for one in store.artifacts("export") if gives_labels(one.path) == labels]
    # The newest one is taken where none is named.
    model = "" if export.fingerprint == alike[-1].fingerprint else f" --model {export.fingerprint}"
    return (
        f'llmill classify{option}{model} "..."'
        if labels
        else f'llmill generate{option}{model} --prompt "..."'
    )


def plan(recipe: RecipePath, set_: Overrides = None, home: Home = HOME, as_json: AsJson = False) -> None:
    """Show what a run would do, step by step, and why; runs nothing."""
    from flows.engine.plan import make_plan
    from flows.headline import headline
    from flows.listeners.terminal import Terminal
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
        first, *rest = step.why or [headline(step.stage.name, step.artifact.metrics) if step.artifact else ""]
        console.print(f"{mark} {step.name:<16}{step.fingerprint or '-':<18}{first}")
        for line in [*rest, *step.predicted]:
            console.print(f"{'':<44}{line}")


def join(
    job: Annotated[Path, typer.Argument(help="The job.json that the first machine names.")],
) -> None:
    """Run this machine's part of a training that another machine started; see docs/training.md."""
    from llm.training.job import Job

    if not job.is_file():
        raise UserError(f"{job}: there is no such file; the machines must see the store under one path")
    ranks = Job.model_validate_json(job.read_text(encoding="utf-8")).config.runtime.ranks
    with stoppable("stopped"):
        sys.exit(launch.join("llm.training.trainer", job, ranks))
