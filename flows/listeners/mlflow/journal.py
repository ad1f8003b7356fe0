"""What MLflow is to be told, on disk until it has been told: a journal for each run of the pipeline.

``<home>/runs/outbox/<time>-<random>.jsonl`` holds one operation a line, in order, after a first line that says which
experiment of which MLflow is meant; ``.position`` beside it how much has been delivered, and ``.refused`` what MLflow
would not take. Whoever delivers a journal holds its lock: its run as long as that lives, then whoever sends what is
left. So a line is only ever written behind whole ones, and a line that a kill tore is the last.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from data_pipeline.core.files import fsync

Operation = Mapping[str, Any]
DAMAGED = "damaged"


def outbox(home: Path) -> Path:
    """Where the journals of a home lie."""
    return home / "runs" / "outbox"


class Journal:
    """One run's operations. Call `claim` before delivering or removing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.refused = path.with_suffix(".refused")
        self._position_file = path.with_suffix(".position")
        self._lock = FileLock(path.with_name(f".{path.stem}.lock"), thread_local=False)

    @classmethod
    def begin(cls, folder: Path, experiment: str, target: str, lasts: bool = False) -> Journal:
        """A new journal, claimed, behind all that are there; ``lasts``: its holder is at work on the runs it begins."""
        folder.mkdir(parents=True, exist_ok=True)
        journal = cls(folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{uuid4().hex[:8]}.jsonl")
        claimed = journal.claim()  # before it is there: nobody should take it for a left one
        assert claimed
        journal.append([{"experiment": experiment, "target": target, **({"lasts": "yes"} if lasts else {})}])
        fsync(folder)
        return journal

    @property
    def head(self) -> dict[str, str]:
        """``experiment`` and ``target``; empty where a kill came before they were written."""
        with open(self.path, "rb") as file:
            line = file.readline()
        return json.loads(line) if line.endswith(b"\n") else {}

    def append(self, operations: Sequence[Operation]) -> None:
        """Add operations; they are on disk when this returns, or none of them is there."""
        data = "".join(line_of(operation) for operation in operations).encode()
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(file).st_size
            try:
                if os.write(file, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)

    @property
    def position(self) -> int:
        """Bytes up to which all has been delivered. Less than is true does no harm: it is delivered again."""
        try:
            return int(self._position_file.read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def waiting(self) -> Iterator[tuple[Operation, int]]:
        """The operations that are not delivered, in order, each with the position after it."""
        with open(self.path, "rb") as file:
            file.seek(self.position)
            place = file.tell()
            for line in file:
                if not line.endswith(b"\n"):
                    return  # torn, or being written
                place += len(line)
                operation = parsed(line)
                if "op" in operation:
                    yield operation, place

    def delivered(self, position: int) -> None:
        """Note that all before ``position`` has been delivered; a power cut may undo that, which does no harm."""
        temporary = self._position_file.with_suffix(".position.tmp")
        temporary.write_text(str(position))
        os.replace(temporary, self._position_file)

    def refuse(self, operation: Operation, why: str) -> None:
        """Set an operation aside that MLflow will never take."""
        with open(self.refused, "a") as file:
            file.write(line_of({"why": why, **operation}))
            file.flush()
            os.fsync(file.fileno())

    def claim(self) -> bool:
        """Take the journal for this process alone, until `release` or its end; False where another has it."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def end_killed(self) -> None:
        """End the runs that a process which is no more began and did not end: it was killed when it last wrote here."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        operations = [parsed(line) for line in whole.splitlines()]
        if not operations or not operations[0].get("lasts"):
            return
        begun: dict[Any, None] = {}
        for one in operations:
            if one.get("op") == "begin":
                begun[one.get("run")] = None
            elif one.get("op") == "end":
                begun.pop(one.get("run"), None)
        if begun:
            killed = {"status": "KILLED", "time": int(self.path.stat().st_mtime * 1000)}
            os.truncate(self.path, len(whole))
            self.append([{"op": "end", "run": run, **killed} for run in reversed(begun)])

    def release(self) -> None:
        self._lock.release()

    def remove(self) -> None:
        """Forget what has been delivered; what was refused stays."""
        for path in (self.path, self._position_file, Path(self._lock.lock_file)):
            path.unlink(missing_ok=True)
        self.release()


def parsed(line: bytes) -> Operation:
    """One line; what can't be read is an operation too, which nobody takes."""
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"op": DAMAGED, "line": line.decode(errors="replace")}


def journals(home: Path) -> list[Journal]:
    """All journals of a home, oldest first."""
    return [Journal(path) for path in sorted(outbox(home).glob("*.jsonl"))]


def line_of(operation: Operation) -> str:
    """An operation as a line of JSON. Points of a training that diverges are no JSON numbers: ``"nan"``, ``"inf"``."""
    points = {"points": plain(operation["points"])} if "points" in operation else {}
    return json.dumps({**operation, **points}, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Lists with text in place of numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value
