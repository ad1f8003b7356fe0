"""The event log of training: rank 0 appends one JSON object a line to a file, which anyone may read. Training
never waits for a reader, and a start after a kill writes no step a second time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.core.files import atomic_path

ONCE = ("step", "norms", "validation", "samples", "scores", "skip")
"""Events that are facts of a step: replayed after a resume they are the same, so they are not written again. After
a rollback they are others, and written."""


class EventLog:
    """The writing end of ``events.jsonl``: append only, flushed line by line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.written = dict.fromkeys(ONCE, -1)
        """The last step of which each kind in `ONCE` is in the file; -1: none, for 0 is before the first."""
        self._drop_torn_line(path)
        for event in read_events(path):
            self._note(event)
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - lives as long as the process

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with the time (seconds since 1970), unless the file has that of its step already.

        Fields that are not finite are left out: JSON has no word for them.
        """
        if event in ONCE and fields["step"] <= self.written[event]:
            return
        finite = {
            name: value
            for name, value in fields.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        self._note({"event": event, **finite})
        written = {"event": event, **finite, "time": round(time.time(), 3)}
        self._file.write(json.dumps(written, allow_nan=False) + "\n")

    def _note(self, event: dict[str, Any]) -> None:
        """Keep in mind up to which step the file has events."""
        kind = event["event"]
        if kind in ONCE:
            self.written[kind] = max(self.written[kind], event["step"])
        elif kind == "rollback":
            self.written = {kind: min(step, event["to"]) for kind, step in self.written.items()}

    @staticmethod
    def _drop_torn_line(path: Path) -> None:
        """Cut off a last line that a kill left torn; whole lines stay where readers have read them."""
        with open(path, "rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


def write_events(path: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """Write the file of a log that begins with some events."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(event, allow_nan=False) + "\n" for event in events), "utf-8")


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read the whole events of a file, in order; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
