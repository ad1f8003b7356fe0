"""The contents of a manifest beyond the payload: from what, how, where and with which code an artifact was made."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from data_pipeline.core.processes import cores
from flows.engine.plan import Step
from flows.engine.store import Artifact
from flows.recipe import Recipe

LIBRARIES = (
    "llmill",
    "torch",
    "deepspeed",
    "pyarrow",
    "tokenizers",
    "gigatoken",
    "datasets",
    "resiliparse",
    "prefect",
    "mlflow",
)


def describe_making(step: Step, recipe: Recipe, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """All of a stage's manifest that is known before its body runs."""
    assert step.config
    return {
        "version": step.stage.version,
        "config": step.config.identity(),
        "runtime": step.config.runtime.model_dump(mode="json"),
        "step": step.name,
        "inputs": {
            type_: {
                "stage": artifact.stage,
                "fingerprint": artifact.fingerprint,
                "payload_sha256": artifact.payload_sha256,
            }
            for type_, artifact in inputs.items()
        },
        "recipe": recipe.name,
        "recipe_runtime": recipe.runtime.model_dump(mode="json"),
        "code": code_version(),
        "host": describe_host(),
        "libraries": library_versions(),
    }


@cache  # it stands in every manifest of a run, and what is loaded does not change
def code_version() -> dict[str, str | None]:
    """Which code this process runs."""
    return {"version": version("llmill"), "commit": git_commit()}


@cache
def library_versions() -> dict[str, str]:
    """Which versions of the libraries that matter are installed."""
    return {name: version(name) for name in LIBRARIES}


def git_commit() -> str | None:
    """The commit of the checkout this code runs from, with ``-dirty`` where it was changed; None outside of one."""
    root = Path(__file__).parent.parent
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe_host() -> dict[str, Any]:
    """Where an artifact was made."""
    return {
        "name": socket.gethostname(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "pid": os.getpid(),
    }
