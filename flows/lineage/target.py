"""The meaning of MODEL, FINGERPRINT or DOCUMENT-ID."""

from __future__ import annotations

import re
from pathlib import Path

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import file_sha256
from flows.engine.store import read_manifest
from flows.lineage.documents import DocumentTrace, ids_alike
from flows.lineage.graph import Graph, Node

REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)[/@](?P<version>[^/]+)")


def find_target(graph: Graph, text: str) -> Node | DocumentTrace:
    """The artifact or the document that ``text`` names.

    Raises:
        UserError: it names nothing, or several things; the message says what it may have meant.
    """
    if not graph.nodes:
        raise UserError(f"nothing is sealed in {graph.store.home}: name another home with --home")
    if text.startswith("models:/"):
        return registered(graph, text)
    if Path(text).is_dir():
        return in_folder(graph, Path(text))
    if re.fullmatch(r"[0-9a-f]{4,16}", text) and (node := graph.named(text)):
        return node
    if trace := DocumentTrace(graph, text):
        return trace
    close = graph.alike(text) if re.fullmatch(r"[0-9a-fA-F]{4,}", text) else ids_alike(graph, text)
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    raise UserError(f"no artifact and no document in {graph.store.root} is called {text}{meant}")


def registered(graph: Graph, text: str) -> Node:
    """The export that a registered model version was made from: ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``."""
    from flows.listeners.mlflow.lineage import NotAsked, Records

    match = REGISTERED.fullmatch(text)
    if not match:
        raise UserError(f"{text}: a registered model is called models:/NAME/VERSION or models:/NAME@ALIAS")
    try:
        records = Records(graph.store.home)
        version = records.version(match["name"], match["version"])
        known = [one.uri for one in records.versions()] if not version else []
    except NotAsked as error:
        raise UserError(f"{text}: {error}") from None
    if version is None:
        raise UserError(f"MLflow has no {text}; it has {', '.join(known) or 'no registered model'}")
    if not version.fingerprint:
        raise UserError(f"{text} has no tag llmill.fingerprint: it was not registered by llmill")
    node = graph.named(version.fingerprint)
    if node is None:
        raise UserError(
            f"{text} is export {version.fingerprint}, which is not in {graph.store.root}: removed, or made elsewhere"
        )
    return node


def in_folder(graph: Graph, folder: Path) -> Node:
    """The artifact that lies in a folder, or of which the folder is a copy: it has the manifest, or the weights."""
    manifest, weights = folder / "manifest.json", folder / "model.safetensors"
    if manifest.is_file():
        made = read_manifest(manifest)
        if node := graph.nodes.get((made["stage"], made["fingerprint"])):
            return node
    if weights.is_file():
        sha256 = file_sha256(weights)
        for node in graph.nodes.values():
            files = node.artifact.manifest["files"] if node.artifact else []
            if {"model.safetensors": sha256}.items() <= {one["path"]: one["sha256"] for one in files}.items():
                return node
    raise UserError(f"{folder} holds no artifact of {graph.store.root}, nor a copy of one")
