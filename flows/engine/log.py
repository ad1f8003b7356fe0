"""The run log: ``<home>/runs/<id>/log.jsonl``, append only, one event a line (`flows.engine.events`).

It is all that a run reports. Terminal, flow page and notices are given each event by a thread of
their own; MLflow's sender reads the file from its offset, in this process or, when that is gone, in another. Whoever
sends a log holds its lock: its run as long as that lives, then whoever sends what is left. So a line is only ever
written behind whole ones, and a line that a kill tore is the last.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol
from uuid import uuid4

from filelock import FileLock, Timeout

from data_pipeline.core.files import append_durably, fsync
from flows.engine.events import (
    SCHEMA,
    Event,
    Killed,
    Note,
    RunEnded,
    RunStarted,
    StepFailed,
    StepSealed,
    StepStarted,
    Told,
    read_event,
)
from flows.engine.stopping import REPORT_SECONDS, asked

CLOSE_SECONDS = 120.0  # for all listeners to end; each has shorter limits of its own
DAMAGED = "damaged"


def runs(home: Path) -> Path:
    """Where the logs of a home lie, each in a folder of its own."""
    return home / "runs"


class LogFile:
    """A log on disk. Call `claim` before sending or removing it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "log.jsonl"
        self.refused = folder / "refused.jsonl"
        self._sent = folder / "sent.json"
        self._lock = FileLock(folder.with_name(f".{folder.name}"), thread_local=False)

    @classmethod
    def begin(cls, home: Path, experiment: str, target: str, lasts: bool = False) -> LogFile:
        """A new log, claimed, behind all that are there; ``lasts``: its holder is at work on the runs it begins.

        Args:
            experiment: of MLflow, the name of the recipe.
            target: which MLflow is meant.
        """
        log = cls(runs(home) / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{uuid4().hex[:8]}")
        runs(home).mkdir(parents=True, exist_ok=True)
        claimed = log.claim()  # before it is there: nobody should take it for a left one
        assert claimed
        log.folder.mkdir()
        head = {"schema": SCHEMA, "experiment": experiment, "target": target}
        log.path.touch()
        log.write([{**head, **({"lasts": "yes"} if lasts else {})}])
        fsync(log.folder)
        fsync(runs(home))
        return log

    @property
    def head(self) -> dict[str, str]:
        """``experiment`` and ``target``; empty where a kill came before they were written."""
        with open(self.path, "rb") as file:
            line = file.readline()
        return json.loads(line) if line.endswith(b"\n") else {}

    def append(self, *events: Event) -> None:
        """Add events; they are on disk when this returns, or none of them is there."""
        self.write([event.as_json() for event in events])

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines of JSON, all or none; a log that was removed stays so."""
        data = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            append_durably(file, data)
        finally:
            os.close(file)

    @property
    def sent(self) -> dict[str, Any]:
        """How far MLflow has it: ``offset`` in bytes, and whatever else its sender keeps.

        Less than is true does no harm: it is sent again.
        """
        try:
            sent = json.loads(self._sent.read_text())
        except (FileNotFoundError, ValueError):
            sent = {}
        return sent if isinstance(sent, dict) and isinstance(sent.get("offset"), int) else {"offset": 0}

    def note_sent(self, sent: Mapping[str, Any]) -> None:
        """Note that; a power cut may undo it, which does no harm."""
        temporary = self._sent.with_suffix(".tmp")
        temporary.write_text(json.dumps(sent, allow_nan=False))
        os.replace(temporary, self._sent)

    def events(self, offset: int = 0) -> Iterator[tuple[Event, int]]:
        """The events from an offset on, in order, each with the offset behind it."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # torn, or being written
                offset += len(line)
                event = event_of(line)
                if event:
                    yield event, offset

    def refuse(self, operation: Mapping[str, Any], why: str) -> None:
        """Set an operation aside that MLflow will never take."""
        with open(self.refused, "a") as file:
            file.write(json.dumps({"why": why, **operation}, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def claim(self) -> bool:
        """Take the log for this process alone, until `release` or its end; False where another has it."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    @property
    def held(self) -> bool:
        """Whether a process has it claimed. Asked without a claim: it may not be ours to write, and stays free."""
        try:
            file = os.open(self._lock.lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    def end_killed(self) -> set[str]:
        """End the runs that a process which is gone began and did not end: it was killed when it last wrote here.

        Returns:
            The keys of what is ended by this call; no other call returns them.
        """
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if not whole or not self.head.get("lasts"):
            return set()
        begun: dict[str, None] = {}
        for event, _ in self.events():
            begin, end = begins_and_ends(event)
            begun |= dict.fromkeys(begin)
            for key in end:
                begun.pop(key, None)
        if begun:
            killed = int(self.path.stat().st_mtime * 1000)
            os.truncate(self.path, len(whole))
            self.append(*(Killed(key=key, time=killed) for key in reversed(begun)))
        return set(begun)

    def release(self) -> None:
        self._lock.release()

    def remove(self) -> None:
        """Forget what has been sent; what was refused stays."""
        for path in (self.path, self._sent, Path(self._lock.lock_file)):
            path.unlink(missing_ok=True)
        if self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()
        self.release()


def begins_and_ends(event: Event) -> tuple[list[str], list[str]]:
    """The keys of what begins and of what ends with an event."""
    match event:
        case RunStarted(key=key, joined=False) | StepStarted(key=key):
            return [key], []
        case RunEnded(key=key) | StepSealed(key=key) | StepFailed(key=key) | Killed(key=key):
            return [], [key]
    operation = event.operation if isinstance(event, Told) else {}
    run = [str(operation.get("run", ""))]
    return (run if operation.get("op") == "begin" else []), (run if operation.get("op") == "end" else [])


def event_of(line: bytes) -> Event | None:
    """The event of a line; what can't be read is an operation, which nobody takes."""
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError
        return read_event(values)
    except (ValueError, TypeError):  # no JSON, or an event without its fields
        return read_event({"op": DAMAGED, "line": line.decode(errors="replace")})


def logs(home: Path) -> list[LogFile]:
    """All logs of a home, oldest first."""
    return [LogFile(path.parent) for path in sorted(runs(home).glob("*/log.jsonl"))]


def take_outbox(home: Path) -> None:
    """Make run logs of what an older llmill left for MLflow in ``runs/outbox``."""
    for old in sorted((runs(home) / "outbox").glob("*.jsonl")):
        lock = FileLock(old.with_name(f".{old.stem}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        log = LogFile(runs(home) / old.stem)
        log.folder.mkdir(exist_ok=True)
        position = old.with_suffix(".position")
        if position.exists():
            log.note_sent({"offset": int(position.read_text() or 0)})
            position.unlink()
        os.rename(old, log.path)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


class Listener(Protocol):
    """Something that gets the events of a run."""

    def handle(self, event: Event) -> None:
        """Take note of an event."""
        ...

    def close(self) -> None:
        """End, for there are no more events."""
        ...


class RunLog:
    """The log of the run of this process: a file, and those who listen."""

    def __init__(self, file: LogFile) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._lost = self._closing = False
        self._listening: list[Listening] = []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Leave all of it behind where what refers to it is sent to another process, which logs nothing."""
        return object, ()

    def attach(self, name: str, listener: Listener) -> None:
        """Give a listener all events that come."""
        self._listening.append(Listening(name, listener, self))

    def append(self, event: Event) -> bool:
        """Log an event. No failure of this ends a run, such as a full disk; it is warned of once.

        Returns:
            Whether it is kept.
        """
        failure: Exception | None = None
        with self._lock:  # of several threads that log something
            if event.kept:
                try:
                    self.file.append(event)
                except Exception as error:
                    failure = error
            for one in self._listening:
                one.put(event)
        if failure and not (self._lost or self._closing):
            self._lost = True
            reason = f"{type(failure).__name__}: {failure}"
            self.warn(f"what MLflow should know of this run can't be kept in {self.file.folder}: {reason}")
        return failure is None

    def note(self, text: str, step: str = "") -> None:
        self.append(Note(text=text, step=step))

    def warn(self, text: str, step: str = "") -> None:
        self.append(Note(text=text, warning=True, step=step))

    def close(self) -> None:
        """Have all listeners end, in the order in which they came, within some time that they share.

        What is logged from here on still reaches the listeners, and is kept for as long as nobody has removed the file.
        """
        self._closing = True
        deadline = time.monotonic() + (REPORT_SECONDS if asked.why else CLOSE_SECONDS)
        for one in self._listening:
            one.close(max(0.0, deadline - time.monotonic()))


class Listening:
    """Gives a listener each event, from a thread of its own: one that is slow or fails can't touch the run."""

    def __init__(self, name: str, listener: Listener, log: RunLog) -> None:
        self._name, self._listener, self._log = name, listener, log
        self._queue: SimpleQueue[Event | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=f"listener-{name}", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        self._queue.put(event)

    def close(self, seconds: float) -> None:
        self._queue.put(None)
        self._thread.join(seconds)

    def _serve(self) -> None:
        """Hand over events until there are no more; none after one that is too much for the listener."""
        failed = False
        while (event := self._queue.get()) is not None:
            if not failed:
                failed = self._fails(partial(self._listener.handle, event))
        self._fails(self._listener.close)

    def _fails(self, call: Callable[[], None]) -> bool:
        """Say whether the listener can't take a call, which is warned of."""
        try:
            call()
        except (Exception, SystemExit) as error:  # the latter is what rich makes of a closed pipe
            reason = f"{type(error).__name__}: {error}"
            self._log.warn(f"{self._name} fails and gets no more events of this run: {reason}")
            return True
        return False
