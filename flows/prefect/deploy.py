"""Deployments of a recipe, kept in a ``prefect.yaml`` that an operator reads and edits, and registered from there.

One runs the pipeline, and one each step alone. What the file says of a deployment stays; a command changes only what
its options name. ``prefect deploy --all`` registers the same file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import httpx
import yaml
from prefect.client.orchestration import get_client
from prefect.flows import Flow
from prefect.settings import PREFECT_API_URL, temporary_settings
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.core.text import last_lines
from flows.engine.services import POOL
from flows.prefect.deployed import pipeline
from flows.prefect.form import offer_settings, offer_steps
from flows.prefect.page_edits import Edit, find_edits, keep, remembered
from flows.prefect.pools import deployments_of
from flows.prefect.schedules import Wanted, make_schedules, meaning
from flows.recipe import Recipe, apply_override, load_recipe, shown

ENTRYPOINT = "flows.prefect.deployed.pipeline"
HEADER = """\
# llmill's deployments: edit them here, then `llmill deploy RECIPE` or `prefect deploy --all` registers them again.
# RECIPE runs the pipeline, RECIPE.STEP that step alone; docs/servers.md says what each setting is for.
pull: []  # no code is fetched: llmill is installed where workers run
"""
EXPLAINS = "# i.e. "
"""Begins the comment beside a schedule that is llmill's to change."""
Collision = Literal["enqueue", "cancel-new"]


@dataclass(frozen=True)
class Options:
    """The options of the command line; None leaves what the file says."""

    schedules: Wanted = field(default_factory=Wanted)
    pool: str | None = None
    gpu_pool: str | None = None
    collision: Collision | None = None
    settings: Sequence[str] | None = None
    parameters: Sequence[str] = ()
    replace: bool = False
    """Whether the file's values replace what was changed on Prefect's pages."""


@dataclass(frozen=True)
class Written:
    """Deployments in a file, and what became of changes that people made on Prefect's pages."""

    names: list[str]
    kept: list[Edit]
    """They are in the file now."""
    replaced: list[Edit]


def names_of(recipe: Recipe) -> list[str]:
    """The recipe's deployments: the pipeline's, and one for each step."""
    return [recipe.name, *(f"{recipe.name}.{step.name}" for step in recipe.steps)]


def gpu_steps(recipe: Recipe) -> list[str]:
    """The steps whose work is a GPU's."""
    return [step.name for step in recipe.steps if step.stage.trains]


def write_deployments(
    file: Path,
    *,
    recipe: Recipe,
    path: Path,
    home: Path,
    options: Options,
    server: Sequence[Mapping[str, Any]] = (),
) -> Written:
    """Add the recipe's deployments to ``file``, or change those that are there.

    Args:
        server: the deployments as the Prefect server has them; what was changed there stays, unless the options
            name it.

    Raises:
        UserError: the file can't be read, or an option makes no sense.
    """
    document = read(file)
    entries = document.setdefault("deployments", [])
    if entries is None:
        entries = document["deployments"] = []
    known = {entry.get("name"): entry for entry in entries}
    names, whole = names_of(recipe), recipe.name
    new = [name for name in names if name not in known]
    for name in new:
        known[name] = new_entry(name, recipe, path, home)
        entries.append(known[name])
    schedules = make_schedules(options.schedules, schedules_of(whole, known[whole], server))
    written = Written(names, kept=[], replaced=[])
    for edit in find_edits({name: known[name] for name in names}, server, remembered(home)):
        if edit.deployment in new and edit.field not in ("schedules", "paused"):
            continue  # a file that begins anew says where recipe and home are now
        named = schedules and edit.field == "schedules" and edit.deployment == whole
        if options.replace or named:
            written.replaced.append(edit)
        else:
            keep(known[edit.deployment], edit)
            written.kept.append(edit)
    for name in names:
        refuse_commands(known[name], file)
        change(known[name], name.removeprefix(recipe.name).lstrip("."), options, gpu_steps(recipe))
        check_steps(known[name]["parameters"], [step.name for step in recipe.steps])
    if schedules:
        known[whole]["schedules"] = schedules
    for name in names:
        explain(known[name])
    writer = round_trip()
    with atomic_path(file) as temporary, open(temporary, "w", encoding="utf-8") as out:
        writer.dump(document, out)
    return written


