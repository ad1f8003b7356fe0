"""The view of a run for a person: one line a step, a live line for the one at work, a table at the end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from data_pipeline.core.text import duration
from flows.engine.events import (
    Activity,
    Compared,
    Event,
    Note,
    Progress,
    StepDispatched,
    StepFailed,
    StepReused,
    StepSealed,
    StepStarted,
)
from flows.engine.store import Artifact
from flows.headline import headline, quantity

PLAIN_SECONDS = 15  # where the output is not a terminal, a progress line at most this often
RATE_SECONDS = 0.5  # no rate before this: it would be noise
PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: "␡"}
"""Unicode's pictures of the control characters that a terminal would obey."""
NO_TEXT = dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], "\ufffd")
"""More of these, and bytes of a file's name that are no UTF-8."""
VISIBLE = str.maketrans(PICTURES | NO_TEXT)


def visible(text: str) -> str:
    """Show what a terminal would obey or could not show: an escape character becomes ``␛``. The length stays."""
    return text.translate(VISIBLE)


class Screen(Console):
    """A console that prints text as it is. The only one: brackets, emoji codes and escape sequences in what people
    name their files, settings and prompts are neither markup nor commands."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        if isinstance(renderable, Text):
            renderable = renderable.copy()
            renderable.plain = visible(renderable.plain)
        yield from super().render(renderable, options)


class Terminal:
    """Writes to standard output; redraws a line a step at work if it is a terminal, else adds lines now and then."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Screen()
        self._live: Live | None = None
        self._began: dict[str, float] = {}
        """Step at work -> when it began."""
        self._counting: dict[str, tuple[str, float]] = {}
        """Step at work -> what it counts, and since when: it may count one thing after another."""
        self._lines: dict[str, Text] = {}
        """Step at work -> the line that is redrawn."""
        self._shown: dict[str, float] = {}
        """Step at work -> when a line was added last."""

    def title(self, text: str) -> None:
        self.console.print(text, style="bold")

    def step_started(self, step: str, what: str) -> None:
        """Begin a step's line, which shows ``what`` until there is progress to report."""
        self._began[step] = self._shown[step] = time.monotonic()
        if self.console.is_terminal:
            self._lines[step] = line("…", step, what)
            self._redraw()

    def progress(self, step: str, done: float, total: float | None, unit: str) -> None:
        """The step has done ``done`` of ``total`` ``unit``."""
        now = time.monotonic()
        before = self._counting.get(step)
        if before is None or before[0] != unit:
            self._counting[step] = (unit, now if before else self._began.get(step, now))
        seconds = now - self._counting[step][1]
        parts = [
            f"{quantity(done, unit)} of {quantity(total, unit)}" if total else quantity(done, unit),
            unit,
        ]
        if unit == "bytes":
            parts.pop()
        text = " ".join(parts)
        if seconds > RATE_SECONDS and done:
            text += f" · {quantity(done / seconds, unit)}/s"
            if total and done < total:
                text += f" · {duration(seconds * (total - done) / done)} left"
        self.line(step, text)

    def line(self, step: str, text: str) -> None:
        """Replace a step's live line (or print it, when the last print is long enough ago)."""
        if step in self._lines:
            self._lines[step] = line("…", step, text)
            self._redraw()
        elif time.monotonic() - self._shown.get(step, 0.0) >= PLAIN_SECONDS:
            self._shown[step] = time.monotonic()
            self.console.print(line("…", step, text))

    def note(self, text: str, warning: bool = False) -> None:
        """A line that stays."""
        self.console.print(Text(f"  {'!' if warning else '·'} {text}", style="yellow" if warning else "dim"))

    def leave(self) -> None:
        """Draw no step's line any longer."""
        self._lines.clear()
        self._redraw()

    def step_ended(self, mark: str, step: str, text: str, style: str = "green") -> None:
        """End a step's line for good."""
        self._lines.pop(step, None)
        self._redraw()
        self._shown.pop(step, None)
        began = self._began.pop(step, None)
        self._counting.pop(step, None)
        took = f"  {duration(time.monotonic() - began)}" if began is not None else ""
        self.console.print(line(mark, step, text, took=took, style=style))

    def _redraw(self) -> None:
        """Show the lines of the steps at work, below all that stays."""
        if self._lines and self._live is None:
            self._live = Live(console=self.console, refresh_per_second=8, transient=True)
            self._live.start()
        if self._live and self._lines:
            self._live.update(Group(*self._lines.values()))
        elif self._live:
            self._live.stop()
            self._live = None

    def summary(self, rows: Iterable[tuple[str, Artifact, str, float]]) -> None:
        """The table at the end: what each step made, whether it ran, and for how long."""
        table = Table(box=None, header_style="dim", pad_edge=False)
        for column in ("step", "", "result", "time", "artifact"):
            table.add_column(
                column, justify="right" if column == "time" else "left", no_wrap=column != "result"
            )
        for step, artifact, how, seconds in rows:
            style = "blue" if how == "reused" else "green"
            took = duration(seconds) if seconds else ""
            table.add_row(
                step,
                Text(how, style),
                Text(headline(artifact.stage, artifact.metrics, most=None)),
                took,
                Text(artifact.fingerprint, "dim"),
            )
        self.console.print()
        self.console.print(table)


def line(mark: str, step: str, text: str, *, took: str = "", style: str = "cyan") -> Text:
    """A step's line."""
    return Text.assemble((f"  {mark} ", style), (f"{step:<16}", "bold"), text, (took, "dim"))


class TerminalListener:
    """Shows a run on a terminal."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def handle(self, event: Event) -> None:
        terminal = self._terminal
        match event:
            case StepStarted(late=False, step=step, why=why):
                terminal.step_started(step, why)
            case StepDispatched(step=step, deployment=deployment):
                how = f"dispatched as {deployment}" if deployment else "in a process of its own"
                terminal.step_started(step, how)
            case Progress(text="", step=step, done=done, total=total, unit=unit):
                terminal.progress(step, done, total, unit)
            case Progress(step=step, text=text) | Activity(step=step, text=text):
                terminal.line(step, text)
            case Note(text=text, warning=warning):
                terminal.note(text, warning)
            case StepReused(step=step, how="reused", stage=stage, metrics=metrics):
                terminal.step_ended("=", step, f"{headline(stage, metrics)}  (reused)", "blue")
            case (
                StepSealed(late=False, step=step, stage=stage, metrics=metrics)
                | StepReused(step=step, stage=stage, metrics=metrics)
            ):
                terminal.step_ended("✓", step, headline(stage, metrics))
            case Compared(step=step, before=before, verdict=verdict):
                terminal.note(f"{step}: against “{before}”: {verdict}")
            case StepFailed(step=step, message=message):
                terminal.step_ended("✗", step, (message.splitlines() or ["stopped"])[0][:120], "red")

    def close(self) -> None:
        """Leave no line that is still drawn."""
        self._terminal.leave()


def fail(message: str) -> None:
    """A mistake's one or two lines, to standard error."""
    Screen(stderr=True).print(Text.assemble(("error: ", "bold red"), message))
