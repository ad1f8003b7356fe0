"""The meaning of RUN: the evaluated model, and the sealed artifacts of all stages that it was made by."""

from __future__ import annotations

import difflib
import re
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from data_pipeline.core.errors import UserError
from data_pipeline.train_tokenizer.tokenizer import behaviour_sha256
from flows.engine.store import Artifact, Store
from flows.stages import BY_NAME, STAGES

if TYPE_CHECKING:
    from flows.listeners.mlflow.reader import PipelineRun

MOST_NAMED = 5
LATEST = re.compile(r"latest(~(?P<before>\d+))?")
MODELS = tuple(stage.name for stage in STAGES if stage.makes in ("model", ""))
"""Stages that may have made a model."""
SCORES = ("evaluate", "score")
"""Stages that score a model: the first has held-out documents of its corpus, too."""
ENDS = (*SCORES, *MODELS, "export")
"""Stages whose fingerprint names a model."""
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
"""Names of files of weights."""
OF_STEP = re.compile(r"(?P<run>.+)/(?P<step>[A-Za-z0-9_.-]+)")


@dataclass(frozen=True)
class Subject:
    """One of the things compared."""

    label: str
    """``A``, ``B`` ..."""
    name: str
    artifacts: dict[str, Artifact]
    """Artifacts by stage, in the order of the pipeline."""
    run: PipelineRun | None = None
    """In MLflow; None where it was named by a fingerprint or as a registered model."""
    scorings: Sequence[Artifact] = ()
    """Other scores of the same model by `llmill score`, the newest first."""

    @property
    def evaluation(self) -> Artifact:
        """Its scores: by an evaluation of its recipe, or by `llmill score` where that is all there is."""
        return next(self.artifacts[stage] for stage in SCORES if stage in self.artifacts)

    @property
    def made(self) -> Artifact:
        """The model that was evaluated, by whatever stage it was made."""
        return self.artifacts[self.evaluation.inputs["model"].stage]

    @property
    def recipe(self) -> str:
        """The name of the recipe that made the model."""
        return self.made.manifest["recipe"]

    @property
    def model(self) -> str:
        """Identity of what the model computes: weights, shape and tokenizer, whatever settings made them."""
        files = {entry["path"]: entry["sha256"] for entry in self.made.manifest["files"]}
        weights = [sha256 for path, sha256 in sorted(files.items()) if WEIGHTS.fullmatch(path)]
        shape = files["model.json" if "model.json" in files else "config.json"]
        return " ".join([*weights, shape, self.tokenizer])

    @cached_property
    def tokenizer(self) -> str:
        """Checksum of what its tokens stand for."""
        return behaviour_sha256(self.artifacts[self.evaluation.inputs["tokenizer"].stage].path)


class Unknown(UserError):
    """A name that no run, artifact or registered model has."""