def read(file: Path) -> CommentedMap:
    """The file with its comments, or a new one."""
    text = file.read_text(encoding="utf-8") if file.exists() else HEADER
    try:
        document = round_trip().load(text)
    except YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(document, CommentedMap):
        raise UserError(f"{file}: it must hold a mapping with `deployments`, as Prefect's own do")
    return document


def round_trip() -> YAML:
    """Reads and writes YAML with its comments and order."""
    kept = YAML()
    kept.indent(mapping=2, sequence=4, offset=2)
    kept.width = 120
    return kept


def new_entry(name: str, recipe: Recipe, path: Path, home: Path) -> CommentedMap:
    """A deployment as it is first written."""
    step = name.removeprefix(recipe.name).lstrip(".")
    what = f"Only {step} of {recipe.name}." if step else recipe.description or f"All of {recipe.name}."
    parameters: dict[str, Any] = {"recipe": str(path.resolve()), "settings": [], "home": str(home.resolve())}
    if step:
        parameters["stages"] = {"only": step}
    variables = {"working_dir": str(Path.cwd())}
    return CommentedMap(
        {
            "name": name,
            "description": what,
            "entrypoint": ENTRYPOINT,
            "tags": [recipe.name],
            "parameters": parameters,
            "work_pool": {"name": POOL, "job_variables": variables},
            "concurrency_limit": {"limit": 1, "collision_strategy": "ENQUEUE"},
            "schedules": [],
        }
    )


def refuse_commands(entry: CommentedMap, file: Path) -> None:
    """Take out the command that llmill once wrote, and refuse another: no worker of its pools would execute it."""
    variables = entry.get("work_pool", {}).get("job_variables", {})
    if variables.get("command") == "python -m prefect.engine":
        del variables["command"]
    for name in ("command", "env"):
        if name in variables:
            raise UserError(
                f"{file}: {entry['name']}: job_variables.{name} has no effect, for who starts a run could change it; "
                "set it in the base job template of the work pool"
            )


def change(entry: CommentedMap, step: str, options: Options, on_gpus: Sequence[str]) -> None:
    """Apply what the options name to one deployment; ``step`` is empty for the pipeline's."""
    pool = options.gpu_pool if step in on_gpus and options.gpu_pool else options.pool
    if pool:
        entry.setdefault("work_pool", {})["name"] = pool
    parameters = entry.setdefault("parameters", {})
    if options.gpu_pool and not step:
        parameters["dispatch"] = list(on_gpus)
    refuse_secrets([*(options.settings or ()), *options.parameters])
    if options.settings is not None:
        parameters["settings"] = list(options.settings)
    if options.collision:
        strategy = options.collision.upper().replace("-", "_")
        entry["concurrency_limit"] = {"limit": 1, "collision_strategy": strategy}
    if not step:
        for text in options.parameters:
            set_parameter(parameters, text)


def check_steps(parameters: Mapping[str, Any], steps: Sequence[str]) -> None:
    """See that a deployment's parameters name steps of its recipe.

    Raises:
        UserError: one is none.
    """
    chosen = {f"stages.{name}": step for name, step in (parameters.get("stages") or {}).items()}
    chosen |= {f"dispatch.{place}": step for place, step in enumerate(parameters.get("dispatch") or ())}
    for name, step in chosen.items():
        if step is not None and step not in steps:
            raise UserError(f"{name}={step}: no such step; there are {', '.join(steps)}")


def refuse_secrets(settings: Sequence[str]) -> None:
    """See that nothing which may be secret gets into a deployment, which Prefect keeps and shows.

    Raises:
        UserError: an address has a query or a password, or a setting is named like a secret.
    """
    for setting in settings:
        if shown(setting) != setting:
            raise UserError(
                f"{shown(setting)}: Prefect would keep and show what stands for *** in a deployment; write it in the "
                "recipe's file, which only those who run it read"
            )


