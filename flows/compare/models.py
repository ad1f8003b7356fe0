"""The meaning of MODEL where any will do: what is sealed here, or the folder or name of one that was made elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.core.errors import UserError
from flows.compare.subjects import MODELS, Finder, Subject, Unknown, labelled, sealed
from flows.engine.adoption import config_of
from flows.engine.plan import Step, plan_step
from flows.engine.store import Artifact, Store
from flows.lineage.graph import Graph
from flows.lineage.target import in_folder, registered
from flows.stages import BY_NAME
from flows.steps import RecipeStep

FINGERPRINT = re.compile(r"[0-9a-f]{6,16}")
HOLDS_A_MODEL = ("model.json", "config.json")
"""Files of which a model has one: of ours, or of one that only `transformers` computes."""
HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Model:
    """A model and its tokenizer, as the steps of a plan that make them, or reuse them."""

    name: str
    steps: Mapping[str, Step]
    sources: Mapping[str, str]
    """``model`` and ``tokenizer`` -> the step that each comes from."""


def find_models(text: str, store: Store) -> list[Model]:
    """Find what a person names: a folder, ``models:/NAME@ALIAS``, a fingerprint, a run, or OWNER/NAME on the hub.

    Raises:
        UserError: it names nothing, or several things, or no model.
    """
    if Path(text).is_dir():
        return [of_folder(Path(text), store)]
    if text.startswith("models:/"):
        return [of_artifact(registered(Graph(store), text).artifact, text, store)]
    if FINGERPRINT.fullmatch(text) and (node := Graph(store).named(text)):
        return [of_artifact(node.artifact, f"{node.stage} {node.fingerprint[:8]}", store)]
    try:
        found = Finder(store).find([text])
    except Unknown:
        if not HUB.fullmatch(text):
            raise
        return [of_elsewhere(text, store, hub=text)]
    return [of_artifact(one.evaluation, one.name, store) for one in found]


def find_subjects(texts: Sequence[str], store: Store) -> list[Subject]:
    """Return the scored model of each thing that `find_models` takes; for a run, each model that it scored.

    Raises:
        UserError: one names nothing, or several things, or a model that was not scored.
    """
    finder = Finder(store)
    return labelled([subject for text in texts for subject in subjects_of(text, finder)])


def subjects_of(text: str, finder: Finder) -> list[Subject]:
    if not Path(text).is_dir():
        try:
            return finder.find([text])
        except Unknown:
            if not HUB.fullmatch(text):
                raise
    found = []
    for model in find_models(text, finder.store):
        step = model.steps[model.sources["model"]]
        found.append(finder.of_model((step.stage.name, str(step.fingerprint)), "", model.name))
    return found


def of_folder(folder: Path, store: Store) -> Model:
    """The model in a folder: a sealed one where it is that or a copy of it, else one to be adopted."""
    try:
        node = in_folder(Graph(store), folder)
    except UserError:
        return of_elsewhere(folder.resolve().name, store, path=folder.expanduser().absolute())
    return of_artifact(node.artifact, folder.resolve().name, store)


def of_elsewhere(name: str, store: Store, **place: str | Path) -> Model:
    """A model that was made elsewhere; its content is what it is known by."""
    config = config_of("adopt", {"type": "model", "any_architecture": True, **place})
    step = plan_step(RecipeStep("adopt", BY_NAME["adopt"], config), {}, store, forced=False)
    if step.config is None:
        raise UserError("; ".join(step.why))
    return Model(name, {"adopt": step}, {"model": "adopt", "tokenizer": "adopt"})


def of_artifact(artifact: Artifact | None, name: str, store: Store) -> Model:
    """The model that an artifact is, or was made from."""
    if artifact is None:
        raise UserError(f"{name} is not finished: run its recipe to the end")
    inputs = artifact.inputs
    if artifact.stage in MODELS and any((artifact.path / name).exists() for name in HOLDS_A_MODEL):
        model = artifact
        tokenizer = sealed(store, *inputs["tokenizer"].key, name) if "tokenizer" in inputs else artifact
    elif {"model", "tokenizer"} <= inputs.keys():
        model, tokenizer = (sealed(store, *inputs[type_].key, name) for type_ in ("model", "tokenizer"))
    else:
        raise UserError(f"{name} is no model: it is what {artifact.stage} made")
    steps = {one.stage: reused(one) for one in (model, tokenizer)}
    return Model(name, steps, {"model": model.stage, "tokenizer": tokenizer.stage})


def reused(artifact: Artifact) -> Step:
    """A step that is there already."""
    return Step(
        name=artifact.stage,
        stage=BY_NAME[artifact.stage],
        action="reuse",
        why=[],
        fingerprint=artifact.fingerprint,
        artifact=artifact,
    )
