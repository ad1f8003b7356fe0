"""A real MLflow server that tests can kill, stop and start again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run
from operator_api import until

from flows.engine.ports import free_port, healthy


class Told:
    """What the MLflow at an address has been told."""

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.url)

    def runs(self) -> list[Run]:
        experiment = self.client.get_experiment_by_name("small")
        return self.client.search_runs([experiment.experiment_id]) if experiment else []


class Server(Told):
    """An MLflow server that can be killed and started again on the same database."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options, self.port = folder, options, free_port()
        super().__init__(f"http://127.0.0.1:{self.port}")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        place = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        place += ["--artifacts-destination", str(self.folder / "artifacts"), "--workers", "1", *self.options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), *place],
            env={**kept, **quiet},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(lambda: healthy(f"{self.url}/health"), bool, 120)

    def kill(self) -> None:
        if self.process:
            for process in family(self.process.pid):
                process.kill()
            self.process.wait()
            self.process = None

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """It accepts connections, and answers none, until the block ends."""
        assert self.process
        with stopped(self.process.pid):
            yield


def family(pid: int) -> list[psutil.Process]:
    return [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process and all that it started stand still until the block ends."""
    still = family(pid)
    for process in still:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in still:
            process.send_signal(signal.SIGCONT)
