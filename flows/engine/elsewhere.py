"""Steps of a run that others build: processes of this machine, for steps side by side, or flow runs elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context

from flows.engine import launch
from flows.engine.course import StageFailed
from flows.engine.events import StepDispatched
from flows.engine.log import RunLog
from flows.engine.order import Order, Result, Wishes
from flows.engine.plan import Step
from flows.engine.reporter import Reporter
from flows.engine.store import Artifact
from llm.machine.gpus import gpus

POLL_SECONDS = 0.2

Build = Callable[[Step, Wishes], None]
"""Has a step built, waits for its end, and raises where it did not end well."""


class Elsewhere:
    """The steps of one run that others build, each awaited by a thread of ours.

    When one fails, the others are let end: their work is not lost. Only then is the failure raised.
    """

    def __init__(self, order: Order, log: RunLog, reporter: Reporter) -> None:
        self._order, self._log, self._reporter = order, log, reporter
        self.most = order.recipe.runtime.parallel_steps
        """Steps that may be at work at once."""
        self._threads = ThreadPoolExecutor(self.most, thread_name_prefix="elsewhere")
        self._work: dict[Future[Result], Step] = {}
        self._wishes = Wishes()
        self.seconds = 0.0
        """In which we waited for some."""
        self.failure: Exception | None = None
        """The first; no step should begin behind it."""

    @property
    def steps(self) -> list[str]:
        """Names of those at work."""
        return [step.name for step in self._work.values()]

    def has_room(self, step: Step) -> bool:
        """Whether a step may begin beside those at work: there are not too many, and the GPUs are not another's."""
        trains = step.stage.trains and any(one.stage.trains for one in self._work.values())
        return len(self._work) < self.most and not (trains and gpus())

    @contextmanager
    def ended_with_us(self) -> Iterator[None]:
        """Ask those at work to stop where the block is left before their end, and wait for that."""
        try:
            yield
        finally:
            self._wishes.stop.set()
            self._threads.shutdown()

    def begin(self, step: Step, build: Build, where: str) -> None:
        """Have a step built; ``where`` is its deployment, or empty for a process of this machine."""
        self._log.append(StepDispatched(step=step.name, deployment=where))
        self._work[self._threads.submit(copy_context().run, self._await, step, build)] = step

    def ended(self) -> Iterator[tuple[Step, Result]]:
        """Wait until some steps have ended, and give what they made.

        Raises:
            Exception: the first failure, once none is at work.
        """
        done: set[Future[Result]] = set()
        clock = time.monotonic()
        while not done:
            if launch.save_asked.is_set():
                launch.save_asked.clear()
                self._wishes.saves += 1
            done, _ = wait(self._work, POLL_SECONDS, FIRST_COMPLETED)
        self.seconds += time.monotonic() - clock
        for future in done:
            step = self._work.pop(future)
            try:
                result = future.result()
            except Exception as error:
                self.failure = self.failure or error
            else:
                yield step, result
        if self.failure and self._work:
            self._log.warn(f"{', '.join(self.steps)}: is let end, and then the run ends")
        elif self.failure:
            raise self.failure

    def _await(self, step: Step, build: Build) -> Result:
        clock = time.monotonic()
        try:
            with self._order.planned.uses.apart(step.stage.name, str(step.fingerprint)):  # it may be replaced
                build(step, self._wishes)
            return Result(self._artifact(step), "dispatched", time.monotonic() - clock)
        except BaseException as error:
            status = "KILLED" if self._wishes.stop.is_set() else "FAILED"
            self._reporter.step_failed(step.name, str(error) or "stopped", status)
            raise

    def _artifact(self, step: Step) -> Artifact:
        store, name = self._order.planned.uses.store, str(step.fingerprint)
        artifact = store.get(step.stage.name, name)
        if artifact is None:
            raise StageFailed(
                f"{step.name}: its flow run ended well, but {name} is not in {store.root}: do its worker "
                "and this one share the home, and resolve the recipe alike?"
            )
        return artifact