class Finder:
    """Looks up what a person names."""

    def __init__(self, store: Store) -> None:
        from flows.listeners.mlflow.lineage import NotAsked
        from flows.listeners.mlflow.reader import PipelineRuns

        self.store = store
        self.why_not = ""
        """Why MLflow says nothing of runs; empty where it does."""
        self._runs: PipelineRuns | None = None
        try:
            self._runs = PipelineRuns(store.home)
        except NotAsked as error:
            self.why_not = str(error)

    def find(self, texts: Sequence[str]) -> list[Subject]:
        """A subject for each text; for a run that evaluated several models, one for each of them.

        Raises:
            UserError: one names nothing, or several things; or what it names is not evaluated, or not in the store.
        """
        return labelled([subject for text in texts for subject in self._find(text)])

    def of_run(self, run: PipelineRun, step: str = "") -> list[Subject]:
        """The models that a run of a recipe evaluated, or the one that a step of it evaluated."""
        evaluations = {name: (stage, one) for name, (stage, one) in run.artifacts.items() if stage in SCORES}
        if not evaluations:
            raise UserError(f"run “{run.name}” ({run.run_id}) evaluated no model: it did not come so far")
        if step and step not in evaluations:
            raise UserError(f"run “{run.name}” has no evaluation {step}; it has {', '.join(evaluations)}")
        exports = {one for stage, one in run.artifacts.values() if stage == "export"}
        return [
            self._of_scores(
                sealed(self.store, *one, f"run “{run.name}”"),
                name="",
                called=run.name if len(evaluations) == 1 else f"{run.name} {name}",
                exports=exports,
                run=run,
            )
            for name, one in sorted(evaluations.items())
            if step in ("", name)
        ]

    def of_export(self, fingerprint: str, name: str, called: str) -> Subject:
        """An exported model."""
        export = sealed(self.store, "export", fingerprint, called)
        return self._of_artifact(export, name, called)

    def of_evaluation(self, fingerprint: str, name: str, called: str, key: str) -> Subject:
        """Return what a run that has just ended evaluated; with its run in MLflow if that is there by now."""
        from flows.listeners.mlflow.lineage import NotAsked

        evaluation = sealed(self.store, "evaluate", fingerprint, called)
        run = None
        try:
            run = self._runs.of_key(key) if self._runs else None
        except NotAsked as error:
            self.why_not = str(error)
        return self._of_scores(evaluation, name=name, called=called, run=run)

    def _find(self, text: str) -> list[Subject]:
        if text.startswith("models:/"):
            return [self.of_export(self.registered(text), "", text)]
        if match := LATEST.fullmatch(text):
            return self.of_run(self._latest(text, int(match["before"] or 0)))
        if match := OF_STEP.fullmatch(text):
            run = self._find(match["run"])[0].run
            if run:
                return self.of_run(run, match["step"])
        runs = self.called(text)
        artifacts = self._fingerprinted(text)
        if len(runs) + len(artifacts) > 1:
            meant = [f"run {run.run_id} “{run.name}”" for run in runs]
            meant += [f"{artifact.stage} {artifact.fingerprint}" for artifact in artifacts]
            raise UserError(f"{text} may be any of {', '.join(meant[:MOST_NAMED])}: give more of its id")
        if runs:
            return self.of_run(runs[0])
        if artifacts:
            called = f"{artifacts[0].stage} {artifacts[0].fingerprint[:8]}"
            return [self._of_artifact(artifacts[0], "", called)]
        raise Unknown(f"no run is called {text}{self._candidates(text)}")

    def registered(self, text: str) -> str:
        """Return the fingerprint of the export that ``models:/NAME@ALIAS`` names.

        Raises:
            UserError: there is none.
        """
        from flows.lineage.graph import Graph
        from flows.lineage.target import registered

        return registered(Graph(self.store), text).fingerprint

    def _latest(self, text: str, before: int) -> PipelineRun:
        newest = self._newest()
        if before >= len(newest):
            reason = f": {self.why_not}" if self.why_not else f"; MLflow knows {len(newest)} evaluated runs"
            raise UserError(f"there is no {text}{reason}")
        return newest[before]

    def _newest(self) -> list[PipelineRun]:
        from flows.listeners.mlflow.lineage import NotAsked

        try:
            return self._runs.newest() if self._runs else []
        except NotAsked as error:
            self.why_not = str(error)
            return []

    def called(self, text: str) -> list[PipelineRun]:
        """Return the runs of that name or id; none where MLflow does not answer, which `why_not` says then."""
        from flows.listeners.mlflow.lineage import NotAsked

        try:
            return self._runs.called(text) if self._runs else []
        except NotAsked as error:
            self.why_not = str(error)
            return []

    def _fingerprinted(self, text: str) -> list[Artifact]:
        if not re.fullmatch(r"[0-9a-f]{6,16}", text):
            return []
        return [
            one for stage in ENDS for one in self.store.artifacts(stage) if one.fingerprint.startswith(text)
        ]

    def _candidates(self, text: str) -> str:
        """The runs that a wrong name may have meant, or the newest ones."""
        newest = self._newest()
        names = {run.name: run for run in newest}
        close = [names[one] for one in difflib.get_close_matches(text, names, MOST_NAMED)]
        listed = ", ".join(f"{run.run_id[:8]} “{run.name}”" for run in (close or newest)[:MOST_NAMED])
        if listed:
            return f"; there are {listed}"
        return f", and {self.why_not or 'MLflow knows of no evaluated run'}"

    def _of_artifact(self, artifact: Artifact, name: str, called: str) -> Subject:
        if artifact.stage in SCORES:
            return self._of_scores(artifact, name=name, called=called)
        exports = {artifact.fingerprint} if artifact.stage == "export" else set[str]()
        if "scores" in artifact.inputs:
            scores = sealed(self.store, *artifact.inputs["scores"].key, called)
            return self._of_scores(scores, name=name, called=called, exports=exports)
        model = artifact.inputs["model"].key if exports else (artifact.stage, artifact.fingerprint)
        return self.of_model(model, name, called, exports)

    def of_model(
        self, model: tuple[str, str], name: str, called: str, exports: Collection[str] = ()
    ) -> Subject:
        """The model with this stage and fingerprint, by its newest evaluation, or else by what `llmill score` made.

        Raises:
            UserError: there is neither.
        """
        for stage in SCORES:
            made = [one for one in self.store.artifacts(stage) if one.inputs["model"].key == model]
            if made:
                return self._of_scores(made[-1], name=name, called=called, exports=exports)
        raise UserError(
            f"{called} is not evaluated: run its recipe to the end, or score it: llmill score MODEL --sets FILE"
        )

    def _of_scores(
        self,
        scores: Artifact,
        *,
        name: str,
        called: str,
        exports: Collection[str] = (),
        run: PipelineRun | None = None,
    ) -> Subject:
        of = [scores.inputs[type_].key for type_ in ("model", "tokenizer")]
        scorings = [
            one
            for one in reversed(self.store.artifacts("score"))
            if [one.inputs[type_].key for type_ in ("model", "tokenizer")] == of and one.path != scores.path
        ]
        line = sealed_line(self.store, scores, exports)
        return Subject(label=name, name=called, artifacts=line, run=run, scorings=scorings)


