"""Notes of the flow runs that processes of a home carry out, files in ``runs/prefect``: who, since when, how it ended.

`flows.prefect.flow_runs` writes and settles them; whoever ends a worker reads from them what is at work and how long it
needs.
"""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from data_pipeline.core.files import write_durably
from flows.engine.process import lives
from flows.engine.stopping import END_SECONDS

WORKER = "LLMILL_WORKER"
"""The variable that our own worker sets for the runs that it starts."""


@dataclass(frozen=True)
class Note:
    """The contents of one note. The file is named after the flow run."""

    file: Path
    api: str
    host: str
    pid: int
    created: float
    """When the process began (seconds of the epoch)."""
    name: str = ""
    """The flow run's, for people."""
    attempt: int = 0
    """How often Prefect had begun to run it by then."""
    seconds: float = END_SECONDS
    """How long it needs to end when it is asked to."""
    final: str = ""
    """``completed``, ``failed``, ``cancelled``; empty while it is at work, and where the process was killed."""
    message: str = ""
    """Why it was stopped, and what it leaves."""

    @property
    def flow_run_id(self) -> str:
        return self.file.stem

    @property
    def at_work(self) -> bool:
        """Whether it is carried out now, on this machine."""
        return here(self) and not self.final and lives(self.pid, self.created)


_mine: list[Note] = []
"""The note of this process, while there is one."""
_changing = threading.Lock()


def write_note(home: Path, flow_run_id: str, *, api: str, name: str, attempt: int) -> None:
    """Note that this process carries out a flow run."""
    process = psutil.Process()
    file = folder(home) / f"{flow_run_id}.json"
    note = Note(
        file=file,
        api=api,
        host=socket.gethostname(),
        pid=process.pid,
        created=process.create_time(),
        name=name,
        attempt=attempt,
    )
    save(note)
    _mine[:] = [note]


def needs(seconds: float) -> None:
    """Note how long this process needs from now on, at least, to end when it is asked to."""
    with _changing:
        if _mine:
            _mine[0] = replace(_mine[0], seconds=max(seconds, _mine[0].seconds))
            save(_mine[0])


def end_note(final: str, message: str) -> Note | None:
    """Note how the flow run of this process ended; the note, or None where there is none."""
    if not _mine:
        return None
    ended = replace(_mine.pop(), final=final, message=message)
    save(ended)
    return ended


def save(note: Note) -> None:
    content = asdict(note)
    del content["file"]
    write_durably(note.file, json.dumps(content, allow_nan=False))


def read_notes(home: Path) -> list[Note]:
    """All that can be read: one may be going just now."""
    found = []
    for file in sorted(folder(home).glob("*.json")):
        try:
            found.append(Note(file=file, **json.loads(file.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return found


def here(note: Note) -> bool:
    """Whether it was left on this machine."""
    return note.host == socket.gethostname()


def folder(home: Path) -> Path:
    place = home / "runs" / "prefect"
    place.mkdir(parents=True, exist_ok=True)
    return place
