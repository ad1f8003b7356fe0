"""Steps that a run leaves to flow runs elsewhere: deployments of their own, in the work pool that each names.

So a pipeline on a machine with cores has its training done by one with GPUs. All share the home.
"""

from __future__ import annotations

from contextlib import suppress
from threading import Event
from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.runtime import deployment as this_deployment
from prefect.runtime import flow_run
from prefect.states import Cancelling

from data_pipeline.core.errors import UserError
from flows.engine.order import Wishes
from flows.engine.plan import Step
from flows.engine.stopping import Stop
from flows.prefect.form import settings_in
from flows.prefect.names import FLOW

POLL_SECONDS = 2.0


class DispatchedFailed(Exception):
    """A flow run that was to build a step did not end well."""


class Dispatcher:
    """Which steps go elsewhere; none by default."""

    def __init__(self, steps: frozenset[str] = frozenset(), parent_key: str = "") -> None:
        self._steps = steps
        self.parent_key = parent_key
        """The key of the run in MLflow of whoever dispatched us; empty where nobody did."""

    def takes(self, step: str) -> bool:
        return step in self._steps

    def check(self, step: Step) -> None:
        """See that a step which goes elsewhere means the same there.

        Raises:
            UserError: it leaves something to the machine that it runs on.
        """
        if self.takes(step.name) and not this_deployment.name:
            raise UserError(
                "only a run of a deployment can dispatch steps; make one with: llmill deploy RECIPE"
            )

    def deployment(self, step: str) -> str:
        """The deployment that builds a step: ours is ``pipeline/NAME``, its is ``pipeline/NAME.STEP``."""
        return f"{FLOW}/{this_deployment.name}.{step}"

    def run(self, step: str, wishes: Wishes, *, parent_key: str, force: bool) -> None:
        """Start a step's deployment, and wait until it has ended well. When we are stopped, so is it.

        With ``force`` it builds the step again although it is sealed.

        Raises:
            DispatchedFailed: it ended otherwise.
        """
        chosen = {"only": step, **({"force": step} if force else {})}
        mine: dict[str, Any] = flow_run.parameters
        # The form of the step's own deployment has other fields than ours; its list of settings takes all.
        changes = {"parent_key": parent_key, "stages": chosen, "settings": settings_in(mine), "config": {}}
        shared = {name: mine[name] for name in ("recipe", "home")}
        started: Any = run_deployment(self.deployment(step), parameters={**shared, **changes}, timeout=0)
        try:
            ended = wait_for(started, wishes.stop)
        except BaseException:
            with suppress(Exception), get_client(sync_client=True) as client:
                client.set_flow_run_state(started.id, Cancelling())
            raise
        assert ended.state
        if not ended.state.is_completed():
            raise DispatchedFailed(
                f"{step}: flow run “{ended.name}” of {self.deployment(step)} ended as {ended.state.name}: "
                f"{ended.state.message or 'no reason given'}"
            )


def wait_for(started: FlowRun, stop: Event) -> FlowRun:
    """The flow run when it has ended, however long Prefect may be away meanwhile.

    Raises:
        Stop: we are to ``stop`` before.
    """
    while True:
        with suppress(httpx.TransportError), get_client(sync_client=True) as client:
            current = client.read_flow_run(started.id)
            if current.state and current.state.is_final():
                return current
        if stop.wait(POLL_SECONDS):
            raise Stop("its flow run is cancelled")
