"""MLflow: the only import of it.

The recipe is the experiment; a pipeline run is a parent run, each stage that runs a child run. Params are the
identity parts of the configs, dataset inputs carry our fingerprints as digests, and what a killed run had begun
is continued, not begun again. A tracking server that fails never stops a run: what it missed is sent when it is back.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from filelock import FileLock, Timeout

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
logging.getLogger("alembic").setLevel(logging.WARNING)

from mlflow import MlflowClient  # noqa: E402  (after the settings that it reads when imported)
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

from flows.plots import plots  # noqa: E402
from flows.recipe import flatten  # noqa: E402
from flows.store import Artifact, canonical_json, write_durably  # noqa: E402

logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # its failures are told by `send`

BATCH = 1000  # metrics a request: the most that MLflow takes
PARAM_LENGTH = 6000  # the longest value that MLflow takes
RETRY_SECONDS = 30.0
ERROR = "llmill.error"
EVENTS = "logs/events.jsonl"

Arguments = ParamSpec("Arguments")
Method = Callable[Concatenate["Tracker", Arguments], None]


def tracking_uri(home: Path) -> str:
    """``MLFLOW_TRACKING_URI``, or a SQLite file under ``home``."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.resolve()}/mlflow.db"


def deferred(method: Method[Arguments]) -> Method[Arguments]:
    """Put the call into the outbox and send what is there, in order; what fails stays for the next try."""

    @functools.wraps(method)
    def queue(self: Tracker, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        self.outbox.append(functools.partial(method, self, *args, **kwargs))
        self.send()

    return queue


class Tracker:
    """Writes one pipeline run into MLflow: the parent, and one child for each stage that runs.

    What can't be delivered waits in an outbox, and training's events in their file, until MLflow answers again.
    """

    def __init__(self, home: Path, experiment: str, warn: Callable[[str], None]) -> None:
        self.home, self.experiment = home, experiment
        self.uri = tracking_uri(home)
        self.outbox: deque[Callable[[], None]] = deque()
        self.failure = ""
        """Why the oldest call in the outbox could not be delivered; empty when all is well."""
        self.parent_id = self.parent_name = self.stage_id = ""
        self._warn = warn
        self._retry_at = 0.0
        self._experiment_id = ""
        self._state = Path()
        self._offset = 0
        self._record: Path | None = None
        self._lock: FileLock | None = None
        self._client: MlflowClient

    def send(self, at_once: bool = False) -> None:
        """Deliver the outbox in order. After a failure, try again when `RETRY_SECONDS` have passed."""
        if self.failure and not at_once and time.monotonic() < self._retry_at:
            return
        try:
            while self.outbox:
                self.outbox[0]()
                self.outbox.popleft()
        except Exception as error:  # MLflow lets errors of its database and its network through as they are
            if not self.failure:
                self._warn(f"MLflow at {self.uri} does not answer; the run goes on, its figures will follow")
            self.failure = (str(error).splitlines() or [type(error).__name__])[0][:200]
            self._retry_at = time.monotonic() + RETRY_SECONDS
        else:
            self.failure = ""

    @deferred
    def open(self) -> None:
        """Connect and find or make the experiment. Done early: a new database takes seconds to make."""
        self.home.mkdir(parents=True, exist_ok=True)
        local = not os.environ.get("MLFLOW_TRACKING_URI")
        with FileLock(self.home / ".mlflow.lock"):  # two runs at once would both create the tables
            self._client = MlflowClient(self.uri)
            found = self._client.get_experiment_by_name(self.experiment)
            place = (self.home / "mlartifacts").resolve().as_uri() if local else None
            self._experiment_id = (
                found.experiment_id if found else self._client.create_experiment(self.experiment, place)
            )

    @deferred
    def start(self, key: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Begin the parent run, or go on with the one that an unfinished run of the same plan left.

        ``key`` names the plan: recipe and last fingerprint.
        """
        self._record = self._claim(key)
        self.parent_id = self._known_run(self._record) if self._record else ""
        if not self.parent_id:
            self.parent_id = self._create_run(f"{self.experiment} {datetime.now():%Y-%m-%d %H:%M:%S}")
        self.parent_name = self._client.get_run(self.parent_id).info.run_name
        if self._record:
            write_durably(self._record, json.dumps({"run_id": self.parent_id}))
        self._client.update_run(self.parent_id, status="RUNNING")
        self._describe(self.parent_id, params, tags)

    @deferred
    def start_stage(
        self,
        stage: str,
        fingerprint: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        inputs: Sequence[Artifact],
    ) -> None:
        """Begin the stage's child run, or go on with the one that an unfinished run of this artifact left."""
        self._state = self._state_of(stage, fingerprint)
        self.stage_id = self._known_run(self._state)
        self._offset = json.loads(self._state.read_text())["offset"] if self.stage_id else 0
        if not self.stage_id:
            self.stage_id = self._create_run(stage)
            self._save_state()
        self._client.set_tag(self.stage_id, "mlflow.parentRunId", self.parent_id)
        self._client.update_run(self.stage_id, status="RUNNING")
        self._describe(self.stage_id, params, tags)
        self._client.log_inputs(self.stage_id, datasets=[dataset_input(artifact) for artifact in inputs])

    def follow(self, events: Path) -> None:
        """Send what training has appended to ``events`` since the last call; remember how far, on disk.

        A kill between sending and remembering sends points again with the same time and step, which MLflow's
        store keeps once.
        """
        if not self.outbox:  # else it is behind already, and the next call reads on from the same place
            self.outbox.append(functools.partial(self._follow, events))
        self.send()

    @deferred
    def finish_stage(self, artifact: Artifact, upload_bytes: float) -> None:
        """Log a sealed stage's metrics and files, and end its run."""
        self._follow(artifact.path / EVENTS)
        self._log_metrics(self.stage_id, {**artifact.metrics, "seconds": artifact.manifest["seconds"]})
        self._client.set_tag(self.stage_id, "llmill.payload_sha256", artifact.payload_sha256)
        if self._has_tag(self.stage_id, ERROR):
            self._client.delete_tag(self.stage_id, ERROR)
        for name in ("manifest.json", "report.md"):
            if (artifact.path / name).exists():
                self._client.log_artifact(self.stage_id, str(artifact.path / name))
        for name, figure in plots(artifact).items():
            self._client.log_figure(self.stage_id, figure, name)
        if artifact.size <= upload_bytes:
            self._client.log_artifacts(self.stage_id, str(artifact.path), "payload")
        else:
            reference = {"path": str(artifact.path), "files": artifact.manifest["files"]}
            self._client.log_dict(self.stage_id, reference, "payload.json")
        self._client.set_terminated(self.stage_id, "FINISHED")
        self._state.unlink(missing_ok=True)
        self.stage_id = ""

    def unfinished(self, artifact: Artifact) -> bool:
        """Whether a killed run sealed this artifact but did not live to tell MLflow."""
        return self._state_of(artifact.stage, artifact.fingerprint).exists()

    @deferred
    def fail_stage(self, message: str) -> None:
        """Mark the stage's run failed; it is continued when the stage is resumed."""
        self._client.set_tag(self.stage_id, ERROR, message[:PARAM_LENGTH])
        self._client.set_terminated(self.stage_id, "FAILED")
        self.stage_id = ""

    @deferred
    def add_to_parent(self, artifact: Artifact, how: str, headline: Iterable[str]) -> None:
        """Link a stage to the parent run and copy its headline metrics there, whether it ran or was reused."""
        stage = artifact.stage
        tags = {"how": how, "fingerprint": artifact.fingerprint, "run_id": artifact.manifest["mlflow_run_id"]}
        for name, value in tags.items():
            self._client.set_tag(self.parent_id, f"llmill.{stage}.{name}", value)
        figures = {name: artifact.metrics[name] for name in headline if name in artifact.metrics}
        self._log_metrics(self.parent_id, {f"{stage}/{name}": value for name, value in figures.items()})

    @deferred
    def attach(self, name: str, text: str) -> None:
        """Log a text file on the parent run."""
        self._client.log_text(self.parent_id, text, name)

    @deferred
    def finish(self, status: str, seconds: float) -> None:
        """End the parent run: FINISHED, FAILED or KILLED. One that is not finished is continued by the next run."""
        if status == "FINISHED":
            self._log_metrics(self.parent_id, {"seconds": seconds})
        self._client.set_terminated(self.parent_id, status)
        if self._record and status == "FINISHED":
            self._record.unlink(missing_ok=True)

    def close(self) -> None:
        """Make a last try to deliver what waits, and let other runs of the same plan have the parent."""
        self.send(at_once=True)
        if self._lock:
            self._lock.release()

    def _claim(self, key: str) -> Path | None:
        """The file that names the parent run of a plan, for us alone; None while another run of the plan is at work."""
        lock = FileLock(self._runs / f".{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        self._lock = lock
        return self._runs / f"{key}.json"

    def _follow(self, events: Path) -> None:
        lines, offset = read_lines(events, self._offset)
        if not lines:
            return
        metrics = [metric for line in lines for metric in event_metrics(json.loads(line))]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(self.stage_id, metrics=metrics[start : start + BATCH])
        self._offset = offset
        self._save_state()

    @property
    def _runs(self) -> Path:
        folder = self.home / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _state_of(self, stage: str, fingerprint: str) -> Path:
        """Where the tracking of a stage that is not told to its end stands."""
        return self._runs / f"{stage}-{fingerprint}.json"

    def _save_state(self) -> None:
        write_durably(self._state, json.dumps({"run_id": self.stage_id, "offset": self._offset}))

    def _create_run(self, name: str) -> str:
        tags = {"mlflow.source.name": "llmill", "mlflow.source.type": "LOCAL", "mlflow.user": user()}
        return self._client.create_run(self._experiment_id, run_name=name, tags=tags).info.run_id

    def _known_run(self, record: Path) -> str:
        """The run noted in ``record``, if this tracking server has it (and nobody deleted it); else an empty string."""
        try:
            info = self._client.get_run(json.loads(record.read_text())["run_id"]).info
        except FileNotFoundError:
            return ""
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return ""
            raise
        return info.run_id if info.lifecycle_stage == "active" else ""

    def _has_tag(self, run_id: str, tag: str) -> bool:
        return tag in self._client.get_run(run_id).data.tags

    def _describe(self, run_id: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        entries = [Param(key, text_of(value)) for key, value in flatten(params).items()]
        for start in range(0, len(entries), 100):
            self._client.log_batch(run_id, params=entries[start : start + 100])
        self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def _log_metrics(self, run_id: str, values: Mapping[str, float]) -> None:
        stamp = int(datetime.now().timestamp() * 1000)
        self._client.log_batch(
            run_id, metrics=[Metric(key, value, stamp, 0) for key, value in values.items()]
        )


def dataset_input(artifact: Artifact) -> DatasetInput:
    """An upstream artifact as MLflow sees a dataset: its digest is our fingerprint."""
    dataset = Dataset(
        name=artifact.stage,
        digest=artifact.fingerprint,
        source_type="local",
        source=canonical_json({"uri": artifact.path.resolve().as_uri()}),
        profile=canonical_json(artifact.metrics),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "input")])


def event_metrics(event: Mapping[str, Any]) -> list[Metric]:
    """A training event's figures, under ``train/`` or ``val/``, at its step and its own time."""
    prefix = {"step": "train", "validation": "val", "checkpoint": "checkpoint"}.get(event["event"])
    if prefix is None:
        return []
    stamp = int(event["time"] * 1000)
    return [
        Metric(f"{prefix}/{key}", float(value), stamp, event["step"])
        for key, value in event.items()
        if key not in ("event", "step", "time") and isinstance(value, int | float)
    ]


def read_lines(path: Path, offset: int) -> tuple[list[str], int]:
    """The whole lines of a growing file from byte ``offset`` on, and the offset after them."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    whole = data[: data.rfind(b"\n") + 1]
    return whole.decode().splitlines(), offset + len(whole)


def text_of(value: Any) -> str:
    """A param's value as MLflow takes it."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 1] + "…"


def user() -> str:
    """The login name, where the system knows one."""
    return os.environ.get("USER") or os.environ.get("LOGNAME") or f"uid {os.getuid()}"
