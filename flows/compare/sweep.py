"""A recipe run with all combinations of some settings and seeds, one run after the other, as one parent in MLflow.

Each is a run like any other: what earlier ones sealed is reused, and a sweep that was stopped is resumed where it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import write_durably
from data_pipeline.documents import count_rows
from flows.compare.compare import Comparison, compare
from flows.compare.log import files, note
from flows.compare.subjects import Finder, Subject, label
from flows.compare.verdict import FIRST, SECOND, Verdict
from flows.engine.continuation import read_record
from flows.engine.naming import name_run
from flows.engine.order import Order
from flows.engine.plan import Planned, Selection, Step, make_plan
from flows.engine.store import Artifact, Store, canonical_json
from flows.listeners.mlflow.findings import Finding
from flows.listeners.mlflow.translate import Operation, candidate
from flows.listeners.terminal import Terminal, TerminalListener
from flows.recipe import Recipe, load_recipe, shown
from llm.evaluate.statistics import MIN_DOCUMENTS

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
        pairs = (shown(setting).partition("=") for setting in self.chosen)
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, _, value in pairs)

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


def forecast(members: Sequence[Member]) -> Iterator[tuple[Member, int, int, list[str]]]:
    """For each member: how many steps are sealed, how many an earlier one builds, and those that it builds itself."""
    seen: set[tuple[str, str]] = set()
    for member in members:
        waiting = [step for step in member.steps if step.action != "reuse"]
        keys = {step.name: (step.stage.name, str(step.fingerprint)) for step in waiting}
        builds = [name for name, key in keys.items() if key not in seen]
        seen.update(keys.values())
        yield member, len(member.steps) - len(waiting), len(waiting) - len(builds), builds


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


class NoVerdict(UserError):
    """A sweep that could not show anything when all of it was trained."""


def require_documents(artifact: Artifact) -> None:
    """Refuse token shards that hold out too few documents for a comparison.

    Raises:
        NoVerdict: they do.
    """
    if artifact.stage == "tokenize":
        held_out = sum(count_rows(path) for path in artifact.path.glob("val-*.parquet"))
        if held_out < MIN_DOCUMENTS:
            raise NoVerdict(
                f"{held_out} held-out documents are too few to compare models by, {MIN_DOCUMENTS} are needed: nothing "
                "was trained;\nraise tokenize.val_fraction, or cut the text into more documents (split_chars)"
            )


def foresee(members: Sequence[Member]) -> list[str]:
    """Warn of what the comparison at the end will not be able to show, as far as that is known before anything runs.

    Raises:
        NoVerdict: it will not be able to show anything.
    """
    for member in members:
        most = member.config("evaluate").max_documents
        if most is not None and most < MIN_DOCUMENTS:
            raise NoVerdict(
                f"evaluate.max_documents is {most}, and {MIN_DOCUMENTS} are needed to compare models:\nraise it"
            )
        for step in member.steps:
            if step.action == "reuse" and step.artifact:
                require_documents(step.artifact)
    warnings = []
    models: dict[str, list[str]] = {}
    for member in members:
        made = str(member.step("pretrain").fingerprint)
        models.setdefault(made, []).append(member.name)
    warnings += [f"{' and '.join(names)} make the same model" for names in models.values() if len(names) > 1]
    if len({held_out_by(member) for member in members}) > 1:
        warnings.append(
            "the runs differ in settings that decide which documents are held out: models can be compared only where "
            "these come out the same"
        )
    settings = {tuple(one for one in member.chosen if not one.startswith(f"{SEED}=")) for member in members}
    if len(settings) == len(members):
        warnings.append(
            "one seed of each: this shows which model is better, not which setting; --seeds 3 would show it"
        )
    return warnings


def held_out_by(member: Member) -> tuple[Any, ...]:
    """Return what decides which documents a run holds out and evaluates."""
    split, evaluated = member.step("tokenize"), member.config("evaluate")
    documents, split = split.inputs["documents"], member.config("tokenize")
    return documents, split.val_fraction, split.seed, evaluated.max_documents


def best_of(verdict: Verdict, members: Sequence[Member]) -> tuple[Member | None, str]:
    """The member that should be the candidate, and what the tests say of it; None where nothing can be decided.

    It is the best seed of the recipe with the least bits per byte, and not for being the last that was made.
    """
    if verdict.refused or verdict.scores is None:
        return None, f"no candidate is named, for which is best can't be decided: {verdict.refused}"
    group = min(verdict.groups, key=lambda one: one.mean)
    place = min(group.models, key=lambda one: float(verdict.scores.bits_per_byte[one]))  # type: ignore[union-attr]
    unsure = [
        claim.second if claim.first == group.name else claim.first
        for claim in verdict.recipes
        if group.name in (claim.first, claim.second)
        and (claim.outcome, group.name) not in ((FIRST, claim.first), (SECOND, claim.second))
    ]
    if unsure:
        why = f"it has the least, but is not shown to be better than {', '.join(unsure)}"
    elif len(verdict.groups) > 1:
        why = "its recipe is shown to be better than every other"
    else:
        why = "the least among seeds of one recipe, which is chance"
    bits = float(verdict.scores.bits_per_byte[place])
    return members[place], f"candidate: {members[place].name}, {bits:.4f} bits per byte: {why}"


class Sweep:
    """The runs of a sweep, and their parent in MLflow."""

    def __init__(self, members: Sequence[Member], home: Path, terminal: Terminal, command: str) -> None:
        self.members, self.home, self.terminal, self.command = members, home, terminal, command
        recipe = members[0].recipe.name
        plan = hashlib.sha256(canonical_json([member.key for member in members]).encode()).hexdigest()[:16]
        self._record = home / "runs" / f"sweep-{recipe}-{plan}.json"
        record = read_record(self._record)
        self._done: dict[str, str] = record.get("done", {})
        settings = dict.fromkeys(one.partition("=")[0] for member in members for one in member.chosen)
        name = f"sweep over {', '.join(setting.rpartition('.')[2] for setting in settings)}"
        self._finding = Finding(home, recipe, "sweep", name, record.get("key", ""))
        self._tags = {"llmill.recipe": recipe, "llmill.sweep.settings": ", ".join(settings)}

    def run(self, recipe: Path) -> list[Ended]:
        """Run all members; one that fails leaves the others going."""
        self._save()
        self._finding.hold()
        self._report()
        ended = []
        for number, member in enumerate(self.members, 1):
            self.terminal.title(f"\n{number} of {len(self.members)}  ·  {member.name}")
            ended.append(self._member(member, recipe))
            if ended[-1].failure:
                self.terminal.note(ended[-1].failure, warning=True)
        return ended

    def finish(self, ended: Sequence[Ended]) -> Comparison | None:
        """Put what ended well side by side, name the best the candidate, and end the parent; None where fewer than two
        did.
        """
        well = [one for one in ended if not one.failure]
        comparison = compare(self._subjects(well)) if len(well) > 1 else None
        if comparison:
            text, evidence = note(comparison), files(comparison)
        else:
            text, evidence = "fewer than two runs ended well", {}
        best, reason = best_of(comparison.verdict, [one.member for one in well]) if comparison else (None, "")
        self._report(
            evidence,
            f"{text}\n\n{reason}".strip(),
            "FINISHED" if len(well) == len(ended) else "FAILED",
            best.candidate if best else [],
        )
        if reason:
            self.terminal.note(reason)
        if len(well) == len(ended):
            self._record.unlink(missing_ok=True)
        return comparison

    def stop(self) -> None:
        """Report to MLflow that a person stopped it; the same command resumes it."""
        self._report(status="KILLED")

    def _report(
        self,
        evidence: Mapping[str, str] | None = None,
        text: str = "",
        status: str = "",
        more: Sequence[Operation] = (),
    ) -> None:
        if why_not := self._finding.report(self._tags, evidence, note=text, status=status, more=more):
            self.terminal.note(f"the sweep is not in MLflow yet: {why_not}", warning=True)

    def _member(self, member: Member, recipe: Path) -> Ended:
        evaluation = str(member.step("evaluate").fingerprint)
        if member.key in self._done and all(step.action == "reuse" for step in member.steps):
            self.terminal.note("it ended well before this sweep was stopped")
            return Ended(member, evaluation, self._done[member.key])
        try:
            key = self._run(member, recipe)
        except NoVerdict as error:
            self._report(text=str(error), status="FAILED")
            raise
        except Exception as error:
            return Ended(member, failure=str(error) or type(error).__name__)
        self._done[member.key] = key
        self._save()
        return Ended(member, evaluation, key)

    def _run(self, member: Member, recipe: Path) -> str:
        """Run a member; the key by which its run is found in MLflow."""
        from flows.prefect.pipeline import Pipeline  # Prefect reads its settings when it is imported

        planned = Planned.of(member.recipe, self.home, Selection())
        order = Order(
            planned=planned,
            name=name_run(planned, member.chosen),
            command=self.command,
            sweep=self._finding.key,
            look=require_documents,
        )
        parameters = {
            "recipe": str(recipe.resolve()),
            "settings": [shown(setting) for setting in member.settings],
            "stages": {},
            "home": str(self.home.resolve()),
        }
        with Pipeline(order, {"the terminal": TerminalListener(self.terminal)}) as pipeline:
            pipeline.prepare()
            with pipeline.flow(parameters) as begin:
                begin()
        return pipeline.executor.reporter.known.key

    def _subjects(self, ended: Sequence[Ended]) -> list[Subject]:
        finder = Finder(Store(self.home))
        return [
            finder.of_evaluation(one.evaluation, label(place), one.member.name, one.key)
            for place, one in enumerate(ended)
        ]

    def _save(self) -> None:
        """Note which members are done, for a sweep that resumes this one."""
        self._record.parent.mkdir(parents=True, exist_ok=True)
        write_durably(
            self._record, json.dumps({"key": self._finding.key, "done": self._done}, allow_nan=False)
        )
