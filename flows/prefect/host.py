"""Prefect around the executor: a subflow a step, a task a group of shards, and what is pressed on its pages."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from flows.engine.events import StepStarted
from flows.engine.log import RunLog
from flows.engine.order import Order, Wishes
from flows.engine.plan import Step
from flows.engine.ports import answers
from flows.engine.stopping import ending_in_time
from flows.engine.uses import Uses
from flows.listeners.mlflow.listener import MlflowListener
from flows.prefect import alongside
from flows.prefect.context import PrefectContext
from flows.prefect.dispatch import Dispatcher
from flows.prefect.flow_runs import STOPS, attempted, give_up, settle
from flows.prefect.runners import Workers, start_workers
from flows.recipe import RecipeRuntime

MOST_ENTRIES = 20  # of a list among a flow run's parameters


class PrefectHost:
    """The surroundings of a run (`flows.engine.executor.Host`)."""

    stops: tuple[type[BaseException], ...] = STOPS

    def __init__(
        self, runtime: RecipeRuntime, uses: Uses, log: RunLog, dispatcher: Dispatcher, mlflow: MlflowListener
    ) -> None:
        self._runtime, self._uses, self._log = runtime, uses, log
        self._dispatcher, self._mlflow = dispatcher, mlflow
        self._home: Path = uses.store.home
        self._workers: Workers

    @contextmanager
    def at_work(self, builds: bool, give_up: Callable[[], None]) -> Iterator[None]:
        keep_imports()
        with ExitStack() as stack:
            stack.enter_context(ending_in_time(give_up))
            stack.callback(self._uses.release)
            settle(self._home)
            if builds:
                self._workers = stack.enter_context(start_workers(self._runtime, self._home))
            yield

    @contextmanager
    def flow(self, step: Step, work: Callable[[], None]) -> Iterator[Callable[[], Any]]:
        assert step.config
        # The parameters are there to be read on the flow run's page.
        parameters = (str(step.fingerprint), shortened(step.config.identity()), step.inputs)
        if not answers(PREFECT_API_URL.value()):  # before Prefect's client tries for long
            self.missed(step.name)
            yield work
            return
        with attempted(lambda: self.missed(step.name)) as attempt:
            runner: Any = self._workers.task_runner()
            name = f"{step.name} {step.fingerprint}"

            @flow(name=step.name, flow_run_name=name, task_runner=runner, retries=0)
            def stage(fingerprint: str, config: dict[str, Any], inputs: dict[str, str]) -> Any:
                with attempt:
                    work()
                return attempt.state

            yield partial(stage, *parameters)
        if not attempt.begun:
            work()

    def context(self, started: StepStarted, out: Path) -> PrefectContext:
        return PrefectContext(started, out, self._log, self._workers)

    def deployment(self, step: Step) -> str:
        return self._dispatcher.deployment(step.name) if self._dispatcher.takes(step.name) else ""

    def dispatch(self, step: Step, wishes: Wishes, *, order: Order, key: str) -> None:
        if self._dispatcher.takes(step.name):
            forced = order.planned.selection.force == step.name
            self._dispatcher.run(step.name, wishes, parent_key=key, force=forced)
        else:
            alongside.build(step, self._log, wishes, order=order, key=key)

    def flow_run(self) -> dict[str, str]:
        return {"id": str(flow_run.id), "url": str(flow_run.ui_url)} if flow_run.id else {}

    def made_by(self, key: str) -> dict[str, str]:
        """The run in MLflow, whose id is empty where MLflow does not answer soon, and the flow run."""
        return {
            "mlflow_run_id": self._mlflow.id_of(key),
            "mlflow_key": key,
            "prefect_flow_run_id": str(flow_run.id),
        }

    def stopped(self, message: str) -> None:
        with suppress(Exception):
            give_up(message)

    def missed(self, what: str) -> None:
        """Warn that Prefect did not learn how something began or ended."""
        self._log.warn(f"Prefect at {PREFECT_API_URL.value()} does not answer; {what} goes on without it")


@functools.cache
def keep_imports() -> None:
    """Let the garbage collector pass over what is there by now: half a million objects that live to the end.

    To go through them takes it 0.3 s, in the midst of a step.
    """
    gc.freeze()


def shortened(value: Any) -> Any:
    """``value`` with long lists cut: Prefect refuses parameters above half a megabyte, and a source may list more."""
    if isinstance(value, Mapping):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        more = [f"and {len(value) - MOST_ENTRIES} more"] if len(value) > MOST_ENTRIES else []
        return [shortened(item) for item in value[:MOST_ENTRIES]] + more
    return value
