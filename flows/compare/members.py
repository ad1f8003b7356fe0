"""The runs that a sweep is to make: all combinations of some settings, with seeds of each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from flows.engine.plan import Step, make_plan
from flows.engine.store import Store
from flows.headline import BITS
from flows.listeners.mlflow.translate import Operation, candidate
from flows.recipe import Recipe, load_recipe, shown

SEED = "pretrain.seed"
COMMAS = re.compile(r",(?![^\[{]*[\]}])")
"""Between values, not within a list."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    chosen: tuple[str, ...]
    """The settings of the grid, and the seed."""
    settings: tuple[str, ...]
    """All changes to the recipe."""
    recipe: Recipe
    steps: list[Step]

    @property
    def name(self) -> str:
        """``lr 1e-3, seed 0``."""
        return in_words(self.chosen)

    @property
    def grid(self) -> list[str]:
        """The settings of the grid but for the seed, as they may be shown."""
        return [shown(one) for one in self.chosen if not one.startswith(f"{SEED}=")]

    @property
    def setting(self) -> str:
        """``lr 1e-3``: what its seeds have in common; empty where the sweep is over seeds alone."""
        return in_words(self.grid)

    def step(self, stage: str) -> Step:
        """The step of a stage that the sweep is about: the one called so, or the last.

        Raises:
            UserError: there is none.
        """
        steps = [step for step in self.steps if step.stage.name == stage]
        if not steps:
            raise UserError(f"a sweep is of models that are trained and evaluated: the recipe has no {stage}")
        return next((step for step in steps if step.name == stage), steps[-1])

    def config(self, stage: str) -> Any:
        """The config of that step."""
        return self.step(stage).config

    @property
    def scored_on(self) -> str:
        """The first set, or else task, of its evaluation: it decides where other documents are held out."""
        evaluated = self.config("evaluate")
        return next((one.name for one in (*evaluated.sets, *evaluated.tasks)), "")

    @property
    def held_out_by(self) -> tuple[Any, ...]:
        """All that decides which documents it holds out and evaluates."""
        split, evaluated = self.config("tokenize"), self.config("evaluate")
        documents = self.step("tokenize").inputs["documents"]
        return documents, split.val_fraction, split.seed, evaluated.max_documents

    @property
    def candidate(self) -> list[Operation]:
        """The operations that make its export the candidate."""
        exported = [
            step
            for step in self.steps
            if step.stage.name == "export" and step.sources["model"] == self.step("pretrain").name
        ]
        return [candidate(self.recipe.name, str(one.fingerprint), newest=False) for one in exported[:1]]

    @property
    def key(self) -> str:
        """Fingerprint of what it will have made when it has ended well."""
        return str(self.steps[-1].fingerprint)


@dataclass(frozen=True)
class Ended:
    """The outcome of a member."""

    member: Member
    evaluation: str = ""
    """The fingerprint of what it evaluated."""
    key: str = ""
    """The key by which its run is found in MLflow."""
    failure: str = ""


def ranking_metrics(members: Sequence[Member]) -> list[str]:
    """Return the metrics of an evaluation by which a sweep's runs are ranked: the first that there is."""
    first = members[0]
    if len({one.held_out_by for one in members}) == 1 or not first.scored_on:
        return [BITS]
    return [f"{first.scored_on}/{BITS}", f"{first.scored_on}/gold_{BITS}"]


def in_words(settings: Sequence[str]) -> str:
    """``lr 1e-3, seed 0``."""
    pairs = (shown(setting).partition("=") for setting in settings)
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, _, value in pairs)


def read_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """Setting -> its values, from ``step.field=value,value``.

    Raises:
        UserError: one is written otherwise, or a setting or a value is there twice.
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        setting, _, values = text.partition("=")
        found = [value.strip() for value in COMMAS.split(values)]
        if not setting or not all(found):
            raise UserError(f"--grid {shown(text)}: write it as step.field=value,value")
        if setting in grid or len(set(found)) < len(found):
            raise UserError(f"--grid {shown(text)}: {setting} or one of its values is there twice")
        grid[setting] = found
    return grid


def read_members(
    path: Path, changes: Sequence[str], grid: dict[str, list[str]], seeds: int, store: Store
) -> list[Member]:
    """All combinations, the seeds of one recipe next to each other.

    Raises:
        UserError: a combination is no valid recipe, can't be planned, or there is but one.
    """
    if SEED in grid and seeds > 1:
        raise UserError(f"--grid {SEED} excludes --seeds: choose one")
    members = []
    for values in itertools.product(*grid.values()):
        settings = [f"{key}={value}" for key, value in zip(grid, values, strict=True)]
        first = first_seed(load_recipe(path, [*changes, *settings]))
        for seed in range(first, first + seeds):
            chosen = settings if SEED in grid else [*settings, f"{SEED}={seed}"]
            recipe = load_recipe(path, [*changes, *chosen])
            steps = make_plan(recipe, store)
            for step in steps:
                if step.action == "unknown":
                    raise UserError(f"{step.name}: {'; '.join(step.why)}")
            members.append(
                Member(chosen=tuple(chosen), settings=(*changes, *chosen), recipe=recipe, steps=steps)
            )
    if len(members) < 2:
        raise UserError("a sweep is of two runs at least: give --grid more values, or --seeds 3")
    return members


def first_seed(recipe: Recipe) -> int:
    """The seed of the training that the sweep is about."""
    if not hasattr(recipe, "pretrain"):
        raise UserError("a sweep is of trainings with other seeds: the recipe has no step pretrain")
    scored = [step for step in recipe.steps if step.stage.name == "evaluate"]
    evaluated = next((step for step in scored if step.name == "evaluate"), scored[-1] if scored else None)
    if evaluated and evaluated.sources["model"] != "pretrain":
        raise UserError(
            f"a sweep is of the model of pretrain, and {evaluated.name} takes that of {evaluated.sources['model']}: "
            "call the evaluation of pretrain's model evaluate"
        )
    seed: int = recipe.pretrain.seed
    return seed
