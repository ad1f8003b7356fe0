"""The events that a training logs in ``logs/events.jsonl``, line by line, and how a run shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.core.text import duration
from flows.engine.events import Event, Note, Progress

EVENTS = "logs/events.jsonl"
EDGE_BYTES = 64_000  # of a long file, this much of both ends says how far it is


def read_lines(path: Path, offset: int, end: int | None = None) -> tuple[list[str], int]:
    """The whole lines of a growing file from byte ``offset`` on (to ``end``), and the offset behind them."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read() if end is None else file.read(end - offset)
    except FileNotFoundError:
        return [], offset
    whole = data[: data.rfind(b"\n") + 1]
    return whole.decode().splitlines(), offset + len(whole)


class TrainingReader:
    """Follows a training for people: what is new since the last look, as events of its step."""

    def __init__(self, step: str, events: Path, offset: int | None = None) -> None:
        self._step_name, self._path = step, events
        self.offset = read_lines(events, 0)[1] if offset is None else offset
        """Bytes that earlier attempts wrote."""
        self._read = self.offset
        self._total = self._done = 0
        self._saved: int | None = None
        self._validated = ""

    def follow(self) -> Iterator[Event]:
        """Read what the training has logged since the last call."""
        lines, self._read = read_lines(self._path, self._read)
        for line in lines:
            yield from self._shown(json.loads(line))

    def kept(self, grace_seconds: float) -> str:
        """Describe what the training has on disk, and what it has not."""
        lost = self._done - (self._saved or 0)
        saved = f"step {self._saved} is saved" if self._saved is not None else "no step is saved"
        if lost <= 0:
            return saved
        return f"{saved}, {lost} later one(s) are lost: they were not saved within grace_seconds ({grace_seconds:g})"

    def _shown(self, event: dict[str, Any]) -> Iterator[Event]:
        """One training event; the last validation stays on the step's line."""
        kind = event["event"]
        if kind in ("checkpoint", "resume", "end", "interrupted", "rollback"):
            self._saved = event["to" if kind == "rollback" else "step"]
        if kind in ("step", "resume", "end", "interrupted", "rollback"):
            self._done = event["to" if kind == "rollback" else "step"]
        if kind == "start":
            self._total, self._validated = event["steps"], ""
        if kind == "validation":
            shown = next(name for name in VALIDATED if name in event)
            self._validated = f" · val {event[shown]:{VALIDATED[shown][0]}} {VALIDATED[shown][1]}"
        if kind in NOTES:
            text, warning = NOTES[kind]
            yield Note(step=self._step_name, text=text(event), warning=warning)
        if kind == "step":
            left = f" · {duration(event['eta_seconds'])} left" if event["step"] < self._total else ""
            text = (
                f"step {event['step']:,} of {self._total:,} · loss {event['loss']:.4f}"
                f" · {event['tokens_per_second']:,.0f} tokens/s{self._validated}{left}"
            )
            done, total = event["step"], self._total
            yield Progress(step=self._step_name, done=done, total=total, unit="steps", text=text)


def last_progress(events: Path, offset: int) -> str:
    """The line that the run shows of a training whose attempt began to log at byte ``offset``; empty before a step."""
    reader, shown = TrainingReader("", events, offset), ""
    lines, behind = read_lines(events, offset, offset + EDGE_BYTES)
    if lines and (last := events.stat().st_size - EDGE_BYTES) > behind:
        tail, _ = read_lines(events, last)
        lines += tail[1:]  # the first one may be half a line
    elif lines:
        lines += read_lines(events, behind)[0]
    for line in lines:
        for event in reader._shown(json.loads(line)):
            shown = event.text if isinstance(event, Progress) else shown
    return shown


VALIDATED = {"bits_per_byte": (".4f", "bits per byte"), "accuracy": (".1%", "right")}
"""Fields of the last validation, of which a step's line shows the first that it has: its form, and its name there."""
NOTES: dict[str, tuple[Any, bool]] = {
    "start": (lambda event: f"{event['parameters']:,} parameters, {event['ranks']} rank(s)", False),
    "resume": (lambda event: f"resumed at step {event['step']}", False),
    "interrupted": (lambda event: f"interrupted after step {event['step']}, which is saved", False),
    "warning": (lambda event: event["message"], True),
    "skip": (
        lambda event: (
            f"step {event['step']} was skipped: loss {event['loss']}, gradient norm {event['grad_norm']}"
        ),
        True,
    ),
    "rollback": (
        lambda event: (
            f"the loss leapt to {event['loss']:.4f} in step {event['step']} (z {event['z']:.1f}): back to step "
            f"{event['to']}, past {event['windows']:,} sequences"
        ),
        True,
    ),
}
"""Kind of an event -> what is noted of it, and whether that is a warning."""
