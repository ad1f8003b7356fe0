"""`StageContext` as a run gives it: Prefect tasks for work over shards, MLflow and the terminal for what is told."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from data_pipeline.context import Item, Result
from flows import launch
from flows.parts import Part, Stopped, compute
from flows.runners import Workers
from flows.terminal import Terminal, duration
from flows.tracking import Tracker, read_lines

MOST_TASKS = 200  # a stage: each costs tens of milliseconds of orchestration
FOLLOW_SECONDS = 1.0
ARTIFACT_SECONDS = 10.0  # between updates of the progress that Prefect shows


class PrefectContext:
    """Serves one stage body inside that stage's Prefect flow."""

    def __init__(self, stage: str, out: Path, workers: Workers, terminal: Terminal, tracker: Tracker) -> None:
        self.stage, self.workers = stage, workers.count
        self.notes: list[str] = []
        self._out, self._workers, self._terminal, self._tracker = out, workers, terminal, tracker
        self._progress: tuple[float, float | None, str] | None = None
        self._progress_artifact: Any = None
        self._progress_shown = time.monotonic()
        self._shown_events = 0
        self._total_steps = 0
        self._validated = ""
        self._followed = 0.0

    def map(
        self, fn: Callable[[Item], Result], items: Sequence[Item], *, names: Sequence[str] | None = None
    ) -> list[Result]:
        """Each item, or group of neighbours when there are many, is a task of the stage's task runner.

        When one fails, the parts that are queued or at work end at their next item, and only then is the failure
        raised: nothing may go on writing when the stage's lock is given back.
        """
        size = max(1, -(-len(items) // MOST_TASKS))
        stop = self._out / f".stop-{secrets.token_hex(4)}.tmp"
        computing = task(name=self.stage, task_run_name="{name}", persist_result=False, retries=0)(compute)
        futures = []
        results: list[Result] = []
        failure: Exception | None = None
        try:
            for start in range(0, len(items), size):
                group = items[start : start + size]
                label = f"{self.stage} {names[start] if names else start}"
                name = f"{label} and {len(group) - 1} more" if len(group) > 1 else label
                futures.append(computing.submit(name, self._workers.prepare(Part(fn, group, stop))))
            for future in futures:
                try:
                    part = future.result()
                except Stopped as error:
                    failure = failure or error
                except Exception as error:
                    if failure is None or isinstance(failure, Stopped):
                        failure = error
                else:
                    results.extend(part)
                    self._advance(len(part), len(results), len(items))
        except BaseException:
            stop.touch()
            raise
        if failure:
            stop.unlink(missing_ok=True)
            raise failure
        return results

    def _advance(self, finished: int, done: int, total: int) -> None:
        """Show that items are finished: in shards, where the body counts in these, else as parts of the whole."""
        if self._progress and self._progress[2] == "shards":
            self.progress(self._progress[0] + finished, *self._progress[1:])
        else:
            self._terminal.line(f"{done} of {total} parts")

    def progress(self, done: float, total: float | None, unit: str) -> None:
        self._progress = (done, total, unit)
        self._terminal.progress(done, total, unit)
        self._show_in_prefect(done, total, unit)

    def note(self, message: str, *, warning: bool = False) -> None:
        self.notes.append(message)
        self._terminal.note(message, warning)
        get_run_logger().log(30 if warning else 20, message)

    def launch(self, module: str, job: Path, ranks: int, *, events: Path, logs: Path) -> None:
        def follow() -> None:
            if time.monotonic() - self._followed >= FOLLOW_SECONDS:
                self._followed = time.monotonic()
                self._follow(events)

        _, self._shown_events = read_lines(events, 0)
        self._terminal.line(f"starting {ranks} rank(s)")
        try:
            launch.local(module, job, ranks, logs=logs, while_running=follow)
        finally:
            self._follow(events)

    def _follow(self, events: Path) -> None:
        lines, self._shown_events = read_lines(events, self._shown_events)
        for line in lines:
            self._show_event(json.loads(line))
        self._tracker.follow(events)

    def _show_event(self, event: dict[str, Any]) -> None:
        """One training event on the terminal; the last validation stays on the line."""
        kind = event["event"]
        if kind == "start":
            self._total_steps = event["steps"]
            self._validated = ""
            self.note(f"{event['parameters']:,} parameters, {event['ranks']} rank(s)")
        elif kind == "resume":
            self.note(f"resumed at step {event['step']}")
        elif kind == "warning":
            self.note(event["message"], warning=True)
        elif kind == "validation":
            self._validated = f" · val {event['bits_per_byte']:.4f} bits per byte"
        elif kind == "step":
            left = f" · {duration(event['eta_seconds'])} left" if event["step"] < self._total_steps else ""
            self._terminal.line(
                f"step {event['step']:,} of {self._total_steps:,} · loss {event['loss']:.4f}"
                f" · {event['tokens_per_second']:,.0f} tokens/s{self._validated}{left}"
            )
            self._show_in_prefect(event["step"], self._total_steps, "steps")

    def _show_in_prefect(self, done: float, total: float | None, unit: str) -> None:
        """A progress bar on the flow run's page, for stages that last long enough to be looked at."""
        if not total or time.monotonic() - self._progress_shown < ARTIFACT_SECONDS:
            return
        self._progress_shown = time.monotonic()
        percent = 100 * done / total
        with suppress(Exception):  # no training run should end for want of a progress bar
            if self._progress_artifact is None:
                self._progress_artifact = create_progress_artifact(
                    percent, description=f"{self.stage} ({unit})"
                )
            else:
                update_progress_artifact(self._progress_artifact, progress=percent)
