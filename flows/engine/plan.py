"""The plan: for each stage, whether its artifact is there, and if not, what differs from the nearest one.

Fingerprints depend on configs and inputs only, so the whole plan is known before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from data_pipeline.core.errors import Unresolved, UserError
from data_pipeline.discards import describe
from data_pipeline.stage import StageConfig
from flows.engine.store import Artifact, Store, fingerprint
from flows.engine.uses import Uses
from flows.recipe import Recipe, flatten
from flows.stages import BY_NAME, STAGES, Stage


@dataclass(frozen=True)
class Selection:
    """Which stages of a recipe a person asked for."""

    start: str | None = None
    """Run from this stage on; those before it must be sealed."""

    stop: str | None = None
    """Run up to this stage, and none after it."""

    only: str | None = None
    """Run this stage; its inputs must be sealed."""

    force: str | None = None
    """Build this stage again although it is sealed."""

    def __post_init__(self) -> None:
        options = {"--from": self.start, "--to": self.stop, "--only": self.only, "--force": self.force}
        for option, name in options.items():
            if name is not None and name not in BY_NAME:
                raise UserError(f"{option} {name}: no such stage; there are {', '.join(BY_NAME)}")
        if self.only and (self.start or self.stop):
            raise UserError("--only excludes --from and --to: choose one")
        if self.start and not self.includes(self.start):
            raise UserError(f"--from {self.start} comes after --to {self.stop}: nothing would run")
        if self.force and not (self.may_run(self.force) and self.includes(self.force)):
            raise UserError(
                f"--force {self.force}: that stage is not among those that --from, --to or --only lets run"
            )

    def may_run(self, stage: str) -> bool:
        """Whether this stage may be built; one before it, that may not, must be sealed."""
        order = list(BY_NAME)
        if self.only:
            return stage == self.only
        return self.start is None or order.index(stage) >= order.index(self.start)

    def includes(self, stage: str) -> bool:
        """Whether the run goes as far as this stage."""
        order, last = list(BY_NAME), self.only or self.stop
        return last is None or order.index(stage) <= order.index(last)


@dataclass(frozen=True)
class Step:
    """What is to be done about one stage of a recipe."""

    stage: Stage
    action: Literal["reuse", "run", "resume", "unknown"]
    why: list[str]
    """For ``run``: what differs from the nearest sealed artifact. For ``unknown``: what can't be resolved."""

    config: StageConfig | None = None
    """Resolved; None where that was not possible."""

    fingerprint: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    artifact: Artifact | None = None
    predicted: list[str] = field(default_factory=list)
    """What a run of the stage will need and find, as far as its config can tell."""

    def as_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage.name,
            "action": self.action,
            "fingerprint": self.fingerprint,
            "why": self.why,
            "predicted": self.predicted,
            "metrics": self.artifact.metrics if self.artifact else {},
            "path": str(self.artifact.path) if self.artifact else None,
        }


def make_plan(recipe: Recipe, store: Store, selection: Selection = Selection()) -> list[Step]:
    """One step a stage, in order.

    Raises:
        UserError: a config that can't be resolved, or a stage that the selection needs and is not sealed.
    """
    steps: dict[str, Step] = {}
    for stage in STAGES:
        if not selection.includes(stage.name):
            break
        step = plan_stage(stage, getattr(recipe, stage.name), steps, store, selection)
        if step.action != "reuse" and step.config:
            check_inputs(step, steps)
        if step.action != "reuse" and not selection.may_run(stage.name):
            option = f"--only {selection.only}" if selection.only else f"--from {selection.start}"
            lacks = "can't be looked up" if step.action == "unknown" else "is not sealed"
            raise UserError(f"{option} needs {stage.name}, which {lacks}: {'; '.join(step.why)}")
        steps[stage.name] = with_prediction(step, steps, recipe.runtime.worker_count)
    return list(steps.values())


def check_inputs(step: Step, steps: Mapping[str, Step]) -> None:
    """Have a step's config look at what is known of its inputs, before anything runs."""
    assert step.config
    inputs = [steps[name] for name in step.stage.inputs]
    configs = {one.stage.name: one.config for one in inputs if one.config}
    made = {one.stage.name: one.artifact.path for one in inputs if one.action == "reuse" and one.artifact}
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


