"""How run logs get to MLflow: in order, by one process at a time, each operation until MLflow has taken it.

A run has a thread that sends what earlier runs of the home left and then what the run logs, so nothing of a run waits
for MLflow. `llmill sync` sends what is left without a run: it resumes from the offset.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from flows.engine.events import Event, RunStarted, StepFailed, StepSealed, TrainingStarted
from flows.engine.log import LogFile, logs, runs, take_outbox
from flows.engine.store import Store, shared_lock
from flows.engine.training import EVENTS, read_lines
from flows.listeners.mlflow.links import HOME, target, without_user
from flows.listeners.mlflow.operations import ENTRIES, LOG, Away, Gone, Mlflow
from flows.listeners.mlflow.points import METRICS, Point, curve_points, event_points
from flows.listeners.mlflow.samples import SAMPLES, is_sample, samples_table
from flows.listeners.mlflow.translate import Operation, measured, operations
from flows.listeners.mlflow.uploads import Refused

GATHER_SECONDS = 0.3
"""From news to its sending: what the end of a step and the start of the next one report then goes at once, and not
while Prefect, which asks its own server between them, could use the time."""
FOLLOW_SECONDS = 20.0  # while a training logs its steps: MLflow's pages ask for what is new every 30
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
ID_SECONDS = 3.0  # without any sign of MLflow, for an id that a page or a manifest should name
MOST_ID_SECONDS = 10.0
FILE_SECONDS = 60.0  # without any sign of MLflow while files are sent, or from a database that is a file
LOGGED = {"params", "tags", "metrics", "link", LOG}


@dataclass(frozen=True)
class Following:
    """A training whose events are taken over as they come."""

    key: str
    stage: str
    fingerprint: str
    offset: int
    run: str = ""
    """The key of the whole run, which gets the curves; empty in a log of an older version."""
    step: str = ""
    quoting: bool = True
    """Whether MLflow may have texts that the model writes."""

    def read(self, store: Store) -> tuple[list[Operation], Self]:
        """Return operations for what is new in its events, and the `Following` from there on."""
        folders = (store.path(self.stage, self.fingerprint), store.partial(self.stage, self.fingerprint))
        found = next((one for one in folders if (one / EVENTS).exists()), folders[0])
        lines, offset = read_lines(found / EVENTS, self.offset)
        pending = in_requests(self.key, lines, event_points)
        if self.run:
            pending += in_requests(self.run, lines, partial(curve_points, self.step))
        if self.quoting and any(map(is_sample, lines)):
            pending += samples_table(self.key, SAMPLES, read_lines(found / EVENTS, 0, offset)[0])
        return pending, replace(self, offset=offset)


def in_requests(
    key: str, lines: Iterable[str], points_of: Callable[[Mapping[str, Any]], list[Point]]
) -> list[Operation]:
    """The operations that give a run the points of a training's lines."""
    points = [point for line in lines for point in points_of_line(line, points_of)]
    return [measured(key, points[start : start + METRICS]) for start in range(0, len(points), METRICS)]


