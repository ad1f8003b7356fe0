"""The context that a step's body is given in a run, but for `map`: all that it reports goes to the run log."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.stage import Item, Result, Runtime
from flows.engine import launch, slurm
from flows.engine.events import Activity, Note, Progress, StepStarted, TrainingStarted
from flows.engine.log import RunLog
from flows.engine.training import TrainingReader
from llm.machine.nodes import nodes_for
from llm.machine.slurm import SlurmJob

FOLLOW_SECONDS = 1.0


class StepContext:
    """Serves one body (`data_pipeline.stage.StageContext`)."""

    workers = 1

    def __init__(self, started: StepStarted, out: Path, log: RunLog) -> None:
        self.step = started.step
        self.notes: list[str] = []
        self.kept = "what is done is kept"
        """Words for what a step that is stopped leaves."""
        self._started, self._out, self._log = started, out, log
        self._counted: Progress | None = None
        self._followed = 0.0

    def map(
        self, fn: Callable[[Item], Result], items: Sequence[Item], *, names: Sequence[str] | None = None
    ) -> list[Result]:
        """Apply ``fn`` to items here, one after the other."""
        return [fn(item) for item in items]

    def checksum(self, fn: Callable[[Path], Result], paths: list[Path]) -> list[Result]:
        """`map` over the files to be sealed."""
        self._counted = None
        return self.map(fn, paths, names=[f"checksum {path.name}" for path in paths])

    def progress(self, done: float, total: float | None, unit: str) -> None:
        self._counted = Progress(step=self.step, done=done, total=total, unit=unit)
        self._log.append(self._counted)

    def advance(self, finished: int, done: int, total: int) -> None:
        """Report that items are finished: in shards, where the body counts in these, else as parts of the whole."""
        if self._counted and self._counted.unit == "shards":
            self.progress(self._counted.done + finished, self._counted.total, "shards")
        else:
            self.show(f"{done} of {total} parts")

    def note(self, message: str, *, warning: bool = False) -> None:
        self.notes.append(message)
        self._log.append(Note(text=message, warning=warning, step=self.step))

    def show(self, text: str) -> None:
        """Show what is being done."""
        self._log.append(Activity(step=self.step, text=text))

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
        training = TrainingReader(self.step, events)
        self._log.append(training_started(self._started, training.offset))
        grace_seconds = self.grace(grace_seconds)
        self.show(f"starting {ranks} rank(s)")

        def follow() -> None:
            if time.monotonic() - self._followed >= FOLLOW_SECONDS:
                self._followed = time.monotonic()
                self._follow(training)

        try:
            if isinstance(batch, SlurmJob):
                slurm.run(
                    job, batch, logs=logs, grace_seconds=grace_seconds, while_running=follow, note=self.note
                )
            else:
                self._note_who_is_awaited(job, ranks)
                launch.local(module, job, ranks, logs=logs, grace_seconds=grace_seconds, while_running=follow)
        finally:
            self._follow(training)
            self.kept = training.kept(grace_seconds)

    def grace(self, wanted: float) -> float:
        """The seconds that ranks get to save in."""
        return wanted

    def _follow(self, training: TrainingReader) -> None:
        for event in training.follow():
            if isinstance(event, Note):
                self.note(event.text, warning=event.warning)
            else:
                self._log.append(event)

    def _note_who_is_awaited(self, job: Path, ranks: int) -> None:
        """Note what to type on the other machines, where a person starts them."""
        nodes = nodes_for(ranks)
        if nodes.started_by == "hand":
            self.note(
                f"waiting at {nodes.endpoint} for the other machines: run there, with the same LLMILL_NODES and "
                f"LLMILL_ENDPOINT, `llmill join {shlex.quote(str(job.resolve()))}`"
            )


def training_started(started: StepStarted, offset: int) -> TrainingStarted:
    """Make the event that names a training's own log; ``offset`` bytes of that were reported before."""
    return TrainingStarted(
        step=started.step,
        stage=started.stage,
        fingerprint=started.fingerprint,
        key=started.key,
        run=started.run,
        offset=offset,
        quoting=started.quoting,
    )
