"""A run's events said again to all who listen (``python -m tests.replayed_run HOME EVENTS KIND``), in a process of its
own: just before the first event of a kind it says so on standard output, and waits for a line.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from rich.console import Console

from flows.engine.events import Event, Note, read_event
from flows.engine.log import LogFile, RunLog
from flows.listeners.flow_page import FlowPageListener
from flows.listeners.lines import LinesListener
from flows.listeners.mlflow.links import target
from flows.listeners.mlflow.listener import MlflowListener
from flows.listeners.notices import NoticeListener
from flows.listeners.terminal import Terminal, TerminalListener


class Pipe(io.StringIO):
    """Standard output whose reader may go."""

    closed_at_the_end = False

    def write(self, text: str) -> int:
        if self.closed_at_the_end:
            raise BrokenPipeError
        return super().write(text)


class Warned:
    """A listener that keeps what a run warns of."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def handle(self, event: Event) -> None:
        if isinstance(event, Note) and event.warning:
            self.texts.append(event.text)

    def close(self) -> None:
        return


def replay(home: Path, lines: list[str], kind: str) -> list[str]:
    """Say all events; the terminal and the script that listen are gone from the first of ``kind`` on.

    Returns:
        What was warned of.
    """
    log, screen, script = RunLog(LogFile.begin(home, "small", target(home), lasts=True)), Pipe(), Pipe()
    warned = Warned()
    log.attach("notices", NoticeListener(log.warn))
    log.attach("the page", FlowPageListener())
    log.attach("MLflow", MlflowListener(home, "small", log))
    log.attach("the terminal", TerminalListener(Terminal(Console(file=screen))))
    log.attach("the script", LinesListener(script))
    log.attach("the test", warned)
    waited = False
    for line in lines:
        event = read_event(json.loads(line))
        assert event
        if event.kind == kind and not waited:
            print("now", flush=True)
            gone = sys.stdin.readline().split()
            screen.closed_at_the_end, script.closed_at_the_end = "terminal" in gone, "script" in gone
            waited = True
        log.append(event)
    log.close()
    return warned.texts


if __name__ == "__main__":
    home, events, kind = sys.argv[1:]
    warnings = replay(Path(home), Path(events).read_text().splitlines(), kind)
    # Not on standard output: of a closed pipe, rich makes that the end of it.
    Path(f"{events}.warned").write_text(json.dumps(warnings, allow_nan=False))
