"""What commands and variables there are, as llmill, Prefect and MLflow themselves say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlflow.cli
import mlflow.environment_variables
import prefect.cli._app
import typer.main
from distributed.cli import dask_scheduler, dask_worker
from prefect.settings import Settings
from prefect.settings.legacy import _get_valid_setting_names

from flows.cli.main import make_app
from flows.prefect.server import make_parser

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
OTHERS = {
    "AWS_ACCESS_KEY_ID": "boto3",
    "AWS_DEFAULT_REGION": "boto3",
    "AWS_SECRET_ACCESS_KEY": "boto3",
    "DO_NOT_TRACK": "Prefect's telemetry and others'",
    "NVIDIA_DRIVER_CAPABILITIES": "NVIDIA's container toolkit",
    "NVIDIA_VISIBLE_DEVICES": "NVIDIA's container toolkit",
    "PATH": "everybody",
    "PGDATA": "the image of PostgreSQL",
    "PGPASSWORD": "libpq and asyncpg",
    "PIP_CONSTRAINT": "pip",
    "PIP_DISABLE_PIP_VERSION_CHECK": "pip",
    "PIP_NO_CACHE_DIR": "pip",
    "POSTGRES_PASSWORD": "the image of PostgreSQL",
    "POSTGRES_PASSWORD_FILE": "the image of PostgreSQL",
    "POSTGRES_USER": "the image of PostgreSQL",
    "PYTHONDONTWRITEBYTECODE": "Python",
    "PYTHONUNBUFFERED": "Python",
    "REQUESTS_CA_BUNDLE": "requests, which MLflow's client uses",
    "SSL_CERT_FILE": "OpenSSL, and so Python's ssl; Prefect's client",
}
"""Who reads a variable that is none of llmill's, Prefect's and MLflow's."""


@cache
def variables() -> frozenset[str]:
    """All variables that something reads."""
    ours: set[str] = set()
    for room in ("data_pipeline", "llm", "flows"):
        for path in (ROOT / room).rglob("*.py"):
            ours |= set(re.findall(r"LLMILL_[A-Z_]+", path.read_text(encoding="utf-8")))
    mlflows = {name for name in dir(mlflow.environment_variables) if name.startswith("MLFLOW_")}
    of_server = {option.envvar for option in mlflow.cli.server.params if isinstance(option.envvar, str)}
    return frozenset({*ours, *_get_valid_setting_names(Settings), *mlflows, *of_server, *OTHERS})


def unknown(names: Sequence[str]) -> list[str]:
    """Which of these variables nobody reads."""
    return sorted(set(names) - variables())


def parse(command: Sequence[str]) -> str:
    """Have the program that a command line names take its words apart, without running anything; its name.

    Raises:
        Exception: it has no such command or option, or lacks one that it needs.
    """
    program, *words = command
    if program == "llmill":
        walk(typer.main.get_command(make_app()), words)
    elif program == "mlflow":
        walk(mlflow.cli.cli, words)
    elif program == "prefect":
        prefect.cli._app._app.parse_args(words, exit_on_error=False, print_error=False)
    elif program == "python":
        assert words[:2] == ["-m", "flows.prefect.server"], words
        make_parser().parse_args(words[2:])
    elif program == "dask":
        walk({"scheduler": dask_scheduler.main, "worker": dask_worker.main}[words[0]], words[1:])
    else:
        raise LookupError(f"{program} is no program that is known here")
    return program


def walk(command: Any, words: Sequence[str]) -> None:
    """`parse` for a command of click's."""
    words = list(words)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)
