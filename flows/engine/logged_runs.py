"""The runs of a home as its files have them, without MLflow: which are at work, in which steps, and how others ended.

Only of runs that MLflow has not been sent all of: the log of one that is over goes when it has.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.engine.events import (
    Event,
    Killed,
    RunEnded,
    RunStarted,
    StepDispatched,
    StepFailed,
    StepReused,
    StepSealed,
    StepStarted,
    TrainingStarted,
)
from flows.engine.log import LogFile, logs
from flows.engine.store import Store
from flows.engine.training import EVENTS, last_progress

AT_WORK = "RUNNING"


@dataclass(kw_only=True)
class OpenStep:
    """A step that was begun and has not ended."""

    name: str
    since: int
    """Milliseconds since 1970."""
    training: TrainingStarted | None = None
    """Names the file in which its training reports."""

    def progress(self, store: Store) -> str:
        """How far it is, in words; empty where it reports to nobody but its run."""
        if not self.training:
            return ""
        folder = store.partial(self.training.stage, self.training.fingerprint)
        return last_progress(folder / EVENTS, self.training.offset)


@dataclass(kw_only=True)
class LoggedRun:
    """A run of a recipe."""

    key: str
    name: str
    recipe: str
    since: int
    """When it began, in milliseconds since 1970."""
    joined: bool
    """Whether its process only does a step of a run that another one began."""
    state: str = AT_WORK
    """``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``, as MLflow says it, also where nobody has told MLflow yet."""
    steps: dict[str, OpenStep] = field(default_factory=dict)
    """The steps at work, by name."""

    def as_json(self, store: Store) -> dict[str, Any]:
        steps = [
            {"step": one.name, "since": one.since, "progress": one.progress(store)}
            for one in self.steps.values()
        ]
        return {
            "name": self.name,
            "recipe": self.recipe,
            "key": self.key,
            "since": self.since,
            "steps": steps,
        }


def logged_runs(home: Path) -> dict[str, LoggedRun]:
    """Key -> run, of those of which a home has logs; the newest last."""
    found: dict[str, LoggedRun] = {}
    others = []
    for log in logs(home):
        with suppress(FileNotFoundError):  # all of it has just been sent
            run = read_run(log)
            if run and run.joined:
                others.append(run)
            elif run:
                found[run.key] = run
    for run in others:
        found.setdefault(run.key, run).steps |= run.steps
    return found


def runs_at_work(home: Path) -> list[LoggedRun]:
    """The runs whose processes live, the newest last."""
    return [run for run in logged_runs(home).values() if run.state == AT_WORK]


def read_run(log: LogFile) -> LoggedRun | None:
    """The run of a log; None where it is of a sweep or a comparison, or its run has not begun."""
    held, run = log.held, None
    for event, _ in log.events():
        if isinstance(event, RunStarted):
            run = LoggedRun(
                key=event.key, name=event.name, recipe=event.recipe, since=event.time, joined=event.joined
            )
        elif run:
            note(run, event)
    if run and run.state == AT_WORK and not held:
        run.state = "KILLED"
    if run and run.state != AT_WORK:
        run.steps.clear()
    return run


def note(run: LoggedRun, event: Event) -> None:
    """Take over what a run says after its beginning."""
    match event:
        case StepStarted(late=False, step=step, time=time) | StepDispatched(step=step, time=time):
            run.steps[step] = OpenStep(name=step, since=time)
        case TrainingStarted(step=step) if step in run.steps:
            run.steps[step].training = event
        case StepSealed(step=step) | StepReused(step=step) | StepFailed(step=step):
            run.steps.pop(step, None)
        case RunEnded(status=status):
            run.state = status
        case Killed(key=key) if key == run.key:
            run.state = "KILLED"
