"""What a run leaves in Prefect, read back through its API."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from command_line import Llmill

from flows.stages import DEFAULT


@pytest.fixture(scope="module")
def ask(finished: Llmill, prefect_server: str):
    """``ask("flow_runs", flow_runs={...})``: everything of that kind that the filter lets through."""

    def ask(kind: str, **filters: Any) -> list[dict[str, Any]]:
        response = httpx.post(f"{prefect_server}/{kind}/filter", json=filters)
        response.raise_for_status()
        return response.json()

    return ask


@pytest.fixture(scope="module")
def pipeline(ask, finished: Llmill) -> dict[str, Any]:
    """The flow run of the first run in the home `finished`."""
    made_by = finished.manifest("export")["prefect_flow_run_id"]
    [export] = ask("flow_runs", flow_runs={"id": {"any_": [made_by]}})
    [call] = ask("task_runs", task_runs={"id": {"any_": [export["parent_task_run_id"]]}})
    [parent] = ask("flow_runs", flow_runs={"id": {"any_": [call["flow_run_id"]]}})
    return parent


def test_a_run_is_a_flow_and_each_stage_a_subflow_that_says_what_it_makes(ask, pipeline, finished: Llmill):
    assert pipeline["name"].startswith("small · ")
    assert pipeline["state_type"] == "COMPLETED"
    subflows = ask("flow_runs", flow_runs={"parent_flow_run_id": {"any_": [pipeline["id"]]}})
    subflows.sort(key=lambda run: run["start_time"])
    assert [run["name"].split()[0] for run in subflows] == list(DEFAULT)
    assert {run["state_type"] for run in subflows} == {"COMPLETED"}
    fingerprints = {stage: step["fingerprint"] for stage, step in finished.plan().items()}
    assert dict(run["name"].split()[:2] for run in subflows) == fingerprints
    [pretrain] = [run for run in subflows if run["name"].startswith("pretrain ")]
    assert pretrain["parameters"]["config"]["batch_tokens"] == 1024


def test_work_over_shards_is_tasks_named_after_them(ask, pipeline):
    subflows = ask("flow_runs", flow_runs={"parent_flow_run_id": {"any_": [pipeline["id"]]}})
    [clean] = [run for run in subflows if run["name"].startswith("clean ")]
    tasks = ask("task_runs", flow_runs={"id": {"any_": [clean["id"]]}})
    names = sorted(run["name"] for run in tasks)
    assert names == [f"clean documents-{number:05}" for number in range(len(names))]
    assert len(names) > 1
    assert {run["state_type"] for run in tasks} == {"COMPLETED"}
    assert pipeline["tags"] == ["small"]
    # For each tag a task would ask the server for leave to start.
    assert not any(run["tags"] for run in tasks)
