"""The plan: for each step, whether its artifact is there, and if not, what differs from the nearest one.

Fingerprints depend on configs and inputs only, so the whole plan is known before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from data_pipeline.core.errors import Unresolved, UserError
from data_pipeline.discards import describe
from data_pipeline.stage import StageConfig
from flows.engine.store import Artifact, Store, fingerprint
from flows.engine.uses import Uses, recover
from flows.recipe import Recipe, flatten
from flows.stage import Stage
from flows.steps import RecipeStep


@dataclass(frozen=True)
class Selection:
    """Which steps of a recipe a person asked for, by name."""

    start: str | None = None
    """Run from this step on; those before it must be sealed, where one of the others needs them."""

    stop: str | None = None
    """Run up to this step, and none after it."""

    only: str | None = None
    """Run this step; its inputs must be sealed."""

    force: str | None = None
    """Build this step again although it is sealed."""

    def __post_init__(self) -> None:
        if self.only and (self.start or self.stop):
            raise UserError("--only excludes --from and --to: choose one")

    def check(self, order: Sequence[str]) -> None:
        """See that a recipe with these steps has what was asked for.

        Raises:
            UserError: it has not.
        """
        options = {"--from": self.start, "--to": self.stop, "--only": self.only, "--force": self.force}
        for option, name in options.items():
            if name is not None and name not in order:
                raise UserError(f"{option} {name}: no such step; there are {', '.join(order)}")
        chosen = self.chosen(order)
        if not chosen:
            raise UserError(f"--from {self.start} comes after --to {self.stop}: nothing would run")
        if self.force and self.force not in chosen:
            raise UserError(
                f"--force {self.force}: that step is not among those that --from, --to or --only lets run"
            )

    def chosen(self, order: Sequence[str]) -> Sequence[str]:
        """The steps that may be built; others that these need must be sealed."""
        if self.only:
            return [self.only]
        first = order.index(self.start) if self.start else 0
        last = order.index(self.stop) if self.stop else len(order) - 1
        return order[first : last + 1]


@dataclass(frozen=True)
class Step:
    """A step of a recipe, and what is to be done about it."""

    name: str
    stage: Stage
    action: Literal["reuse", "run", "resume", "unknown"]
    why: list[str]
    """For ``run``: what differs from the nearest sealed artifact. For ``unknown``: what can't be resolved."""

    config: StageConfig | None = None
    """Resolved; None where that was not possible."""

    fingerprint: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    """Type of an input -> its fingerprint."""
    sources: dict[str, str] = field(default_factory=dict)
    """Type of an input -> the step that makes it."""
    artifact: Artifact | None = None
    predicted: list[str] = field(default_factory=list)
    """Predictions of what a run of the step will need and find, as far as its config can predict."""

    def as_json(self) -> dict[str, Any]:
        return {
            "step": self.name,
            "stage": self.stage.name,
            "action": self.action,
            "fingerprint": self.fingerprint,
            "inputs": self.sources,
            "why": self.why,
            "predicted": self.predicted,
            "metrics": self.artifact.metrics if self.artifact else {},
            "path": str(self.artifact.path) if self.artifact else None,
        }


def make_plan(recipe: Recipe, store: Store, selection: Selection = Selection()) -> list[Step]:
    """Plan what is to be done about the steps that were asked for and those that they need, in order.

    Raises:
        UserError: a config that can't be resolved, or a step that the selection needs and is not sealed.
    """
    order = [step.name for step in recipe.steps]
    selection.check(order)
    chosen = set(selection.chosen(order))
    needed = chosen | ancestors(recipe.steps, chosen)
    steps: dict[str, Step] = {}
    for of_recipe in recipe.steps:
        if of_recipe.name not in needed:
            continue
        step = plan_step(of_recipe, steps, store, forced=selection.force == of_recipe.name)
        if step.action != "reuse" and step.config:
            check_inputs(step, steps)
        if step.action != "reuse" and step.name not in chosen:
            option = f"--only {selection.only}" if selection.only else f"--from {selection.start}"
            lacks = "can't be looked up" if step.action == "unknown" else "is not sealed"
            raise UserError(f"{option} needs {step.name}, which {lacks}: {'; '.join(step.why)}")
        steps[step.name] = with_prediction(step, steps, store, recipe.runtime.worker_count)
    return list(steps.values())


def ancestors(steps: Sequence[RecipeStep | Step], names: Iterable[str]) -> set[str]:
    """All steps that the products of some descend from, without these."""
    sources = {step.name: step.sources for step in steps}
    start = set(names)
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        more = set(sources[waiting.pop()].values()) - found
        found |= more
        waiting += more
    return found - start


def check_inputs(step: Step, steps: Mapping[str, Step]) -> None:
    """Have a step's config look at what is known of its inputs, before anything runs."""
    assert step.config
    inputs = {type_: steps[name] for type_, name in step.sources.items()}
    configs = {type_: one.config for type_, one in inputs.items() if one.config}
    made = {
        type_: one.artifact.path for type_, one in inputs.items() if one.action == "reuse" and one.artifact
    }
    step.config.check_inputs(configs, made)


