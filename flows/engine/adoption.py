"""Adopt what was made elsewhere outside of a recipe: the artifact is the one that a recipe's step would make."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from data_pipeline.core.errors import UserError
from data_pipeline.stage import LocalContext
from flows.engine.manifest import describe_making
from flows.engine.plan import Step, plan_step
from flows.engine.store import Artifact, Store, begin_attempt, now
from flows.engine.uses import Uses
from flows.recipe import Recipe, first_mistake
from flows.stages import BY_NAME
from flows.steps import RecipeStep
from llm.adopt.config import AdoptConfig
from llm.adopt.files import Kind


@dataclass(frozen=True)
class Adopted:
    """A sealed artifact, and how it came to be there."""

    artifact: Artifact
    reused: bool
    """Whether it was sealed before."""


def adopt(config: AdoptConfig, name: str, store: Store) -> Adopted:
    """Seal what a config names, unless that is done; ``name`` stands in the manifest for recipe and step.

    Raises:
        UserError: it can't be used, or can't be looked up from here.
    """
    step = plan_step(RecipeStep(name=name, stage=BY_NAME["adopt"], config=config), {}, store, forced=False)
    if step.config is None:
        raise UserError("; ".join(step.why))
    stage, fingerprint = step.stage.name, str(step.fingerprint)
    uses = Uses(store)
    try:
        with store.lock(stage, fingerprint):
            uses.take(stage, fingerprint)
            sealed = store.get(stage, fingerprint)
            return Adopted(sealed or build(step, store), sealed is not None)
    finally:
        uses.release()


def config_of(name: str, values: Mapping[str, Any]) -> AdoptConfig:
    """The config of a step with these settings, as a recipe would read it.

    Raises:
        UserError: they can't be.
    """
    if values["type"] not in get_args(Kind):
        raise UserError(f"there is no kind {values['type']}: there are {', '.join(get_args(Kind))}")
    try:
        Recipe(name=name)
        return AdoptConfig.model_validate(values)
    except ValidationError as error:
        raise first_mistake(error, name) from None


def recipe_lines(name: str, config: AdoptConfig) -> str:
    """The step as a recipe has it."""
    written = config.model_dump(mode="json", exclude_defaults=True, exclude={"runtime"})
    if name != "adopt":
        written = {"stage": "adopt", **written}
    return str(yaml.safe_dump({name: written}, sort_keys=False, allow_unicode=True, width=1000))


def build(step: Step, store: Store) -> Artifact:
    """Call the stage's body and seal what it wrote. Call it while holding the artifact's lock."""
    assert step.config
    stage, fingerprint = step.stage.name, str(step.fingerprint)
    out, _ = store.begin(stage, fingerprint, {"inputs": {}, "forced": False})
    manifest = describe_making(step, Recipe(name=step.name), {}) | {"started": now()}
    earlier_attempts, earlier_seconds = begin_attempt(out)
    clock, context = time.monotonic(), LocalContext()
    metrics = step.stage.body(step.config, {}, out, context)
    manifest |= {
        "metrics": dict(metrics),
        "notes": context.notes,
        "finished": now(),
        "attempts": earlier_attempts + 1,
        "seconds": round(earlier_seconds + time.monotonic() - clock, 3),
    }
    return store.seal(stage, fingerprint, manifest)
