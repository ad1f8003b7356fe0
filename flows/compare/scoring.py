"""Models of any kind on fixed sets and tasks: what is to be scored, and the plan of a run that scores one model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import pin
from flows.compare.models import Model
from flows.engine.plan import Planned, Selection, plan_step
from flows.engine.store import Store
from flows.engine.uses import Uses
from flows.recipe import Loader, Recipe, first_mistake
from flows.stages import BY_NAME
from flows.steps import RecipeStep
from llm.score.config import ScoreConfig
from llm.score.prompts import FIELDS

RECIPE = "score"
"""Name of the recipe that all scorings are of: in MLflow, each model is a row of one table."""
SUITES = (".yaml", ".yml")
ENDINGS = (".gz", ".jsonl", ".json", ".parquet", ".txt")


def scoring_config(
    sets: Sequence[Path],
    tasks: Sequence[Path],
    most: int | None,
    *,
    harness: str | None = None,
    harness_tasks: Path | None = None,
) -> ScoreConfig:
    """Make the config of what is named: files of texts and of items, and YAML that lists some as a recipe does.

    Args:
        most: at most so many documents of each set and items of each task; None: as many as the files say.
        harness: names of tasks of lm-evaluation-harness, with commas between.
        harness_tasks: a folder of more tasks of its kind.

    Raises:
        UserError: one can't be read, or is not what it should be.
    """
    if harness_tasks and harness is None:
        raise UserError(f"--harness-tasks {harness_tasks}: name those that are to be run with --harness")
    listed: dict[str, Any] = {"sets": [], "tasks": []}
    for path in dict.fromkeys([*sets, *tasks]):
        if path.suffix in SUITES:
            for kind, more in suite(path).items():
                listed[kind] += more
    listed["sets"] += [{"name": short(path), "path": path} for path in sets if path.suffix not in SUITES]
    listed["tasks"] += [
        {"name": short(path), "path": path, "kind": kind_of(path)}
        for path in tasks
        if path.suffix not in SUITES
    ]
    if most is not None:
        for kind, key in (("sets", "max_documents"), ("tasks", "max_items")):
            listed[kind] = [{**one, key: min(most, one.get(key) or most)} for one in listed[kind]]
    if harness is not None:
        names = [*dict.fromkeys(filter(None, map(str.strip, harness.split(","))))]
        include = harness_tasks and harness_tasks.absolute()
        listed["harness"] = {"tasks": names, "include": include, "max_items": most}
    try:
        return ScoreConfig.model_validate(listed).resolve()
    except ValidationError as error:
        raise first_mistake(error, RECIPE) from None


def suite(path: Path) -> Mapping[str, list[Any]]:
    """The sets and tasks that a YAML file lists: at its top, or under ``evaluate`` as a recipe has them."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if isinstance(values, dict) and isinstance(values.get("evaluate"), dict):
        values = values["evaluate"]
    found = {kind: values.get(kind) or [] for kind in ("sets", "tasks")} if isinstance(values, dict) else {}
    entries = [one for listed in found.values() for one in (listed if isinstance(listed, list) else [None])]
    if not entries or not all(isinstance(one, dict) for one in entries):
        raise UserError(f"{path} lists no sets and no tasks: see docs/evaluate.md")
    return found


def kind_of(path: Path) -> str:
    """The kind of a task, by the fields of its first item."""
    [file] = pin([path], "--tasks")
    first = next((line for line in file.text().split("\n") if line.strip()), "")
    try:
        item = json.loads(first)
    except (ValueError, RecursionError):
        item = None
    if not isinstance(item, dict):
        raise UserError(f"{path}: its first line is no JSON object, so it is no task")
    for kind, fields in FIELDS.items():
        if item.keys() >= {*fields}:
            return kind
    known = "; ".join(f"{kind}: {', '.join(fields)}" for kind, fields in FIELDS.items())
    raise UserError(
        f"{path}: its first item has the fields {', '.join(item)}, and those of no kind ({known})"
    )


def short(path: Path) -> str:
    """A file's name without what says how it is written."""
    name = path
    while name.suffix in ENDINGS:
        name = name.with_suffix("")
    return "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "_.-") else "_" for letter in name.name
    )


def plan_scoring(model: Model, config: ScoreConfig, store: Store) -> Planned:
    """Plan the run that scores a model, and hold what it needs."""
    uses = Uses(store)
    step = RecipeStep(name="score", stage=BY_NAME["score"], config=config, sources=dict(model.sources))
    scored = plan_step(step, model.steps, store, forced=False)
    steps = [*model.steps.values(), scored]
    for one in steps:
        if one.fingerprint:
            uses.take(one.stage.name, one.fingerprint)
    for one in model.steps.values():
        if one.action == "reuse" and not store.get(one.stage.name, str(one.fingerprint)):
            raise UserError(f"{model.name}: {one.stage.name} {one.fingerprint} was removed meanwhile")
    return Planned(recipe=Recipe(name=RECIPE), selection=Selection(), steps=steps, uses=uses)
