"""`StageContext` as a run gives it: Prefect tasks for work over shards, MLflow and the terminal for what is told."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from prefect import task
from prefect.context import TagsContext
from prefect.exceptions import MissingContextError
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.runtime import deployment

from data_pipeline.stage import Item, Result, Runtime
from flows.engine import launch, slurm
from flows.engine.parts import Part, Stopped, compute
from flows.engine.stopping import END_SECONDS, STOP_SECONDS
from flows.listeners.flow_page import FlowPage
from flows.listeners.mlflow.events import read_lines
from flows.listeners.mlflow.tracker import Tracker
from flows.listeners.terminal import Terminal, duration
from flows.prefect.run_notes import WORKER, needs
from flows.prefect.runners import Workers
from llm.machine.nodes import nodes_for
from llm.machine.slurm import SlurmJob

MOST_TASKS, TASKS_A_WORKER = 200, 4
IN_FLIGHT = 3  # tasks a worker that are submitted and not done, so that none waits for this process
FOLLOW_SECONDS = 1.0
TELL_SECONDS = 10.0  # MLflow takes a request's points at once, and asks as much for one as for a hundred
FOREIGN_SECONDS = 30.0
"""After which a worker of Prefect's own kills what it has told to end; ours waits for as long as a run needs."""


class PrefectContext:
    """Serves one stage body inside that stage's Prefect flow."""

    def __init__(
        self, stage: str, out: Path, workers: Workers, terminal: Terminal, tracker: Tracker, page: FlowPage
    ) -> None:
        self.stage, self.workers = stage, workers.count
        self.notes: list[str] = []
        self._out, self._workers, self._terminal, self._tracker = out, workers, terminal, tracker
        self._page = page
        self._progress: tuple[float, float | None, str] | None = None
        self._shown_events = 0
        self.kept = "what is done is kept"
        """What a stage that is stopped leaves, in words."""
        self._total_steps = self._step = 0
        self._saved: int | None = None
        self._validated = ""
        self._followed = self._told = 0.0

    def map(
        self, fn: Callable[[Item], Result], items: Sequence[Item], *, names: Sequence[str] | None = None
    ) -> list[Result]:
        """Each item, or group of neighbours when there are many, is a task of the stage's task runner.

        When one fails, no more are submitted, those at work end at their next item, and only then is the failure
        raised: nothing may go on writing when the stage's lock is given back.
        """
        stop = self._out / f".stop-{secrets.token_hex(4)}.tmp"
        waiting = deque(enumerate(self._parts(fn, items, names, stop)))
        computing = task(name=self.stage, task_run_name="{name}", persist_result=False, retries=0)(compute)
        done: SimpleQueue[tuple[int, PrefectFuture[list[Result]]]] = SimpleQueue()
        results: dict[int, list[Result]] = {}
        failure: Exception | None = None
        running = finished = 0
        try:
            while waiting or running:
                if waiting and running < IN_FLIGHT * self.workers:
                    number, (name, part) = waiting.popleft()
                    # For each tag that a task inherits, it would ask the server for leave before it starts.
                    with TagsContext(current_tags=set()):
                        future = computing.submit(name, self._workers.prepare(part))
                    future.add_done_callback(
                        partial(lambda number, future: done.put((number, future)), number)
                    )
                    running += 1
                    continue
                number, future = done.get()
                running -= 1
                try:
                    results[number] = future.result()
                except Exception as error:
                    waiting.clear()
                    if failure is None or isinstance(failure, Stopped):
                        failure = error
                else:
                    finished += len(results[number])
                    self._advance(len(results[number]), finished, len(items))
        except BaseException:
            stop.touch()
            self._workers.stop()  # else Prefect waits for the tasks at work
            raise
        if failure:
            stop.unlink(missing_ok=True)
            raise failure
        return [result for number in sorted(results) for result in results[number]]

    def _parts(
        self,
        fn: Callable[[Item], Result],
        items: Sequence[Item],
        names: Sequence[str] | None,
        stop: Path,
    ) -> Iterator[tuple[str, Part[Item, Result]]]:
        """The items in groups, each with a name for people."""
        size = group_size(len(items), self.workers)
        for start in range(0, len(items), size):
            group = items[start : start + size]
            more = f" and {len(group) - 1} more" if len(group) > 1 else ""
            yield f"{self.stage} {names[start] if names else start}{more}", Part(fn, group, stop)

    def _advance(self, finished: int, done: int, total: int) -> None:
        """Show that items are finished: in shards, where the body counts in these, else as parts of the whole."""
        if self._progress and self._progress[2] == "shards":
            self.progress(self._progress[0] + finished, *self._progress[1:])
        else:
            self._terminal.line(f"{done} of {total} parts")

    def checksum(self, fn: Callable[[Path], Result], paths: list[Path]) -> list[Result]:
        """`map` over the files to be sealed."""
        self._progress = None
        return self.map(fn, paths, names=[f"checksum {path.name}" for path in paths])

    def progress(self, done: float, total: float | None, unit: str) -> None:
        self._progress = (done, total, unit)
        self._terminal.progress(done, total, unit)
        self._show_in_prefect(done, total, unit)

    def note(self, message: str, *, warning: bool = False) -> None:
        self.notes.append(message)
        self._terminal.note(message, warning)
        with suppress(MissingContextError):  # where Prefect could not be reached
            get_run_logger().log(30 if warning else 20, message)

    def launch(
        self,
        module: str,
        job: Path,
        ranks: int,
        *,
        events: Path,
        logs: Path,
        grace_seconds: float = 30,
        batch: Runtime | None = None,
    ) -> None:
        def follow() -> None:
            if time.monotonic() - self._followed >= FOLLOW_SECONDS:
                self._followed = time.monotonic()
                self._follow(events)
                if self._followed - self._told >= TELL_SECONDS:
                    self._told = self._followed
                    self._tracker.follow(events)

        grace_seconds = self._grace(grace_seconds)
        needs(grace_seconds + launch.MARGIN_SECONDS + END_SECONDS)
        _, self._shown_events = read_lines(events, 0)
        self._terminal.line(f"starting {ranks} rank(s)")
        try:
            if isinstance(batch, SlurmJob):
                slurm.run(
                    job, batch, logs=logs, grace_seconds=grace_seconds, while_running=follow, say=self.note
                )
            else:
                self._say_who_is_awaited(job, ranks)
                launch.local(module, job, ranks, logs=logs, grace_seconds=grace_seconds, while_running=follow)
        finally:
            self._follow(events)
            self._tracker.follow(events)
            self.kept = self._what_is_saved(grace_seconds)

    def _grace(self, wanted: float) -> float:
        """The seconds that ranks get to save in; less than ``wanted`` where the worker that runs us does not wait."""
        most = FOREIGN_SECONDS - launch.MARGIN_SECONDS - STOP_SECONDS
        if not deployment.id or WORKER in os.environ or wanted <= most:
            return wanted
        self.note(
            f"this worker is Prefect's own, which kills a run {FOREIGN_SECONDS:g} s after a cancel: "
            f"ranks get {most:g} s to save, not grace_seconds ({wanted:g}); `llmill worker` waits for them",
            warning=True,
        )
        return most

    def _what_is_saved(self, grace_seconds: float) -> str:
        """What training has on disk, and what it has not."""
        lost = self._step - (self._saved or 0)
        saved = f"step {self._saved} is saved" if self._saved is not None else "no step is saved"
        if lost <= 0:
            return saved
        return f"{saved}, {lost} later one(s) are lost: they were not saved within grace_seconds ({grace_seconds:g})"

    def _say_who_is_awaited(self, job: Path, ranks: int) -> None:
        """Tell what to type on the other machines, where a person starts them."""
        nodes = nodes_for(ranks)
        if nodes.started_by == "hand":
            self.note(
                f"waiting at {nodes.endpoint} for the other machines: run there, with the same LLMILL_NODES and "
                f"LLMILL_ENDPOINT, `llmill join {shlex.quote(str(job.resolve()))}`"
            )

    def _follow(self, events: Path) -> None:
        lines, self._shown_events = read_lines(events, self._shown_events)
        for line in lines:
            self._show_event(json.loads(line))

    def _show_event(self, event: dict[str, Any]) -> None:
        """One training event on the terminal; the last validation stays on the line."""
        kind = event["event"]
        if kind == "start":
            self._total_steps = event["steps"]
            self._validated = ""
            self.note(f"{event['parameters']:,} parameters, {event['ranks']} rank(s)")
        elif kind == "resume":
            self._step = self._saved = event["step"]
            self.note(f"resumed at step {event['step']}")
        elif kind == "checkpoint":
            self._saved = event["step"]
        elif kind == "end":
            self._step = self._saved = event["step"]
        elif kind == "interrupted":
            self._step = self._saved = event["step"]
            self.note(f"interrupted after step {event['step']}, which is saved")
        elif kind == "warning":
            self.note(event["message"], warning=True)
        elif kind == "skip":
            loss, norm = event["loss"], event["grad_norm"]
            self.note(f"step {event['step']} was skipped: loss {loss}, gradient norm {norm}", warning=True)
        elif kind == "rollback":
            self._step = self._saved = event["to"]
            self.note(
                f"the loss leapt to {event['loss']:.4f} in step {event['step']} (z {event['z']:.1f}): back to step "
                f"{event['to']}, past {event['windows']:,} windows",
                warning=True,
            )
        elif kind == "validation":
            self._validated = f" · val {event['bits_per_byte']:.4f} bits per byte"
        elif kind == "step":
            self._step = event["step"]
            left = f" · {duration(event['eta_seconds'])} left" if event["step"] < self._total_steps else ""
            self._terminal.line(
                f"step {event['step']:,} of {self._total_steps:,} · loss {event['loss']:.4f}"
                f" · {event['tokens_per_second']:,.0f} tokens/s{self._validated}{left}"
            )
            self._show_in_prefect(event["step"], self._total_steps, "steps")

    def _show_in_prefect(self, done: float, total: float | None, unit: str) -> None:
        """The progress bar on the flow run's page."""
        if total:
            self._page.progress(100 * done / total, f"{self.stage}: {done:,.0f} of {total:,.0f} {unit}")


def group_size(items: int, workers: int) -> int:
    """How many items make a task: one, until there are more than enough tasks to keep all workers evenly busy.

    A task costs 10 ms in a thread and 150 ms on Dask or Ray (measured), whatever it computes.
    """
    return max(1, -(-items // max(MOST_TASKS, TASKS_A_WORKER * workers)))
