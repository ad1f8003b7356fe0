"""The files of a sealed artifact that its run in MLflow holds."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial
from pathlib import PurePosixPath

from mlflow import MlflowClient

from flows.engine.store import Artifact
from flows.engine.training import EVENTS
from flows.listeners.mlflow.models import log_checkpoints, register, register_reference

FILES = "llmill.files"
"""The tag that says why files are missing."""


class Refused(Exception):
    """MLflow will never take this operation; the message says why."""


ABOUT = ("manifest.json", "report.md")


def log_manifest(client: MlflowClient, run_id: str, artifact: Artifact) -> None:
    client.log_artifact(run_id, str(artifact.path / "manifest.json"))


def log_about(client: MlflowClient, run_id: str, artifact: Artifact) -> None:
    """Log the files on how an artifact was made and what became of it."""
    for name in ABOUT:
        if (artifact.path / name).exists():
            client.log_artifact(run_id, str(artifact.path / name))


def log_plots(client: MlflowClient, run_id: str, artifact: Artifact) -> None:
    from flows.listeners.plots import plots  # half a second, which runs that upload nothing need not wait for

    try:
        figures = plots(artifact)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise Refused(f"its plots can't be drawn: {type(error).__name__}: {error}") from error
    for name, figure in figures.items():
        client.log_figure(run_id, figure, name)


def log_payload(client: MlflowClient, run_id: str, artifact: Artifact, left_out: Container[str] = ()) -> None:
    """The sealed files, but for those that `log_about` logs and those to be ``left_out``."""
    for path in (PurePosixPath(entry["path"]) for entry in artifact.manifest["files"]):
        if str(path) in ABOUT or str(path) in left_out:
            continue
        try:
            client.log_artifact(run_id, str(artifact.path / path), str("payload" / path.parent))
        except FileNotFoundError:
            if artifact.path.exists() and not (artifact.path / path).exists():
                raise Refused(f"{path} was sealed in {artifact.path} and is not there") from None
            raise


def log_reference(client: MlflowClient, run_id: str, artifact: Artifact) -> None:
    """Where the payload is, instead of it."""
    reference = {"path": str(artifact.path), "files": artifact.manifest["files"]}
    client.log_dict(run_id, reference, "payload.json")


UPLOADS: dict[str, Callable[[MlflowClient, str, Artifact], None]] = {
    "manifest": log_manifest,
    "about": log_about,
    "plots": log_plots,
    "payload": log_payload,
    "payload-without-samples": partial(log_payload, left_out=(EVENTS,)),
    "reference": log_reference,
    "checkpoints": log_checkpoints,
    "version": register,
    "version-reference": register_reference,
}
