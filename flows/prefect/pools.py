"""Work pools and what watches over their runs, kept on a Prefect server.

By Prefect's own template of a pool, a flow run may name the command that its worker executes, and variables that change
what that does. By llmill's it may not: whoever can start a run chooses among the flow's parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from datetime import datetime, timedelta
from typing import Any

from prefect.automations import (
    Automation,
    ChangeFlowRunState,
    EventTrigger,
    Posture,
    ResourceSpecification,
)
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessWorker

from flows.engine.services import GPU_POOL, POOL
from flows.prefect.flow_runs import CRASHED
from flows.prefect.names import FLOW

ONLINE_SECONDS = 120
SILENT_SECONDS = 90.0  # three heartbeats
WATCH = "llmill: runs whose process went silent"
COMMAND = "python -P -m prefect.engine"
"""Runs a flow run. Prefect's own default first prepares a workspace, for seconds; ``-P`` looks for no code in the
working directory, which a flow run may name."""
LIMITS = {POOL: None, GPU_POOL: 1}
"""Runs at once in each pool that llmill makes: one GPU trains one run. Change it on the pool's page."""


def make_ready(api: str, pools: Sequence[str]) -> None:
    """Make the pools that are missing, and the automation that finds crashed runs; what is there stays as it is."""
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        for pool in pools:
            make_pool(client, pool, "process")
        watch_heartbeats(client)


def make_pool(client: SyncPrefectClient, name: str, kind: str) -> None:
    """Make a pool, or take from one that is there what lets its flow runs choose their command."""
    wanted = WorkPoolCreate(
        name=name,
        type=kind,
        base_job_template=fix_command(ProcessWorker.get_default_base_job_template()),
        concurrency_limit=LIMITS.get(name),
    )
    try:
        client.create_work_pool(wanted)
    except ObjectAlreadyExists:
        there = client.read_work_pool(name).base_job_template
        if (fixed := fix_command(there)) != there:
            client.update_work_pool(name, WorkPoolUpdate(base_job_template=fixed))


def fix_command(template: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pool's template in which command and environment are no variables; an operator's own values stay.

    Prefect merges a flow run's ``env`` into any mapping that the template has, so there is none.
    """
    fixed = deepcopy(dict(template))
    job, variables = fixed.get("job_configuration", {}), fixed.get("variables", {}).get("properties", {})
    for field in ("command", "env"):
        if job.get(field) == f"{{{{ {field} }}}}":
            del job[field]
            variables.pop(field, None)
    return {**fixed, "job_configuration": {"command": COMMAND, **job}}


def watch_heartbeats(client: SyncPrefectClient) -> None:
    """Have Prefect mark a run as crashed when its heartbeats stop before its end: its machine is gone.

    Where llmill has made the automation before, it is brought up to date, and stays switched off if it is.
    """
    wanted = watch().model_dump(mode="json", exclude={"id"})
    named = {"automations": {"name": {"any_": [WATCH]}}}
    found = client.request("POST", "/automations/filter", json=named).json()
    if not found:
        client.request("POST", "/automations/", json=wanted)
    elif found[0]["trigger"]["expect"] != wanted["trigger"]["expect"]:
        changed = {**wanted, "enabled": found[0]["enabled"]}
        client.request("PUT", "/automations/{id}", json=changed, path_params={"id": found[0]["id"]})


def watch() -> Automation:
    """The automation that finds runs whose process went silent.

    Any other event of a run ends the wait for its heartbeat: one that was retried, or suspended, has no process.
    """
    trigger = EventTrigger(
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.*"},
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=SILENT_SECONDS),
    )
    crash = ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, message=CRASHED, force=False)
    return Automation(name=WATCH, trigger=trigger, actions=[crash])


def wait_for_worker(api: str, pool: str, since: float, see_alive: Callable[[], None]) -> None:
    """Return when a worker of the pool has shown itself since ``since`` (seconds of the epoch)."""
    deadline = time.monotonic() + ONLINE_SECONDS
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        while True:
            workers = client.request(
                "POST",
                "/work_pools/{work_pool_name}/workers/filter",
                json={},
                path_params={"work_pool_name": pool},
            ).json()
            times = [worker["last_heartbeat_time"] for worker in workers if worker["status"] == "ONLINE"]
            if any(stamp(text) >= since - 1 for text in times):
                return
            see_alive()
            if time.monotonic() > deadline:
                raise RuntimeError(f"no worker of pool {pool} came up in {ONLINE_SECONDS} s")
            time.sleep(0.3)


def stamp(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def deployments_of(api: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return what the server knows of these deployments of the pipeline, in this order."""
    wanted = {"deployments": {"name": {"any_": list(names)}}, "flows": {"name": {"any_": [FLOW]}}}
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        found = client.request("POST", "/deployments/filter", json=wanted).json()
    return sorted(found, key=lambda entry: list(names).index(entry["name"]))