def set_parameter(parameters: dict[str, Any], text: str) -> None:
    """Apply one ``--param NAME=VALUE`` of the flow, as its signature lets it."""
    name = text.partition("=")[0].partition(".")[0]
    accepted = pipeline.parameters.properties
    if name not in accepted:
        raise UserError(f"--param {text}: the flow has no such parameter; it has {', '.join(accepted)}")
    try:
        apply_override(parameters, text)
        checked: Flow[Any, Any] = pipeline
        checked.validate_parameters({"recipe": "", **yaml.safe_load(dump(parameters))})
    except UserError as error:
        raise UserError(str(error).replace("--set", "--param")) from None
    except Exception as error:  # of pydantic, wrapped by Prefect
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--param {text}: {reason}") from None


def dump(value: Any) -> str:
    text = StringIO()
    round_trip().dump(value, text)
    return text.getvalue()


def schedules_of(name: str, entry: Mapping[str, Any], server: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the schedules of one deployment: those in the file, then the server's."""
    there = [one["schedule"] for known in server if known["name"] == name for one in known["schedules"]]
    return [*(entry.get("schedules") or ()), *there]


def explain(entry: CommentedMap) -> None:
    """Write beside each schedule of a deployment what it means; a comment of somebody else stays."""
    schedules = entry.get("schedules") or []
    for place, schedule in enumerate(schedules):
        if not isinstance(schedule, CommentedMap):
            schedule = schedules[place] = CommentedMap(schedule)
        key, text = next(iter(schedule)), meaning(schedule)
        *_, token, _ = schedule.ca.items.get(key) or (None, None)
        if token is None and text:
            schedule.yaml_add_eol_comment(f"{EXPLAINS}{text}", key)
        elif token is not None and token.value.startswith(EXPLAINS):
            _, end, below = token.value.partition("\n")
            token.value = f"{EXPLAINS}{text or 'as it says'}{end}{below}"


def pools_of(file: Path, names: Sequence[str]) -> list[str]:
    """The work pools that these deployments name."""
    entries = [entry for entry in read(file)["deployments"] if entry["name"] in names]
    return sorted({entry["work_pool"]["name"] for entry in entries})


def register(file: Path, names: Sequence[str]) -> None:
    """Register deployments with the Prefect server of the environment, as ``prefect deploy`` does.

    Raises:
        UserError: Prefect refuses the file; the message holds its output.
    """
    chosen = [word for name in names for word in ("--name", name)]
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(file), *chosen]
    plain = {**os.environ, "NO_COLOR": "1", "COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, env=plain, check=False)
    if done.returncode:
        output = last_lines(done.stdout + done.stderr, 6)
        raise UserError(f"{file}: Prefect refuses these deployments:\n{output}")


def offer_fields(api: str, recipe: Recipe, path: Path) -> None:
    """Have the forms of a recipe's deployments offer its steps and settings, as a run of each would have them now.

    Raises:
        UserError: the recipe does not go with a deployment's list of settings, or Prefect refuses its parameters.
    """
    names = names_of(recipe)
    for entry in deployments_of(api, names):
        schema, parameters = entry["parameter_openapi_schema"], entry["parameters"]
        offer_steps(schema, [step.name for step in recipe.steps])
        step = entry["name"].removeprefix(recipe.name).lstrip(".") or None
        defaults = offer_settings(schema, load_recipe(path, parameters.get("settings") or ()), step)
        changes = {"parameter_openapi_schema": schema, "parameters": {**parameters, "defaults": defaults}}
        place = {"path_params": {"id": entry["id"]}}
        try:
            with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
                client.request("PATCH", "/deployments/{id}", json=changes, **place)
        except httpx.HTTPStatusError as error:
            raise UserError(f"{entry['name']}: Prefect refuses it: {error.response.text}") from None
