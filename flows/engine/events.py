"""The events of a run log: all that a run reports, one JSON object a line (docs/run-log.md).

Each has ``event`` (its kind) and ``time`` (milliseconds since 1970). Readers pass over kinds and fields that they do
not know; `SCHEMA` is raised when something changes its meaning or goes.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

SCHEMA = 1
KINDS: dict[str, type[Event]] = {}
"""Kind, as the log has it -> its class."""


def milliseconds() -> int:
    """The time, in milliseconds since 1970."""
    return int(time.time() * 1000)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened."""

    kind: ClassVar[str] = ""
    kept: ClassVar[bool] = True
    """Whether it is written to the log; others are only shown while the run is at work."""
    time: int = field(default_factory=milliseconds)

    def __init_subclass__(cls, kept: bool = True) -> None:
        cls.kind = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        cls.kept = kept
        KINDS[cls.kind] = cls

    def as_json(self) -> dict[str, Any]:
        return {"event": self.kind, **without_nonfinite(dataclasses.asdict(self))}


def read_event(values: Mapping[str, Any]) -> Event | None:
    """The event of a line; None where it is of a kind that this version does not know."""
    if "op" in values:  # as the journals for MLflow had it before there was a run log
        return Told(operation=dict(values))
    kind = KINDS.get(str(values.get("event")))
    if kind is None:
        return None
    known = {one.name for one in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in known})


def without_nonfinite(value: Any) -> Any:
    """A value with text in place of numbers that JSON does not have: ``"nan"``, ``"inf"``."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: without_nonfinite(one) for name, one in value.items()}
    return [without_nonfinite(one) for one in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A run begins, or resumes one of the same plan that did not end well."""

    key: str
    """The key that it is known by, also when it is continued: tag ``llmill.key`` in MLflow."""
    name: str
    renamed: bool = False
    """Whether it had another name before it was resumed."""
    recipe: str
    description: str = ""
    command: str = ""
    """The command that a person types to run it again."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Steps of the plan: step, stage, action, fingerprint, why."""
    params: dict[str, Any] = field(default_factory=dict)
    """Step -> the identity part of its config."""
    resolved: str = ""
    """The recipe as it was resolved, in YAML."""
    joined: bool = False
    """Whether another process began the run, of which this one does a step."""
    sweep: str = ""
    """The key of the sweep that it belongs to."""
    flow_run: dict[str, str] = field(default_factory=dict)
    """Its id and url in Prefect; empty outside of Prefect."""
    new: bool = True
    """Whether nobody can know the key yet."""
    notify: list[str] = field(default_factory=list)
    """Receivers to which its end is reported."""
    store: str = ""
    """Where its artifacts are."""
    quoting: bool = True
    """Whether texts may be copied to MLflow."""


@dataclass(frozen=True, kw_only=True)
class StepStarted(Event):
    """A step is built."""

    step: str
    stage: str
    fingerprint: str
    key: str
    run: str
    """The key of the run."""
    recipe: str = ""
    why: str = ""
    resumed: bool = False
    late: bool = False
    """Whether it is logged now what a killed run had no time to log."""
    new: bool = True
    params: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """Stage, fingerprint, path and metrics of each."""
    seen: int = 0
    """Bytes of its training's events that earlier attempts have reported."""
    begun: int = 0
    """When its first attempt began."""
    quoting: bool = True
    """Whether texts may be copied to MLflow; so in what follows."""
    flow_run: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepDispatched(Event):
    """A step is left to a deployment of its own."""

    step: str
    deployment: str


@dataclass(frozen=True, kw_only=True)
class Progress(Event, kept=False):
    """How far a step is."""

    step: str
    done: float
    total: float | None
    unit: str
    text: str = ""
    """In more words; empty where the numbers say all."""


@dataclass(frozen=True, kw_only=True)
class Activity(Event, kept=False):
    """The present work of a step, in words."""

    step: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Note(Event):
    """A line for a person."""

    text: str
    warning: bool = False
    step: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainingStarted(Event):
    """A step's ranks begin, which append to ``logs/events.jsonl`` of its artifact."""

    step: str
    stage: str
    fingerprint: str
    key: str
    run: str = ""
    """The key of the run."""
    offset: int = 0
    """Bytes of that file that are reported already."""
    quoting: bool = True


@dataclass(frozen=True, kw_only=True)
class Measured(Event):
    """System metrics of a step: what it asks of its machine."""

    key: str
    points: list[tuple[str, float, int, int]]
    """Name, value, time, and second since the step began."""
    run: str = ""
    """The key of the run."""
    begun: int = 0
    """When the run began, in milliseconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class StepSealed(Event):
    """A step's artifact is there."""

    step: str
    stage: str
    fingerprint: str
    key: str
    run: str
    """The key of the run; empty where the run that dispatched the step reports it."""
    how: str
    """``ran`` or ``resumed``."""
    seconds: float
    """In its body, this time."""
    total_seconds: float
    """In its body, in all attempts."""
    path: str
    size: int
    metrics: dict[str, float]
    payload_sha256: str
    finished: int
    """When, in milliseconds since 1970."""
    recipe: str
    late: bool = False
    resumed: bool = False
    withheld: bool = False
    """Whether MLflow is to have no copies of its files."""
    quoting: bool = True
    upload_bytes: float = 0
    """Payloads up to this size are copied to MLflow."""
    candidate: bool = True
    """Whether an export becomes the candidate."""


@dataclass(frozen=True, kw_only=True)
class StepReused(Event):
    """A step's artifact was there, or was made by another process."""

    step: str
    stage: str
    fingerprint: str
    run: str
    how: str
    """``reused`` or ``dispatched``."""
    seconds: float
    path: str
    metrics: dict[str, float]
    finished: int
    made_by: str = ""
    """The id in MLflow of the run that made it; empty where it was not known."""
    made_by_key: str = ""
    quoting: bool = True


@dataclass(frozen=True, kw_only=True)
class StepFailed(Event):
    """A step ended without an artifact."""

    step: str
    message: str
    status: str
    """``FAILED`` or ``KILLED``."""
    key: str = ""
    """Empty where it had not begun."""


@dataclass(frozen=True, kw_only=True)
class Compared(Event):
    """A model that the run evaluated was compared with the one that its recipe made before."""

    run: str
    """The key of the run."""
    step: str
    """The evaluation."""
    before: str
    """The name of the run that made the other one."""
    verdict: str
    """Which is better, by how much, and how sure that is."""
    page: str
    """The name under which MLflow has the page."""
    html: str


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """A run is over."""

    key: str
    status: str
    """``FINISHED``, ``FAILED`` or ``KILLED``."""
    seconds: float
    message: str = ""
    step: str = ""
    """The one at work."""
    log: str = ""
    """The last lines of what it reported."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """Step, stage, fingerprint, how and seconds of each step that is done."""
    compared: list[dict[str, str]] = field(default_factory=list)
    """Step, before, verdict and page of each `Compared`."""
    name: str = ""
    description: str = ""
    command: str = ""
    store: str = ""
    quoting: bool = True
    """These as in `RunStarted`, for whoever describes the run."""


@dataclass(frozen=True, kw_only=True)
class Linked(Event):
    """A page shows the run."""

    url: str
    table: str = ""
    """The page of all runs of the recipe."""


@dataclass(frozen=True, kw_only=True)
class Killed(Event):
    """The process of a run or of a step died; found by another one."""

    key: str


@dataclass(frozen=True, kw_only=True)
class Told(Event):
    """An operation for MLflow that is of no run of a recipe: of a comparison, a sweep, a decision."""

    operation: dict[str, Any]
