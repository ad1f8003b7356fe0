"""Runs in MLflow that are no run of a recipe: comparisons, sweeps and decisions, each with its evidence as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

from flows.engine.events import Told, milliseconds
from flows.engine.log import LogFile
from flows.listeners.mlflow.delivery import deliver
from flows.listeners.mlflow.description import NOTE, clipped
from flows.listeners.mlflow.links import run_url, target, tracking_uri, without_user
from flows.listeners.mlflow.operations import Away, Gone, Mlflow
from flows.listeners.mlflow.translate import Operation, beginning

KIND = "llmill.kind"


class Finding:
    """One such run. What it reports is kept in a run log first, so that MLflow learns of it later where it is away."""

    def __init__(self, home: Path, experiment: str, kind: str, name: str, key: str = "") -> None:
        self.home, self.experiment, self.key = home, experiment, key or uuid4().hex
        self._begin = [{"op": "begin", **beginning(self.key, name)}, self._tags({KIND: kind})]
        self._mlflow = Mlflow(home, tracking_uri(home))
        self._held: LogFile | None = None

    def hold(self) -> None:
        """Log that this process is at work on the run: when it is killed, whoever sends what is left ends the run."""
        self._held = LogFile.begin(self.home, self.experiment, target(self.home), lasts=True)
        self._held.append(*map(as_event, self._begin))

    def report(
        self,
        tags: Mapping[str, str],
        files: Mapping[str, str] | None = None,
        note: str = "",
        status: str = "",
        more: Sequence[Operation] = (),
    ) -> str:
        """Begin the run or resume it; give it tags, files and text for its page; end it where there is a status.

        ``more`` is reported as well, before the end.

        Returns:
            Why MLflow does not have it yet; empty where it has.
        """
        if status and self._held:
            self._held.remove()
        run = {"run": self.key}
        texts = [{"op": "text", **run, "name": name, "text": text} for name, text in (files or {}).items()]
        end = [{"op": "end", **run, "status": status, "time": milliseconds()}] if status else []
        return self._deliver(
            [*self._begin, self._tags({**tags, **({NOTE: note} if note else {})}), *texts, *more, *end]
        )

    @property
    def link(self) -> str:
        """Where its page is; its id where no server shows it; empty where MLflow does not know of it."""
        run_id = self._mlflow.ids.get(self.key, "")
        return run_url(self._mlflow.uri, self._mlflow.experiments.get(self.experiment, ""), run_id) or run_id

    def _tags(self, tags: Mapping[str, str]) -> Operation:
        return {"op": "tags", "run": self.key, "tags": {name: clipped(text) for name, text in tags.items()}}

    def _deliver(self, operations: list[Operation]) -> str:
        log = LogFile.begin(self.home, self.experiment, target(self.home))
        try:
            log.append(*map(as_event, operations))
            refused = [why for _, why in deliver(log, self._mlflow) if why]
        except Away as error:
            log.release()
            place = without_user(self._mlflow.uri)
            return str(error) if isinstance(error, Gone) else f"MLflow at {place} does not answer: {error}"
        log.remove()
        return f"MLflow does not have it: {refused[0]}" if refused else ""


def as_event(operation: Operation) -> Told:
    return Told(operation=dict(operation))
