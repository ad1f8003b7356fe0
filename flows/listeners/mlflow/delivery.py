"""How journals get to MLflow: in order, by one process at a time, each operation until MLflow has taken it.

A run has a thread that sends what earlier runs of the home left and then what the run tells, so no call of the run
waits for MLflow. `llmill sync` sends what is left without a run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from flows.engine.store import shared_lock
from flows.listeners.mlflow.journal import Journal, Operation, journals, outbox
from flows.listeners.mlflow.links import HOME, target, without_user
from flows.listeners.mlflow.operations import ENTRIES, LOG, METRICS, Away, Gone, Mlflow
from flows.listeners.mlflow.uploads import Refused

GATHER_SECONDS = 0.3
"""From news to its sending: what the end of a stage and the start of the next one tell then goes at once, and not
while Prefect, which asks its own server between them, could use the time."""
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
ID_SECONDS = 3.0  # without any sign of MLflow, for an id that a page or a manifest should name
MOST_ID_SECONDS = 10.0
FILE_SECONDS = 60.0  # without any sign of MLflow while files are sent, or from a database that is a file
LOGGED = {"params", "tags", "metrics", LOG}


def deliver(journal: Journal, mlflow: Mlflow) -> Iterator[tuple[Operation, str]]:
    """Tell MLflow what waits in a claimed journal; each operation, and why it was refused (empty where it was not).

    Raises:
        Away: MLflow does not answer; what is not delivered yet waits on.
    """
    experiment = journal.head.get("experiment", "")
    for operation, position in in_batches(journal.waiting()):
        why = ""
        try:
            mlflow.tell(experiment, operation)
        except Refused as refusal:
            why = str(refusal)
            journal.refuse(operation, why)
        try:
            journal.delivered(position)
        except OSError as error:
            raise Away(f"{journal.path.parent} can't be written to: {error}") from error
        yield operation, why


def in_batches(waiting: Iterable[tuple[Operation, int]]) -> Iterator[tuple[Operation, int]]:
    """Neighbouring params, tags and points of one run as one operation: a request costs more than what is in it."""
    held: tuple[Operation, int] | None = None
    for operation, position in waiting:
        together = merged(held[0], operation) if held else None
        if held and not together:
            yield held
        held = together or operation, position
    if held:
        yield held


def merged(one: Operation, other: Operation) -> Operation | None:
    """Two operations as one of a request's size; None where they can't be."""
    if not {one["op"], other["op"]} <= LOGGED or one.get("run") != other.get("run"):
        return None
    known = one.get("params", {})
    if any(known.get(name, value) != value for name, value in other.get("params", {}).items()):
        return None  # a param has one value: MLflow is to refuse the second one
    points = [*one.get("points", ()), *other.get("points", ())]
    entries = {kind: {**one.get(kind, {}), **other.get(kind, {})} for kind in ("params", "tags")}
    if len(points) > METRICS or any(len(each) > ENTRIES for each in entries.values()):
        return None
    return {"op": LOG, "run": one.get("run"), **entries, "points": points}


@contextmanager
def left_behind(home: Path) -> Iterator[Iterator[Journal]]:
    """The claimed journals of runs that are no more and have something to tell, oldest first.

    Later journals may go on with the runs of earlier ones, so one process at a time sends them, all others wait.
    """
    outbox(home).mkdir(parents=True, exist_ok=True)
    with shared_lock(outbox(home) / ".left.lock"), closing(claimed(home)) as found:
        yield found


def send_left(home: Path, mlflow: Mlflow) -> Iterator[tuple[Journal, str]]:
    """Send what is left for an MLflow; each journal that it could not have all of, and why.

    Raises:
        Away: it does not answer.
    """
    here = target(home)
    with left_behind(home) as found:
        for journal in found:
            if journal.head["target"] != here:
                yield journal, f"figures of an earlier run are left: {how_to_send(journal)}"
                continue
            try:
                for operation, why in deliver(journal, mlflow):
                    if why:
                        yield journal, refusal_warning(journal, operation, why)
                journal.remove()
            except Gone as gone:  # those of other experiments do not wait for it
                yield journal, str(gone)


def claimed(home: Path) -> Generator[Journal]:
    for journal in journals(home):
        if not journal.claim():
            continue  # its run is at work, and sends it
        try:
            journal.end_killed()
            if journal.path.exists() and next(journal.waiting(), None) is None:
                journal.remove()
            elif journal.path.exists():
                yield journal
        finally:
            journal.release()


def refusal_warning(journal: Journal, operation: Operation, why: str) -> str:
    return (
        f"MLflow does not have what a run told it ({operation['op']}): {why}; it is kept in {journal.refused}"
    )


def how_to_send(journal: Journal) -> str:
    """What a person types to send what another MLflow than the present one is to be told."""
    meant = journal.head["target"]
    return (
        "llmill sync, without MLFLOW_TRACKING_URI"
        if meant == HOME
        else f"MLFLOW_TRACKING_URI={meant} llmill sync"
    )


class Sender:
    """Delivers from a thread of its own what is left in a home, and then what one run adds to its journal."""

    def __init__(self, home: Path, journal: Journal, mlflow: Mlflow, warn: Callable[[str], None]) -> None:
        self.home, self.mlflow = home, mlflow
        self.failure = ""
        """Why the oldest operation could not be delivered; empty when all is well."""
        self.done = False
        """Whether all has been delivered and the run is over."""
        self._journal, self._warn = journal, warn
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
        """There is something new in the journal."""
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
                self._change.wait_for(lambda: self._news or self._closing)
                self._change.wait_for(lambda: self._awaited or self._closing, GATHER_SECONDS)
                over, self._news, self._awaited = self._closing, False, False
            self._until_it_works(lambda: self._send(self._journal))
            self._behind = False
            if over:
                self._journal.remove()
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
                f"{why}; the run goes on" if gone else f"{where}; the run goes on, its figures will follow"
            )
        self._warned = True
        with self._change:
            self.failure = why
            self._failed_at = time.monotonic()
            self._change.notify_all()

    def _connect(self) -> None:
        self.mlflow.connect(self._journal.head["experiment"])

    def _send_what_is_left(self) -> None:
        for journal, why in send_left(self.home, self.mlflow):
            self._sign()
            elsewhere = journal.head["target"] != target(self.home)
            if not (elsewhere and self._elsewhere):  # once, of however many
                self._warn(why)
            self._elsewhere = self._elsewhere or elsewhere

    def _send(self, journal: Journal) -> None:
        for operation, why in deliver(journal, self.mlflow):
            self._sign()
            if why:
                self._warn(refusal_warning(journal, operation, why))