def points_of_line(line: str, points_of: Callable[[Mapping[str, Any]], list[Point]]) -> list[Point]:
    """The points of a training's event; none of half a line, where a new file took the place of what was read."""
    try:
        return points_of(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return []


@dataclass(frozen=True)
class Place:
    """How far MLflow has a log: all before ``offset``, and a training's events as far as ``following`` says."""

    offset: int
    following: Following | None = None

    @classmethod
    def of(cls, log: LogFile) -> Self:
        sent = log.sent
        following = sent.get("following")
        return cls(sent["offset"], Following(**following) if following else None)

    def as_json(self) -> dict[str, Any]:
        return {"offset": self.offset, "following": asdict(self.following) if self.following else None}


def waiting(log: LogFile, store: Store) -> Iterator[tuple[Operation | None, Place]]:
    """The operations not yet reported to MLflow, in order, each with the place behind it; None: nothing to report."""
    place = Place.of(log)
    for event, offset in log.events(place.offset):
        following = place.following
        if following and isinstance(event, StepSealed | StepFailed) and event.key == following.key:
            pending, _ = following.read(store)
            yield from ((operation, place) for operation in pending)
            following = None
        if isinstance(event, TrainingStarted):
            following = Following(
                key=event.key,
                stage=event.stage,
                fingerprint=event.fingerprint,
                offset=event.offset,
                run=event.run,
                step=event.step,
                quoting=event.quoting,
            )
        pending = translated(event, store)
        behind = Place(offset, following)
        yield from ((operation, place) for operation in pending[:-1])
        yield (pending[-1] if pending else None), behind
        place = behind
    if place.following:
        pending, following = place.following.read(store)
        yield from ((operation, place) for operation in pending[:-1])
        yield (pending[-1] if pending else None), Place(place.offset, following)


def translated(event: Event, store: Store) -> list[Operation]:
    """The operations of an event; one that MLflow refuses where the event can't be translated: it holds up no other."""
    try:
        return list(operations(event, store))
    except Exception as error:
        return [{"op": event.kind, "why": f"{type(error).__name__}: {error}", "event": event.as_json()}]


def unsent(log: LogFile, store: Store) -> bool:
    """Whether not all of a log has been reported to MLflow."""
    return any(operation for operation, _ in waiting(log, store))


def deliver(log: LogFile, mlflow: Mlflow) -> Iterator[tuple[Operation, str]]:
    """Report to MLflow what waits in a claimed log; each operation, and why it was refused (empty where it was not).

    Raises:
        Away: MLflow does not answer; what is not delivered yet waits on.
    """
    experiment = log.head.get("experiment", "")
    for operation, place in in_batches(waiting(log, Store(mlflow.home))):
        why = ""
        try:
            if operation:
                mlflow.report(experiment, operation)
        except Refused as refusal:
            assert operation
            why = str(refusal)
            log.refuse(operation, why)
        try:
            if place:
                log.note_sent(place.as_json())
        except OSError as error:
            raise Away(f"{log.folder} can't be written to: {error}") from error
        if operation:
            yield operation, why


def in_batches(
    operations: Iterable[tuple[Operation | None, Place]],
) -> Iterator[tuple[Operation | None, Place | None]]:
    """Join what is logged of each run until something else comes: a request costs more than what is in it.

    Of those that go together, the last one has the place behind them all, and the others have none.
    """
    held: dict[str, Operation] = {}
    latest: Place | None = None
    for operation, place in operations:
        if operation and operation["op"] in LOGGED and "run" in operation:
            run = operation["run"]
            together = merged(held.get(run, {}), operation)
            if not together:
                yield from released(held, latest)
            held[run] = together or operation
        elif operation:
            yield from released(held, latest)
            yield operation, place
        elif not held:
            yield None, place
        latest = place
    yield from released(held, latest)


def released(held: dict[str, Operation], place: Place | None) -> Iterator[tuple[Operation, Place | None]]:
    """Give what was held, and hold it no longer."""
    while held:
        operation = held.pop(next(iter(held)))
        yield operation, None if held else place


def merged(one: Operation, other: Operation) -> Operation | None:
    """Two operations of a run as one of a request's size; None where they can't be. ``one`` may be empty."""
    known = one.get("params", {})
    if any(known.get(name, value) != value for name, value in other.get("params", {}).items()):
        return None  # a param has one value: MLflow is to refuse the second one
    points = [*one.get("points", ()), *other.get("points", ())]
    entries = {kind: {**one.get(kind, {}), **entries_of(kind, other)} for kind in ("params", "tags", "links")}
    if (
        len(points) > METRICS
        or len(entries["params"]) > ENTRIES
        or len(entries["tags"] | entries["links"]) > ENTRIES
    ):
        return None
    return {"op": LOG, "run": other["run"], **entries, "points": points}


def entries_of(kind: str, operation: Operation) -> Mapping[str, Any]:
    """An operation's params, tags or links by name."""
    if kind == "links" and operation["op"] == "link":
        return {operation["tag"]: {"to": operation["to"], "id": operation["id"]}}
    found: Mapping[str, Any] = operation.get(kind, {})
    return found


@contextmanager
def left_behind(home: Path, warn: Callable[[str], None] = lambda why: None) -> Iterator[Iterator[LogFile]]:
    """The claimed logs of runs that are over and have something to report, oldest first.

    Later logs may resume the runs of earlier ones, so one process at a time sends them, all others wait. Receivers of
    notices hear here, once, of a run that was killed; ``warn`` hears of those that can't be told.
    """
    runs(home).mkdir(parents=True, exist_ok=True)
    with shared_lock(runs(home) / ".left"), closing(claimed(home, warn)) as found:
        take_outbox(home)
        yield found


def send_left(
    home: Path, mlflow: Mlflow, warn: Callable[[str], None] = lambda why: None
) -> Iterator[tuple[LogFile, str]]:
    """Send what is left for an MLflow; each log that it could not have all of, and why.

    Raises:
        Away: it does not answer.
    """
    here = target(home)
    with left_behind(home, warn) as found:
        for log in found:
            if log.head["target"] != here:
                yield log, f"metrics of an earlier run are left: {how_to_send(log)}"
                continue
            try:
                for operation, why in deliver(log, mlflow):
                    if why:
                        yield log, refusal_warning(log, operation, why)
                log.remove()
            except Gone as gone:  # those of other experiments do not wait for it
                yield log, str(gone)


def claimed(home: Path, warn: Callable[[str], None]) -> Generator[LogFile]:
    store = Store(home)
    for log in logs(home):
        if not log.claim():
            continue  # its run is at work, and sends it
        try:
            report_ended(log, log.end_killed(), warn)
            if log.path.exists() and not unsent(log, store):
                log.remove()
            elif log.path.exists():
                yield log
        finally:
            log.release()


def report_ended(log: LogFile, keys: set[str], warn: Callable[[str], None]) -> None:
    """Report the run of a log to those whom it names, where it is one of those that were just found to be killed."""
    if keys and any(
        isinstance(one, RunStarted) and one.notify and one.key in keys for one, _ in log.events()
    ):
        from flows.listeners.notices import report_killed

        report_killed(log, warn)


def refusal_warning(log: LogFile, operation: Operation, why: str) -> str:
    return f"MLflow does not have what a run reported ({operation['op']}): {why}; it is kept in {log.refused}"


def how_to_send(log: LogFile) -> str:
    """Return what a person types to report what is meant for another MLflow than the present one."""
    meant = log.head["target"]
    return (
        "llmill sync, without MLFLOW_TRACKING_URI"
        if meant == HOME
        else f"MLFLOW_TRACKING_URI={meant} llmill sync"
    )


class Sender:
    """Delivers from a thread of its own what is left in a home, and then what one run adds to its log."""

    def __init__(self, home: Path, log: LogFile, mlflow: Mlflow, warn: Callable[[str], None]) -> None:
        self.home, self.mlflow = home, mlflow
        self.failure = ""
        """Why the oldest operation could not be delivered; empty when all is well."""
        self.done = False
        """Whether all has been delivered and the run is over."""
        self._log, self._warn = log, warn
        self.sent: Callable[[], None] = lambda: None
        """Called, in the sender's thread, whenever something was sent."""
        self._remote = mlflow.uri.startswith("http")
        self._warned = self._elsewhere = False
        self._change = threading.Condition()
        self._news = True
        self._awaited = self._closing = False
        self._behind = False
        self._failed_at = 0.0
        self._alive_at = time.monotonic()
        self._thread = threading.Thread(target=self._serve, name="mlflow-sender", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something new in the log."""
        with self._change:
            self._news = True
            self._change.notify_all()

    def id_of(self, key: str) -> str:
        """A run's id in MLflow; empty where that is not known soon, for MLflow does not answer or has much to do."""
        latest = time.monotonic() + (MOST_ID_SECONDS if self._remote else FILE_SECONDS)
        with self._change:
            self._awaited = key not in self.mlflow.ids
            self._change.notify_all()
            while key not in self.mlflow.ids and not self.failure and not self._behind:
                left = min(self._patience(ID_SECONDS), latest - time.monotonic())
                self._behind = left <= 0  # nobody waits again before all has been sent
                self._change.wait(max(left, 0))
        return self.mlflow.ids.get(key, "")

    def close(self, seconds: float) -> None:
        """Wait until all is delivered; ``seconds`` without any sign of MLflow, or one failed try, end that.

        The thread goes on until the process ends; what is left then is sent by the next run, or `llmill sync`.
        """
        closed = time.monotonic()
        with self._change:
            self._alive_at = closed
            self._closing = True
            self._change.notify_all()
            while not self.done and self._failed_at < closed and (left := self._patience(seconds)) > 0:
                self._change.wait(left)

    def _patience(self, seconds: float) -> float:
        """Seconds for which to wait on for a sign of MLflow."""
        slow = self.mlflow.uploading or not self._remote
        return self._alive_at + (FILE_SECONDS if slow else seconds) - time.monotonic()

    def _serve(self) -> None:
        self._until_it_works(self._connect)
        self._until_it_works(self._send_what_is_left)
        while not self.done:
            with self._change:
                # A training adds nothing to the log, but keeps logging its steps in a file of its own.
                self._change.wait_for(lambda: self._news or self._closing, FOLLOW_SECONDS)
                self._change.wait_for(lambda: self._awaited or self._closing, GATHER_SECONDS)
                over, self._news, self._awaited = self._closing, False, False
            self._until_it_works(self._send)
            self._behind = False
            if over:
                self._log.remove()
                self.done = True
                self._sign()

    def _until_it_works(self, task: Callable[[], None]) -> None:
        """Do a task, again and again while MLflow is away; at once when the run has just ended."""
        pauses = iter(RETRY_SECONDS)
        while True:
            started = time.monotonic()
            try:
                task()
                self._sign()
                return
            except Exception as error:  # whatever it is, nothing is lost by another try
                pauses = iter(RETRY_SECONDS) if self._alive_at > started else pauses
                self._away(str(error) or type(error).__name__, isinstance(error, Gone))
            self._pause(next(pauses, RETRY_SECONDS[-1]))

    def _pause(self, seconds: float) -> None:
        """Wait before another try, but not beyond the run's end."""
        with self._change:
            closing = self._closing
            self._change.wait_for(lambda: self._closing != closing, seconds)

    def _sign(self) -> None:
        """MLflow has answered."""
        with self._change:
            self.failure = ""
            self._alive_at = time.monotonic()
            self._change.notify_all()

    def _away(self, why: str, gone: bool) -> None:
        if not self._warned:
            where = f"MLflow at {without_user(self.mlflow.uri)} does not answer"
            self._warn(
                f"{why}; the run goes on" if gone else f"{where}; the run goes on, its metrics will follow"
            )
        self._warned = True
        with self._change:
            self.failure = why
            self._failed_at = time.monotonic()
            self._change.notify_all()

    def _connect(self) -> None:
        self.mlflow.connect(self._log.head["experiment"])

    def _send_what_is_left(self) -> None:
        for log, why in send_left(self.home, self.mlflow, self._warn):
            self._sign()
            elsewhere = log.head["target"] != target(self.home)
            if not (elsewhere and self._elsewhere):  # once, of however many
                self._warn(why)
            self._elsewhere = self._elsewhere or elsewhere

    def _send(self) -> None:
        for operation, why in deliver(self._log, self.mlflow):
            self._sign()
            if why:
                self._warn(refusal_warning(self._log, operation, why))
        self.sent()
