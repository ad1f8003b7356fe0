"""List the runs of a home."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.core.errors import UserError
from flows.cli import completion
from flows.cli.options import HOME, AsJson, Home, at_home
from flows.engine.logged_runs import logged_runs
from flows.engine.process import quiet_libraries
from flows.engine.services import prefect_api


def runs(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe's name or file; without it, the runs of all.",
            show_default=False,
            autocompletion=completion.recipes,
        ),
    ] = "",
    most: Annotated[int, typer.Option("-n", "--most", min=1, help="List so many, the newest.")] = 20,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """List runs, the newest first: settings that differ, bits per byte, state, time, and id in MLflow."""
    quiet_libraries()
    from flows.compare.listing import listing, show
    from flows.listeners.mlflow.lineage import NoRunYet, NotAsked
    from flows.listeners.mlflow.reader import PipelineRuns
    from flows.listeners.terminal import Terminal

    name = name_of(recipe)
    try:
        found = PipelineRuns(home).listed()
    except NoRunYet:
        found = []
    except NotAsked as error:
        raise UserError(str(error)) from None
    wanted = [one for one in found if name in ("", one.run.recipe)]
    if not wanted and name == recipe != "" and found:
        known = ", ".join(sorted({one.run.recipe for one in found}))
        raise UserError(f"no run is of a recipe called {recipe}; there are runs of {known}")
    rows = listing(wanted[:most], logged_runs(home))
    older = len(wanted) - len(rows)
    if as_json:
        print(
            json.dumps({"runs": [row.as_json() for row in rows], "older": older}, indent=1, allow_nan=False)
        )
        return
    console = Terminal().console
    if not rows:
        of = f" of {name}" if name else ""
        file = shlex.quote(recipe) if name != recipe else "flows/recipes/quickstart.yaml"
        console.print(f"no runs{of} in {home} yet; start with: llmill run {file}{at_home(home)}")
        return
    show(rows, console, prefect_api(home).removesuffix("/api"), time.time())
    if older:
        again = f"llmill runs{f' {shlex.quote(recipe)}' if recipe else ''}{at_home(home)} -n {len(wanted)}"
        console.print(f"{older} older not shown: {again}")


def name_of(recipe: str) -> str:
    """The name of the recipe that a person means; a file says it itself."""
    from flows.recipe import load_recipe

    if recipe.endswith((".yaml", ".yml")) or os.path.isfile(recipe):  # of a name that no file can have, too
        return load_recipe(Path(recipe)).name
    return recipe
