"""The pipeline as Prefect runs it from a deployment: the flow whose parameters Prefect's pages show as a form.

Deployments name `pipeline` as their entrypoint, so this module imports little; `llmill run` makes flow runs of the
same name with the same parameters.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import State
from pydantic import BaseModel, ConfigDict, Field

from data_pipeline.core.errors import UserError
from flows.engine.process import quiet_libraries
from flows.engine.stopping import heeding_signals
from flows.prefect.names import FLOW, is_made_up

AWAY_SECONDS = 600
SETTING = r"^[^=]+=(.|\n)*$"
"""As `apply_override` takes it: what the keys may be is defined by the recipe's model, not twice."""


StepName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
"""Which there are is defined by the recipe."""


class Stages(BaseModel):
    """Which steps run. All, where nothing is chosen: sealed ones are reused, an unfinished one is resumed."""

    model_config = ConfigDict(extra="forbid")

    start: StepName | None = Field(
        default=None, description="From this step on; earlier ones must be sealed."
    )
    stop: StepName | None = Field(default=None, description="No step after this one.")
    only: StepName | None = Field(default=None, description="This step alone; its inputs must be sealed.")
    force: StepName | None = Field(default=None, description="Build this step again although it is sealed.")


ALL = Stages()
Setting = Annotated[str, Field(pattern=SETTING, description="step.field=value")]


def run_name() -> str:
    """Name a flow run: as it was named in Prefect's form, else after what was set and the step that runs alone."""
    from flows.engine.naming import dated, in_words
    from flows.prefect.form import settings_in

    typed = str(flow_run.name or "")
    if typed and not is_made_up(typed):
        return typed
    parameters = flow_run.parameters
    only, settings = (parameters.get("stages") or ALL).only, settings_in(parameters)
    what = in_words(settings) or recipe_name(Path(parameters["recipe"]), settings)
    return dated(f"{what} {only}" if only else what)


def recipe_name(path: Path, settings: Sequence[str]) -> str:
    """The name that a recipe gives itself; the file's where it can't be read, which the run itself reports."""
    from flows.recipe import load_recipe

    try:
        return load_recipe(path, settings).name
    except UserError:
        return path.stem


@flow(name=FLOW, flow_run_name=run_name, retries=0, persist_result=False)
def pipeline(
    recipe: str,
    config: dict[str, dict[str, Any]] = {},  # noqa: B006
    settings: list[Setting] = [],  # noqa: B006
    stages: Stages = ALL,
    home: str = "",
    dispatch: list[StepName] = [],  # noqa: B006
    note: str = "",
    parent_key: str = "",
    defaults: dict[str, Any] = {},  # noqa: B006
) -> State | None:
    """Run a recipe: reuse what is sealed, resume what is unfinished, build the rest.

    Args:
        recipe: Path of the recipe's file, as the worker sees it.
        config: Settings of the recipe by step, each in a field of its own; an untouched field is as the recipe says.
        settings: Changes to the recipe that no field has, each written as step.field=value.
        stages: Which steps run; all where nothing is chosen.
        home: Where everything is kept; where it is empty, LLMILL_HOME of the worker.
        note: What to remember of this run; it stands on its pages.
        dispatch: Steps that run as deployments of their own, in the work pools that those name.
        parent_key: Tag llmill.key of the run in MLflow that a dispatched step belongs to; set by who dispatches it.
        defaults: Values that the fields of config began with; set by llmill deploy.
    """
    quiet_libraries()
    from flows.prefect.flow_runs import STOPS, at_work, finished, stopped, wait_for_prefect
    from flows.prefect.form import changed

    place = Path(home or os.environ.get("LLMILL_HOME", ".llmill")).expanduser()
    chosen = dict(stages)
    fields = changed(config, defaults)
    command = resume_command(recipe, [*settings, *fields], chosen, place)
    try:
        with (
            heeding_signals(),
            at_work(place),
        ):  # before all else, so that who is killed from here on is found
            from flows.engine.plan import Selection
            from flows.prefect.carry_out import carry_out
            from flows.prefect.dispatch import Dispatcher

            dispatcher = Dispatcher(frozenset(dispatch), parent_key)
            selection = Selection(**chosen)
            carry_out(
                Path(recipe),
                settings,
                place,
                fields=fields,
                selection=selection,
                command=command,
                note=note,
                dispatcher=dispatcher,
            )
    except STOPS as stop:
        return stopped(stop)
    wait_for_prefect(AWAY_SECONDS)
    return finished()


def resume_command(recipe: str, settings: Sequence[str], chosen: Mapping[str, str | None], home: Path) -> str:
    """Return the command that a person types on a machine that sees the home to resume a run."""
    from flows.recipe import shown

    options = {"start": "--from", "stop": "--to", "only": "--only", "force": "--force"}
    words = ["llmill", "run", recipe, *(word for setting in settings for word in ("--set", shown(setting)))]
    words += [word for name, stage in chosen.items() if stage for word in (options[name], stage)]
    return shlex.join([*words, "--home", str(home)])