def sealed_line(store: Store, evaluation: Artifact, exports: Collection[str] = ()) -> dict[str, Artifact]:
    """Return an evaluation, all that it was made from, and the model's export: one of those named, or the newest.

    Raises:
        UserError: one of them is not in the store.
    """
    found = {evaluation.stage: evaluation}
    of = f"{evaluation.stage} {evaluation.fingerprint}"
    model = evaluation.inputs["model"]
    others = [one for name, one in evaluation.inputs.items() if name != "model"]
    waiting = deque([model])  # what the model was made from comes first: it may be evaluated on other texts
    while waiting or others:
        source = waiting.popleft() if waiting else others.pop()
        if source.stage not in found:
            found[source.stage] = sealed(store, *source.key, of)
            waiting.extend(found[source.stage].inputs.values())
    for exported in store.artifacts("export"):
        scores = exported.inputs.get("scores")
        same = scores is not None and scores.fingerprint == evaluation.fingerprint
        if same and (not exports or exported.fingerprint in exports):
            found["export"] = exported
    return {stage: found[stage] for stage in BY_NAME if stage in found}


def sealed(store: Store, stage: str, fingerprint: str, of: str) -> Artifact:
    """Return an artifact that ``of`` was made from.

    Raises:
        UserError: it is not in the store.
    """
    artifact = store.get(stage, fingerprint)
    if artifact is None:
        raise UserError(f"{of}: its {stage} {fingerprint} is not in {store.root}: removed, or made elsewhere")
    return artifact


def labelled(subjects: Sequence[Subject]) -> list[Subject]:
    return [replace(one, label=label(place)) for place, one in enumerate(subjects)]


def label(place: int) -> str:
    """``A`` ... ``Z``, ``AA``, ``AB`` ..."""
    head, letter = divmod(place, 26)
    return (label(head - 1) if head else "") + chr(ord("A") + letter)
