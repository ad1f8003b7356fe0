"""The input of a run: an order, and its surroundings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from flows.engine.context import StepContext
from flows.engine.events import Compared, StepStarted
from flows.engine.plan import Planned, Step
from flows.engine.store import Artifact
from flows.recipe import Recipe


@dataclass(frozen=True)
class Order:
    """The run that is wanted, and for whom."""

    planned: Planned
    name: str
    command: str
    """The command that a person types to run it again."""
    note: str = ""
    """The words of a person on this run."""
    sweep: str = ""
    """The key of the sweep that the run belongs to."""
    run_key: str = ""
    """The key of the run that dispatched us to do a step of it."""
    look: Callable[[Artifact], None] = lambda artifact: None
    """Sees each artifact before the next step begins; what it raises ends the run."""
    conclude: Callable[[Order, str, Mapping[str, Result]], Iterable[Compared]] = lambda *run: ()
    """Compares what the run has made: called with the order, the run's key and the results when all steps are done."""

    @property
    def recipe(self) -> Recipe:
        return self.planned.recipe


@dataclass(frozen=True)
class Result:
    """The outcome of one step."""

    artifact: Artifact
    how: str
    """``reused``, ``ran``, ``resumed`` or, by another process, ``dispatched``."""
    seconds: float
    """In its body, this time; 0 where it was reused."""


@dataclass
class Wishes:
    """The wishes of a run towards those who build steps for it."""

    stop: Event = field(default_factory=Event)
    saves: int = 0
    """How often a person asked for a checkpoint."""


class Host(Protocol):
    """The surroundings of a run."""

    stops: tuple[type[BaseException], ...]
    """Exceptions that end a run because somebody wants it to."""

    def at_work(self, builds: bool, give_up: Callable[[], None]) -> AbstractContextManager[None]:
        """Have what it takes to build, where the plan ``builds``; call ``give_up`` when we are too slow to end."""
        ...

    def flow(self, step: Step, work: Callable[[], None]) -> AbstractContextManager[Callable[[], Any]]:
        """Give what to call in place of ``work``, within a flow of the step."""
        ...

    def context(self, started: StepStarted, out: Path) -> StepContext:
        """Make the context of a body."""
        ...

    def deployment(self, step: Step) -> str:
        """The deployment that a step is left to; empty where it is built here."""
        ...

    def dispatch(self, step: Step, wishes: Wishes, *, order: Order, key: str) -> None:
        """Have the step's deployment or, without one, another process of this machine build it, as a part of the run
        of ``key``, and wait for its end."""
        ...

    def flow_run(self) -> dict[str, str]:
        """Id and url of the flow run that we are in; empty outside of one."""
        ...

    def made_by(self, key: str) -> dict[str, str]:
        """Return what a manifest says of the runs that made it: ids that are known by now."""
        ...

    def stopped(self, message: str) -> None:
        """Report, from any thread, that this process is about to end."""
        ...
