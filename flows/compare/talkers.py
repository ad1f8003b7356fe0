"""The meaning of MODEL where one is to be talked to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_pipeline.core.errors import UserError
from flows.compare.models import Model, find_models, of_artifact
from flows.compare.subjects import MODELS
from flows.engine.store import Store
from llm.chat.talk import Speaker


def find_speaker(text: str | None, store: Store) -> Speaker:
    """Load what a person names, or the newest model of a home.

    Raises:
        UserError: it names nothing, or several things, or no model.
    """
    if text and is_loaded_as_it_is(text):
        return Speaker.of(Path(text).name, Path(text), Path(text))
    return speaker_of(newest(store) if text is None else find_model(text, store))


def find_known(text: str, store: Store) -> Speaker:
    """Load what a person names, with its fingerprint; a folder's is that of the artifact that it is a copy of, or would
    be once adopted.

    Raises:
        UserError: as in `find_speaker`.
    """
    model = find_model(text, store)
    fingerprint = str(model.steps[model.sources["model"]].fingerprint)
    speaker = find_speaker(text, store) if is_loaded_as_it_is(text) else speaker_of(model)
    return replace(speaker, fingerprint=fingerprint)


def is_loaded_as_it_is(text: str) -> bool:
    """Whether a person names a folder that `transformers` loads."""
    return (Path(text) / "config.json").exists()


def find_model(text: str, store: Store) -> Model:
    """Find the one model that a person names.

    Raises:
        UserError: it names nothing, or several things, or no model.
    """
    found = find_models(text, store)
    if len(found) > 1:
        raise UserError(f"{text} has {len(found)} models: {', '.join(one.name for one in found)}; name one")
    return found[0]


def newest(store: Store) -> Model:
    """Return the newest sealed model of a home.

    Raises:
        UserError: there is none.
    """
    made = [
        one
        for stage in MODELS
        for one in store.artifacts(stage)
        if stage != "classify" and (one.path / "model.safetensors").exists()
    ]
    if not made:
        raise UserError(f"no model in {store.root}; make one with: llmill run RECIPE")
    last = max(made, key=lambda one: str(one.manifest["finished"]))
    return of_artifact(last, f"{last.stage} {last.fingerprint[:8]}", store)


def speaker_of(model: Model) -> Speaker:
    """Load a model that is sealed."""
    artifacts = [model.steps[model.sources[type_]].artifact for type_ in ("model", "tokenizer")]
    if artifacts[0] is None or artifacts[1] is None:
        raise UserError(f"{model.name} is not sealed here: adopt it first (llmill adopt model FOLDER)")
    return Speaker.of(model.name, artifacts[0].path, artifacts[1].path)
