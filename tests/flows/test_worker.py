"""The worker of a process pool, against a real Prefect server."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.workers.process import ProcessWorker

from flows.prefect.worker import Worker

SLEEPS = "sleep 600"
"""What carries a run out here: it never tells Prefect that the run has begun."""


@pytest.fixture
def pool(prefect_server, request):
    """A pool of its own whose one deployment has a run waiting; its name and the run's id."""
    template = ProcessWorker.get_default_base_job_template()
    template["job_configuration"] = {**template["job_configuration"], "command": SLEEPS}
    name = request.node.name
    with temporary_settings({PREFECT_API_URL: prefect_server}), get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
        flow = client.create_flow_from_name(name)
        deployment = client.create_deployment(flow, name=name, work_pool_name=name)
        yield name, client.create_flow_run_from_deployment(deployment).id


@pytest.mark.parametrize(
    "point",
    ["_propose_pending_state", "_give_worker_labels_to_flow_run", "_propose_submitting_state", "at work"],
)
def test_a_run_that_was_taken_and_has_not_begun_is_given_back(prefect_server, pool, point, monkeypatch):
    """At whatever point of taking it the worker is asked to end."""
    name, run = pool
    reached = asyncio.Event()

    if point != "at work":
        prefects = getattr(Worker, point)

        async def stay(self, *given):
            await prefects(self, *given)
            reached.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(Worker, point, stay)

    async def end_there() -> None:
        worker = Worker(work_pool_name=name)
        serving = asyncio.ensure_future(worker.start())
        while not (reached.is_set() or worker.at_work):
            assert not serving.done()
            await asyncio.sleep(0.05)
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving
        assert not worker.at_work

    told = {PREFECT_API_URL: prefect_server, PREFECT_LOGGING_TO_API_ENABLED: False}
    with temporary_settings(told), get_client(sync_client=True) as client:
        asyncio.run(end_there())
        left = client.read_flow_run(run)
    assert left.state_type == StateType.SCHEDULED
    assert left.state.message == "its worker ended before it began"