def with_prediction(step: Step, steps: Mapping[str, Step], workers: int) -> Step:
    """``step`` with what its config predicts, where it will run."""
    if step.action == "reuse" or not step.config:
        return step
    source = steps[step.stage.inputs[0]] if step.stage.inputs else None
    known = source.artifact.metrics if source and source.action == "reuse" and source.artifact else {}
    left_out = describe(step.config.left_out() or {}, most=None)
    return replace(step, predicted=[*step.config.predict(known, workers), *left_out])


def plan_stage(
    stage: Stage, config: StageConfig, steps: Mapping[str, Step], store: Store, selection: Selection
) -> Step:
    """The step for one stage, given those for the stages before it."""
    waiting = [name for name in stage.inputs if steps[name].fingerprint is None]
    try:
        resolved = config.resolve()
    except Unresolved as error:
        return Step(stage, "unknown", [str(error)])
    if waiting:
        return Step(stage=stage, action="unknown", why=[f"waits for {', '.join(waiting)}"], config=resolved)
    inputs = {name: str(steps[name].fingerprint) for name in stage.inputs}
    name = fingerprint(stage.name, stage.version, resolved.identity(), inputs)
    artifact = with_left_out(store.get(stage.name, name), resolved)
    running = [name for name in stage.inputs if steps[name].action in ("run", "resume")]
    if selection.force == stage.name:
        return Step(
            stage=stage,
            action="run",
            why=["--force"],
            config=resolved,
            fingerprint=name,
            inputs=inputs,
            artifact=artifact,
        )
    if artifact and (rebuilt := rebuilt_inputs(artifact, steps)):
        why = [f"{input} was built again, with another content" for input in rebuilt]
        return Step(
            stage=stage,
            action="run",
            why=why,
            config=resolved,
            fingerprint=name,
            inputs=inputs,
            artifact=artifact,
        )
    if artifact:
        return Step(
            stage=stage,
            action="reuse",
            why=[],
            config=resolved,
            fingerprint=name,
            inputs=inputs,
            artifact=artifact,
        )
    if store.partial(stage.name, name).exists() and not running:
        return Step(
            stage=stage,
            action="resume",
            why=["an earlier run did not finish it"],
            config=resolved,
            fingerprint=name,
            inputs=inputs,
        )
    why = differences(stage, resolved, inputs, store)
    return Step(stage=stage, action="run", why=why, config=resolved, fingerprint=name, inputs=inputs)


def with_left_out(artifact: Artifact | None, config: StageConfig) -> Artifact | None:
    """Put what the sources leave out now in place of what they left out when ``artifact`` was sealed.

    What is not read is no part of its identity, so it is reused though a folder has other such files by now.
    """
    now = config.left_out()
    if artifact is None or now is None:
        return artifact
    then = {name: value for name, value in artifact.metrics.items() if not name.startswith("left_out/")}
    return replace(artifact, manifest=artifact.manifest | {"metrics": then | now})


def rebuilt_inputs(artifact: Artifact, steps: Mapping[str, Step]) -> list[str]:
    """Inputs whose sealed payload is no longer the one that this artifact was made from."""
    recorded = artifact.manifest["inputs"]
    return [
        name
        for name, source in recorded.items()
        if (current := steps[name].artifact) and current.payload_sha256 != source["payload_sha256"]
    ]


def differences(stage: Stage, config: StageConfig, inputs: Mapping[str, str], store: Store) -> list[str]:
    """Which fields and inputs differ from the nearest sealed artifact of this stage: the newest of those in which
    the fewest do."""
    found = [differences_from(one, stage, config, inputs) for one in reversed(store.artifacts(stage.name))]
    return min(found, key=len, default=["none is sealed yet"])


def differences_from(
    sealed: Artifact, stage: Stage, config: StageConfig, inputs: Mapping[str, str]
) -> list[str]:
    """Which fields and inputs differ from a sealed artifact of this stage."""
    nearest = sealed.manifest
    lines = []
    if nearest["version"] != stage.version:
        lines.append(f"stage version: {nearest['version']} -> {stage.version}")
    before, after = flatten(nearest["config"]), flatten(config.identity())
    lines += [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    lines += [
        f"input {name}: {nearest['inputs'].get(name, {}).get('fingerprint')} -> {inputs[name]}"
        for name in stage.inputs
        if nearest["inputs"].get(name, {}).get("fingerprint") != inputs[name]
    ]
    return lines
