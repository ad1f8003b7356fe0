"""A run of a recipe: the executor in a Prefect flow, and those who listen to its log."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

from prefect import flow, tags
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY as HEARTBEATS

from data_pipeline.core.errors import UserError
from flows.engine.course import explained
from flows.engine.executor import Executor
from flows.engine.log import Listener
from flows.engine.order import Order
from flows.engine.plan import Planned
from flows.engine.ports import answers
from flows.listeners.flow_page import FlowPageListener
from flows.listeners.mlflow.listener import MlflowListener, begin_log
from flows.listeners.notices import NoticeListener, check_receivers, unset_receivers
from flows.prefect.dispatch import Dispatcher
from flows.prefect.flow_runs import at_work, attempted, settle
from flows.prefect.host import PrefectHost
from flows.prefect.names import FLOW
from flows.prefect.runners import reach

EVENTS_SECONDS = 5.0  # for states not yet reported to Prefect's server when a run ends


class Pipeline:
    """One run. Use it as a context: at the block's end, all listeners have its events, or had time to.

    Args:
        listeners: those who listen besides MLflow, the flow run's page and the receivers of notices; by name.
    """

    def __init__(
        self, order: Order, listeners: Mapping[str, Listener], dispatcher: Dispatcher | None = None
    ) -> None:
        recipe, uses = order.recipe, order.planned.uses
        self._home: Path = uses.store.home
        self._dispatcher = dispatcher or Dispatcher()
        try:
            self.log = begin_log(self._home, recipe.name)
        except OSError as error:
            raise explained(error, self._home, order.command) from error
        # In the order in which they end: the others may show where MLflow has the run.
        self.mlflow = MlflowListener(self._home, recipe.name, self.log)
        self.log.attach("MLflow", self.mlflow)
        self.log.attach("the flow run's page", FlowPageListener())
        self.log.attach("runtime.notify", NoticeListener(self.log.warn))
        for name, listener in listeners.items():
            self.log.attach(name, listener)
        self._host = PrefectHost(recipe.runtime, uses, self.log, self._dispatcher, self.mlflow)
        self.executor = Executor(order, self.log, self._host)
        self._in_prefect = False  # whether a flow of this process is reported to Prefect

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self.log.close()
        self.executor.reporter.release()
        if self._in_prefect:
            self._flush()

    def prepare(self) -> None:
        """See that the plan can be carried out from here.

        Raises:
            UserError: a step can't be resolved or replaced, a receiver is wrong, or no cluster answers.
        """
        planned, runtime = self.executor.order.planned, self.executor.order.recipe.runtime
        check_receivers(runtime.notify)
        joined = self.executor.order.run_key  # who dispatched us reports the end
        for receiver in () if joined else unset_receivers(runtime.notify):
            self.log.warn(
                f"runtime.notify: {receiver} can't be notified of this run's end: the variable is not set"
            )
        require_possible(planned)
        for step in planned.steps:
            self._dispatcher.check(step)
        for step in planned.steps:
            if step.action != "reuse":
                _ = step.stage.body  # its libraries take seconds to import, in which a server of ours starts
        if planned.builds:
            reach(runtime)
        self.mlflow.start()

    def run(self) -> None:
        """Carry the plan out within the flow run that calls this, if there is one."""
        self.executor.run()

    @contextmanager
    def flow(self, parameters: Mapping[str, Any]) -> Iterator[Callable[[], Any]]:
        """Give what to call to carry the plan out as a Prefect flow of this process.

        ``parameters`` are those by which a deployment would run the same.
        """
        recipe, name = self.executor.order.recipe, self.executor.order.name
        with ExitStack() as stack:
            if HEARTBEATS.name not in os.environ:
                # A flow waits up to a second for the thread that sends them to wake and end.
                stack.enter_context(temporary_settings({HEARTBEATS: None}))
            self._in_prefect = True
            if not answers(PREFECT_API_URL.value()):
                self._host.missed("the run")
                yield self.executor.run
                return
            with attempted(lambda: self._host.missed("the run")) as attempt, tags(recipe.name):
                # No retries of Prefect's: whoever runs the recipe again resumes where this run ended.
                # A name that is called is taken as it is; one that is a text would be a template, with its braces.
                @flow(name=FLOW, flow_run_name=lambda: name, retries=0, validate_parameters=False)
                def pipeline(**parameters: Any) -> Any:
                    with attempt, at_work(self._home):
                        self.executor.run()
                    return attempt.state

                yield partial(pipeline, **parameters)
            if not attempt.begun:
                self.executor.run()

    def _flush(self) -> None:
        """Have the server know what is still queued, before ours is stopped, or Prefect prints a trace."""
        if answers(PREFECT_API_URL.value()):
            APILogHandler().flush()
            EventsWorker.drain_all(timeout=EVENTS_SECONDS)
        settle(self._home)


def require_possible(planned: Planned) -> None:
    """See that a plan can be carried out.

    Raises:
        UserError: a step can't be resolved, or what it would replace is in use.
    """
    for step in planned.steps:
        if step.action == "unknown":
            raise UserError(f"{step.name}: {'; '.join(step.why)}")
        # Nobody may read what is to be built again and replaced.
        if step.why == ["--force"] and planned.uses.others(step.stage.name, str(step.fingerprint)):
            raise UserError(
                f"another run is using {step.stage.name} {step.fingerprint}, which --force would replace under it: "
                "wait for its end, or stop it"
            )