@dataclass(frozen=True)
class Planned:
    """A recipe with its plan, whose artifacts are held."""

    recipe: Recipe
    selection: Selection
    steps: list[Step]
    uses: Uses

    @classmethod
    def of(cls, recipe: Recipe, home: Path, selection: Selection) -> Self:
        """Make the plan, and hold what it names."""
        store = Store(home.resolve() if recipe.runtime.elsewhere else home)
        recover(store)
        uses = Uses(store)
        steps = plan_and_hold(recipe, store, selection, uses)
        return cls(recipe=recipe, selection=selection, steps=steps, uses=uses)

    @property
    def builds(self) -> bool:
        """Whether there is anything to build."""
        return any(step.action != "reuse" for step in self.steps)


def plan_and_hold(recipe: Recipe, store: Store, selection: Selection, uses: Uses) -> list[Step]:
    """`make_plan`, when nobody can remove any more what the plan names: ``uses`` holds it."""
    while True:
        steps = make_plan(recipe, store, selection)
        for step in steps:
            if step.fingerprint:
                uses.take(step.stage.name, step.fingerprint)
        reused = [step for step in steps if step.action == "reuse"]
        if all(store.get(step.stage.name, str(step.fingerprint)) for step in reused):
            return steps  # else something was removed before we held it


def with_prediction(step: Step, steps: Mapping[str, Step], store: Store, workers: int) -> Step:
    """``step`` with what its config predicts, where it will run."""
    if step.action == "reuse" or not step.config:
        return step
    source = steps[next(iter(step.sources.values()))] if step.sources else None
    known = source.artifact.metrics if source and source.action == "reuse" and source.artifact else {}
    left_out = describe(step.config.left_out() or {}, most=None)
    lines = [*step.config.predict(known, workers), *left_out, *step.config.foresee(lineage(step, steps))]
    if step.fingerprint and step.action == "run":
        lines += step.config.continued(store.root / step.stage.name, step.inputs)
    return replace(step, predicted=lines)


def lineage(step: Step, steps: Mapping[str, Step]) -> dict[str, list[StageConfig]]:
    """Type of a step's input -> configs of the step that makes it and of all before that, where they are resolved."""
    found = {}
    for type_, source in step.sources.items():
        names = {source, *ancestors([*steps.values()], [source])}
        configs = (one.config for name, one in steps.items() if name in names)
        found[type_] = [config for config in configs if config]
    return found


def plan_step(of_recipe: RecipeStep, steps: Mapping[str, Step], store: Store, *, forced: bool) -> Step:
    """Plan what is to be done about one step, given those before it."""
    stage, sources = of_recipe.stage, of_recipe.sources
    step = Step(name=of_recipe.name, stage=stage, action="unknown", why=[], sources=sources)
    try:
        resolved = of_recipe.config.resolve()
    except Unresolved as error:
        return replace(step, why=[str(error)])
    step = replace(step, config=resolved)
    waiting = [name for name in dict.fromkeys(sources.values()) if steps[name].fingerprint is None]
    if waiting:
        return replace(step, why=[f"waits for {', '.join(waiting)}"])
    inputs = {type_: str(steps[name].fingerprint) for type_, name in sources.items()}
    name = fingerprint(stage.name, stage.version, resolved.identity(), inputs)
    artifact = with_left_out(store.get(stage.name, name), resolved)
    step = replace(step, fingerprint=name, inputs=inputs, artifact=artifact)
    if forced:
        return replace(step, action="run", why=["--force"])
    if artifact:
        rebuilt = [f"{one} was built again, with another content" for one in rebuilt_inputs(step, steps)]
        return replace(step, action="run" if rebuilt else "reuse", why=rebuilt)
    running = any(steps[name].action in ("run", "resume") for name in sources.values())
    if store.partial(stage.name, name).exists() and not running:
        return replace(step, action="resume", why=["an earlier run did not finish it"])
    return replace(step, action="run", why=differences(step, store))


def with_left_out(artifact: Artifact | None, config: StageConfig) -> Artifact | None:
    """Put what the sources leave out now in place of what they left out when ``artifact`` was sealed.

    What is not read is no part of its identity, so it is reused though a folder has other such files by now.
    """
    now = config.left_out()
    if artifact is None or now is None:
        return artifact
    then = {name: value for name, value in artifact.metrics.items() if not name.startswith("left_out/")}
    return replace(artifact, manifest=artifact.manifest | {"metrics": then | now})


def rebuilt_inputs(step: Step, steps: Mapping[str, Step]) -> list[str]:
    """The steps whose sealed payload is no longer the one that a step's artifact was made from."""
    assert step.artifact
    recorded = step.artifact.inputs
    return [
        name
        for type_, name in step.sources.items()
        if (now := steps[name].artifact) and now.payload_sha256 != recorded[type_].payload_sha256
    ]


def differences(step: Step, store: Store) -> list[str]:
    """Which fields and inputs differ from the nearest sealed artifact of a step's stage: the newest of those in which
    the fewest do."""
    sealed = reversed(store.artifacts(step.stage.name))
    return min((differences_from(one, step) for one in sealed), key=len, default=["none is sealed yet"])


def differences_from(sealed: Artifact, step: Step) -> list[str]:
    """Which fields and inputs differ from a sealed artifact of a step's stage."""
    assert step.config
    nearest = sealed.manifest
    lines = []
    if nearest["version"] != step.stage.version:
        lines.append(f"stage version: {nearest['version']} -> {step.stage.version}")
    before, after = flatten(nearest["config"]), flatten(step.config.identity())
    lines += [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    read = {type_: one.fingerprint for type_, one in sealed.inputs.items()}
    return lines + [
        f"input {type_}: {read.get(type_)} -> {name}"
        for type_, name in step.inputs.items()
        if read.get(type_) != name
    ]
