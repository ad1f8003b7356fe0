"""The texts that a model was trained on, found by the manifests of what it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.overlap import Corpus
from data_pipeline.tokenize.stage import TokenizeConfig

Manifests = dict[tuple[str, str], tuple[Path, dict[str, Any]]]
"""Stage and fingerprint -> folder and manifest."""


def trained_on(model: Path, folders: Mapping[str, Path]) -> tuple[list[Corpus], bool]:
    """Find the corpora that a model, and the models that it was made from, were trained on.

    Args:
        folders: those of all that the model was made from, by any names.

    Returns:
        The corpora, and whether these are all.
    """
    manifests = read_manifests(folders)
    manifest = next((one for folder, one in manifests.values() if folder == model), None)
    corpora: list[Corpus] = []
    complete = True
    while manifest:
        inputs = {type_: made(manifests, one) for type_, one in manifest["inputs"].items()}
        tokens = inputs.get("tokens")
        documents = made(manifests, tokens[1]["inputs"].get("documents")) if tokens else None
        if tokens and documents and tokens[1]["stage"] == "tokenize":
            corpora.append(Corpus(documents[0], TokenizeConfig.model_validate(tokens[1]["config"])))
        else:
            complete = False
        # What trains on anything but tokens, or starts from a folder of weights, has seen what we don't know.
        complete &= inputs.keys() <= {"tokens", "tokenizer", "model"}
        complete &= "init_sha256" not in manifest["config"]
        before = inputs.get("model")
        manifest = before[1] if before else None
    return corpora, complete and bool(corpora)


def read_manifests(folders: Mapping[str, Path]) -> Manifests:
    """Read the manifests that there are in some folders."""
    found: Manifests = {}
    for folder in folders.values():
        path = folder / "manifest.json"
        if path.exists():
            manifest = json.loads(path.read_text(encoding="utf-8"))
            found[manifest["stage"], manifest["fingerprint"]] = folder, manifest
    return found


def made(manifests: Manifests, one: Mapping[str, str] | None) -> tuple[Path, dict[str, Any]] | None:
    """Look up an input of a manifest; None where it is not at hand."""
    return manifests.get((one.get("stage", ""), one["fingerprint"])) if one else None
