"""MLflow as a listener of a run: a sender that reads the run log, and a monitor of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flows.engine.events import (
    Event,
    Linked,
    Measured,
    RunEnded,
    RunStarted,
    StepFailed,
    StepSealed,
    StepStarted,
)
from flows.engine.log import LogFile, RunLog
from flows.listeners.mlflow.delivery import Sender
from flows.listeners.mlflow.links import run_url, table_url, target, tracking_uri, without_user
from flows.listeners.mlflow.operations import Mlflow
from flows.listeners.mlflow.points import Point
from flows.listeners.mlflow.system import SystemMonitor

CLOSE_SECONDS = 10.0  # without any sign of MLflow, at the end of a run
STOP_SECONDS = 3.0  # the same for a run that somebody stops and waits for


def begin_log(home: Path, experiment: str) -> RunLog:
    """A run log that is meant for the MLflow of this home or of the environment."""
    return RunLog(LogFile.begin(home, experiment, target(home), lasts=True))


class MlflowListener:
    """Has MLflow know of a run. A server that is slow, hangs or is away holds nothing up, and misses nothing."""

    def __init__(self, home: Path, experiment: str, log: RunLog) -> None:
        self._uri, self._experiment, self._log = tracking_uri(home), experiment, log
        self._sender = Sender(home, log.file, Mlflow(home, self._uri), log.warn)
        self._sender.sent = self._link
        self._begun = False
        self._run = RunStarted(key="", name="", recipe="")
        self.table = ""
        """The address of all runs of the recipe; empty where no server shows them, or it is not known yet."""
        self._monitor: SystemMonitor | None = None
        self._patience = CLOSE_SECONDS

    def start(self) -> None:
        """Begin to connect, before there is anything to report: a new database takes seconds to make."""
        if not self._begun:
            self._begun = True
            self._sender.start()

    @property
    def place(self) -> str:
        """Where MLflow is, for people."""
        return without_user(self._uri)

    @property
    def failure(self) -> str:
        """Why not all has been delivered; empty when it has. Ask when the run's log is closed."""
        return "" if self._sender.done else self._sender.failure or "it is slow"

    def id_of(self, key: str) -> str:
        """A run's id in MLflow; empty where MLflow does not answer soon."""
        return self._sender.id_of(key)

    def handle(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.start()
        match event:
            case RunStarted(key=key, new=new) if new and not event.joined:
                self._run = event
                self._sender.mlflow.fresh.add(key)
            case RunStarted():
                self._run = event
            case StepStarted(late=False, key=key, new=new, begun=begun):
                if new:
                    self._sender.mlflow.fresh.add(key)
                self._watch(key, begun)
            case StepSealed() | StepFailed():
                self._stop_monitor()
            case RunEnded(status="KILLED"):
                self._patience = STOP_SECONDS
        if event.kept:
            self._sender.wake()

    def close(self) -> None:
        """Wait a while for the delivery of what is left."""
        self._stop_monitor()
        if self._begun:
            self._sender.close(self._patience)
        else:  # the run did not begin
            self._log.file.remove()

    def _watch(self, key: str, begun: int) -> None:
        """Measure the machine from now on, if it can be."""

        def report(points: Sequence[Point]) -> None:
            run = self._run
            self._log.append(Measured(key=key, points=list(points), run=run.key, begun=run.time))

        try:
            self._monitor = SystemMonitor(begun, report)
        except Exception as error:
            self._log.warn(f"the machine is not measured: {type(error).__name__}: {error}")

    def _stop_monitor(self) -> None:
        if self._monitor:
            self._monitor.stop()
        self._monitor = None

    def _link(self) -> None:
        """Log where the run's page is, once that is known; a run that we joined has another's."""
        mlflow = self._sender.mlflow
        place, run_id = mlflow.experiments.get(self._experiment, ""), mlflow.ids.get(self._run.key, "")
        url = run_url(self._uri, place, run_id)
        if url and not self.table:
            self.table = table_url(self._uri, place)
            self._log.append(Linked(url=url, table=self.table))
