"""A run as MLflow sees it.

The recipe is the experiment; a pipeline run is a parent run, each stage that runs a child run. Params are the
identity parts of the configs, dataset inputs carry our fingerprints as digests, and what a killed run had begun
is continued, not begun again. All of it goes into a journal on disk, and from there to MLflow when that answers; so a
tracking server that is slow, hangs or is away never holds a run up, and misses nothing.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any, Concatenate, ParamSpec
from uuid import uuid4

from filelock import FileLock, Timeout

from data_pipeline.core.files import write_durably
from flows.engine.store import Artifact, canonical_json, shared_lock
from flows.listeners.mlflow.delivery import Sender
from flows.listeners.mlflow.events import EVENTS, Point, event_points, read_lines
from flows.listeners.mlflow.journal import Journal, outbox
from flows.listeners.mlflow.lineage import ARTIFACT, PARENT
from flows.listeners.mlflow.links import run_url, table_url, target, tracking_uri, without_user
from flows.listeners.mlflow.operations import Mlflow
from flows.listeners.mlflow.system import SystemMonitor
from flows.recipe import flatten

VALUE_LENGTH = 6000  # the longest value of a param that MLflow takes
CLOSE_SECONDS = 10.0  # without any sign of MLflow, at the end of a run
STOP_SECONDS = 3.0  # the same for a run that somebody stops and waits for
NOTE_LENGTH = 7900  # and of a tag
ERROR = "llmill.error"
NOTE = "mlflow.note.content"

Arguments = ParamSpec("Arguments")
Method = Callable[Concatenate["Tracker", Arguments], None]


def harmless(method: Method[Arguments]) -> Method[Arguments]:
    """Let no failure of tracking end a run, such as a full disk; it is warned of once."""

    @functools.wraps(method)
    def call(self: Tracker, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.lose(error)

    return call


class Tracker:
    """Writes what one pipeline run tells MLflow: of the parent, and of one child for each stage that runs."""

    def __init__(self, home: Path, experiment: str, warn: Callable[[str], None]) -> None:
        self.home, self.experiment = home, experiment
        self.parent_key = self.parent_name = self.stage_key = ""
        self._warn = warn
        self._uri = tracking_uri(home)
        self._lost = False
        self._state = Path()
        self._offset = 0
        self._record: Path | None = None
        self._lock: FileLock | None = None
        self._joined = self._of_sweep = False
        self._begun = 0
        self._resumed = False
        self._monitor: SystemMonitor | None = None
        self._telling = Lock()
        self._journal: Journal | None = None
        self._sender: Sender | None = None

    @property
    def place(self) -> str:
        """Where MLflow is, for people."""
        return without_user(self._uri)

    @property
    def failure(self) -> str:
        """Why not all has been delivered; empty when it has. Ask after `close`."""
        if self._sender is None or self._sender.done:
            return ""
        return self._sender.failure or "it is slow"

    def lose(self, error: Exception) -> None:
        """Say that something is not even kept for MLflow."""
        if not self._lost:
            said = f"{type(error).__name__}: {error}"
            self._warn(f"what MLflow should know of this run can't be kept in {outbox(self.home)}: {said}")
        self._lost = True

    @harmless
    def open(self) -> None:
        """Begin the journal, and to connect: a new database takes seconds to make."""
        self._journal = Journal.begin(outbox(self.home), self.experiment, target(self.home), lasts=True)
        self._sender = Sender(self.home, self._journal, Mlflow(self.home, self._uri), self._warn)
        self._sender.start()

    @property
    def page_url(self) -> str:
        """Where browsers find the parent run; empty while that is not known."""
        if self._sender is None or not self.parent_key or not run_url(self._uri, "ours", "ours"):
            return ""  # where no server shows it, nothing is worth a wait
        run_id = self._sender.id_of(self.parent_key)
        return run_url(self._uri, self._sender.mlflow.experiments.get(self.experiment, ""), run_id)

    @property
    def table_url(self) -> str:
        """Where browsers find the table of the recipe's runs; empty while that is not known."""
        experiments = self._sender.mlflow.experiments if self._sender else {}
        return table_url(self._uri, experiments.get(self.experiment, ""))

    @property
    def stage_id(self) -> str:
        """The stage's run in MLflow; empty where MLflow does not say soon. `stage_key` leads there too."""
        return self._sender.id_of(self.stage_key) if self._sender else ""

    @harmless
    def start(self, key: str, params: Mapping[str, Any], tags: Mapping[str, str], parent: str = "") -> None:
        """Begin the parent run, or go on with the one that an unfinished run of the same plan left.

        ``key`` names the plan: recipe and last fingerprint. ``parent`` is the key of a run that is at work elsewhere,
        which a stage dispatched by it joins.
        """
        name = f"{self.experiment} {datetime.now():%Y-%m-%d %H:%M:%S}"
        if parent:
            self.parent_key, self._joined = parent, True
            self._tell({"op": "join", **beginning(parent, name)})
            return
        self._record = self._claim(key)
        record = read_record(self._record) if self._record else {}
        self.parent_key = record.get("key") or self._new_key()
        self.parent_name = record.get("name") or name
        if self._record:
            write_durably(
                self._record, json.dumps({"key": self.parent_key, "name": self.parent_name}, allow_nan=False)
            )
        begin = {"op": "begin", **beginning(self.parent_key, self.parent_name)}
        self._tell(begin, *description(self.parent_key, params, tags))

    @harmless
    def start_stage(
        self,
        name: tuple[str, str, str],
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        inputs: Sequence[Artifact],
    ) -> None:
        """Begin the child run of a step (its name, its stage, its fingerprint), or go on with the one that an
        unfinished run of this artifact left."""
        step, stage, fingerprint = name
        self._state = self._state_of(stage, fingerprint)
        record = read_record(self._state)
        self._resumed = bool(record)
        self.stage_key, self._offset = record.get("key") or self._new_key(), record.get("offset", 0)
        self._begun = record.get("begun") or now()
        self._save_state()
        begin = {"op": "begin", **beginning(self.stage_key, step), "parent": self.parent_key}
        if self._offset:
            begin["seen"] = {"stage": stage, "fingerprint": fingerprint, "offset": self._offset}
        datasets = {"op": "inputs", "run": self.stage_key, "datasets": [dataset(one) for one in inputs]}
        self._tell(begin, *description(self.stage_key, params, tags), *([datasets] if inputs else []))
        key = self.stage_key
        self._monitor = SystemMonitor(self._begun, lambda points: self._measure(key, points))

    @harmless
    def _measure(self, key: str, points: Sequence[Point]) -> None:
        self._tell(measured(key, points))

    def stop_monitor(self) -> None:
        """Let the stage's machine be watched no longer."""
        if self._monitor:
            self._monitor.stop()
        self._monitor = None

    @harmless
    def follow(self, events: Path) -> None:
        """Take over what training has appended to ``events`` since the last call; remember how far, on disk.

        A kill between the two takes points over again with the same time and step, which MLflow's store keeps once.
        """
        lines, offset = read_lines(events, self._offset)
        if not lines:
            return
        points = [point for line in lines for point in event_points(json.loads(line))]
        if points:
            self._tell(measured(self.stage_key, points))
        self._offset = offset
        self._save_state()

    @harmless
    def finish_stage(self, artifact: Artifact, upload_bytes: float, withheld: bool = False) -> None:
        """Log a sealed stage's metrics and files, and end its run; of files ``withheld``, only checksums."""
        self.stop_monitor()
        self.follow(artifact.path / EVENTS)
        run = {"run": self.stage_key}
        figures = {**artifact.metrics, "seconds": artifact.manifest["seconds"]}
        name = {"stage": artifact.stage, "fingerprint": artifact.fingerprint}
        name["payload_sha256"] = artifact.payload_sha256
        files = ("manifest", "reference") if withheld else ("about", *payload_uploads(artifact, upload_bytes))
        note = {} if withheld else report_note(artifact)
        self._tell(
            measured(self.stage_key, points_of(figures, sealed_at(artifact))),
            {
                "op": "tags",
                **run,
                "tags": {"llmill.payload_sha256": artifact.payload_sha256, **note},
            },
            *([{"op": "untag", **run, "tag": ERROR}] if self._resumed else []),
            *({"op": "artifact", **run, **name, "what": what} for what in ("plots", *files)),
            *(self._candidate(artifact) if artifact.stage == "export" else []),
            {"op": "end", **run, "status": "FINISHED", "time": now()},
        )
        self._state.unlink(missing_ok=True)
        self.stage_key = ""

    def _candidate(self, artifact: Artifact) -> list[dict[str, Any]]:
        """What makes an export the candidate; of a sweep's, the best one is, when all are there."""
        return (
            []
            if self._of_sweep
            else [candidate(artifact.manifest["recipe"], artifact.fingerprint, newest=True)]
        )

    def unfinished(self, artifact: Artifact) -> bool:
        """Whether a killed run sealed this artifact but did not live to put that into its journal."""
        return self._state_of(artifact.stage, artifact.fingerprint).exists()

    @harmless
    def fail_stage(self, message: str, status: str = "FAILED") -> None:
        """Mark the stage's run failed, or killed; it is continued when the stage is resumed."""
        if not self.stage_key:
            return  # it had not begun
        self.stop_monitor()
        run = {"run": self.stage_key}
        self._tell(
            {"op": "tags", **run, "tags": {ERROR: message[:VALUE_LENGTH]}},
            {"op": "end", **run, "status": status, "time": now()},
        )
        self.stage_key = ""

    @harmless
    def add_to_parent(self, step: str, artifact: Artifact, how: str, headline: Iterable[str]) -> None:
        """Link a step to the parent run and copy its headline metrics there, whether it ran or was reused."""
        if self._joined:
            return  # who dispatched us does that
        manifest, run = artifact.manifest, {"run": self.parent_key}
        tags = {f"llmill.{step}.how": how, f"llmill.{step}.fingerprint": artifact.fingerprint}
        if step != artifact.stage:
            tags |= {f"llmill.{step}.stage": artifact.stage, f"{ARTIFACT}{artifact.fingerprint}": step}
            tags |= {"llmill.evaluated": "yes"} if artifact.stage == "evaluate" else {}
        run_tag, known = f"llmill.{step}.run_id", manifest["mlflow_run_id"]
        link = {"op": "link", **run, "tag": run_tag, "to": manifest.get("mlflow_key", ""), "id": ""}
        figures = {f"{step}/{name}": artifact.metrics[name] for name in headline if name in artifact.metrics}
        self._tell(
            *([] if known else [link]),
            {"op": "tags", **run, "tags": {**tags, **({run_tag: known} if known else {})}},
            measured(self.parent_key, points_of(figures, sealed_at(artifact))),
        )

    @harmless
    def note(self, text: str) -> None:
        """Show Markdown on the page of the parent run."""
        if not self._joined:
            self._tell({"op": "tags", "run": self.parent_key, "tags": {NOTE: clipped(text)}})

    @harmless
    def belong_to(self, key: str) -> None:
        """Make the parent run itself a child: of the run of a sweep."""
        self._of_sweep = True
        self._tell({"op": "link", "run": self.parent_key, "tag": PARENT, "to": key, "id": ""})

    @harmless
    def attach(self, name: str, text: str) -> None:
        """Log a text file on the parent run."""
        if not self._joined:  # else who dispatched us does that
            self._tell({"op": "text", "run": self.parent_key, "name": name, "text": text})

    @harmless
    def finish(self, status: str, seconds: float) -> None:
        """End the parent run: FINISHED, FAILED or KILLED. One that is not finished is continued by the next run."""
        if self._joined:
            return  # who dispatched us does that
        if status == "FINISHED":
            self._tell(measured(self.parent_key, points_of({"seconds": seconds}, now())))
        self._tell({"op": "end", "run": self.parent_key, "status": status, "time": now()})
        if self._record and status == "FINISHED":
            self._record.unlink(missing_ok=True)

    @harmless
    def close(self, status: str) -> None:
        """Wait a while for the delivery of what is left, and let other runs of the same plan have the parent."""
        self.stop_monitor()
        if self._sender:
            self._sender.close(STOP_SECONDS if status == "KILLED" else CLOSE_SECONDS)
        if self._lock:
            self._lock.release()

    def _new_key(self) -> str:
        """The key of a run that nobody knows yet."""
        key = uuid4().hex
        if self._sender:
            self._sender.mlflow.fresh.add(key)
        return key

    def _tell(self, *operations: Mapping[str, Any]) -> None:
        if self._journal and self._sender:
            with self._telling:  # the monitor tells as well
                self._journal.append(operations)
            self._sender.wake()

    def _claim(self, key: str) -> Path | None:
        """The file that names the parent run of a plan, for us alone; None while another run of the plan is at work."""
        lock = shared_lock(self._runs / f".{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        self._lock = lock
        return self._runs / f"{key}.json"

    @property
    def _runs(self) -> Path:
        folder = self.home / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _state_of(self, stage: str, fingerprint: str) -> Path:
        """Where the tracking of a stage that is not told to its end stands."""
        return self._runs / f"{stage}-{fingerprint}.json"

    def _save_state(self) -> None:
        state = {"key": self.stage_key, "offset": self._offset, "begun": self._begun}
        write_durably(self._state, json.dumps(state, allow_nan=False))


def payload_uploads(artifact: Artifact, upload_bytes: float) -> tuple[str, ...]:
    """How a sealed payload gets into MLflow: whole where it is small enough, else as a reference; models as models."""
    small = artifact.size <= upload_bytes
    if artifact.stage == "export":
        return "reference", "version" if small else "version-reference"
    more = ("checkpoints",) if artifact.stage == "pretrain" else ()
    return "payload" if small else "reference", *more


def report_note(artifact: Artifact) -> dict[str, str]:
    """The stage's report as the note on its run's page."""
    report = artifact.path / "report.md"
    return {NOTE: clipped(report.read_text(encoding="utf-8"))} if report.exists() else {}


def clipped(text: str) -> str:
    return text if len(text) <= NOTE_LENGTH else text[: NOTE_LENGTH - 1] + "…"


def read_record(path: Path) -> dict[str, Any]:
    """What an unfinished run left in a file; nothing where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def beginning(key: str, name: str) -> dict[str, Any]:
    """What a run is found by, and begun with where it is not found."""
    source = {"mlflow.source.name": "llmill", "mlflow.source.type": "LOCAL", "mlflow.user": user()}
    return {"run": key, "name": name, "source": source, "time": now()}


def description(key: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> list[dict[str, Any]]:
    """The operations that give a run its params and tags."""
    values = {name: text_of(value) for name, value in flatten(params).items()}
    return [{"op": "params", "run": key, "params": values}, {"op": "tags", "run": key, "tags": dict(tags)}]


def dataset(artifact: Artifact) -> dict[str, str]:
    """An upstream artifact as MLflow sees a dataset: its digest is our fingerprint."""
    return {
        "name": artifact.stage,
        "digest": artifact.fingerprint,
        "source_type": "local",
        "source": canonical_json({"uri": artifact.path.resolve().as_uri()}),
        "profile": json.dumps(artifact.metrics, sort_keys=True, allow_nan=False),
    }


def candidate(model: str, fingerprint: str, newest: bool) -> dict[str, Any]:
    """The operation that gives an export's version the alias; ``newest``: unless a later one has it."""
    return {"op": "candidate", "model": model, "fingerprint": fingerprint, "newest": newest}


def measured(key: str, points: Sequence[Point]) -> dict[str, Any]:
    """The operation that adds points to a run's metrics."""
    return {"op": "metrics", "run": key, "points": points}


def points_of(figures: Mapping[str, float], stamp: int) -> list[Point]:
    """Figures that have no step."""
    return [(name, float(value), stamp, 0) for name, value in figures.items()]


def sealed_at(artifact: Artifact) -> int:
    """When an artifact's figures were known, in milliseconds since 1970: told again, they are the same points."""
    return int(datetime.fromisoformat(artifact.manifest["finished"]).timestamp() * 1000)


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def text_of(value: Any) -> str:
    """A param's value as MLflow takes it."""
    text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    return text if len(text) <= VALUE_LENGTH else text[: VALUE_LENGTH - 1] + "…"


def user() -> str:
    """The login name, where the system knows one."""
    return os.environ.get("USER") or os.environ.get("LOGNAME") or f"uid {os.getuid()}"
