"""What an operator does through Prefect's API, as its pages do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass(frozen=True)
class Prefect:
    """A client of the API at ``url`` (it ends in /api)."""

    url: str

    def get(self, path: str) -> Any:
        return checked(httpx.get(f"{self.url}/{path}", timeout=300))

    def post(self, path: str, **body: Any) -> Any:
        return checked(httpx.post(f"{self.url}/{path}", json=body, timeout=300))

    def patch(self, path: str, **body: Any) -> Any:
        return checked(httpx.patch(f"{self.url}/{path}", json=body, timeout=300))

    def run(self, flow_run: str) -> dict[str, Any]:
        return self.get(f"flow_runs/{flow_run}")

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        """The deployment's flow runs, by the time that they were expected to start."""
        chosen = {"deployments": {"name": {"any_": [deployment]}}}
        return self.post("flow_runs/filter", **chosen, sort="EXPECTED_START_TIME_ASC")

    def start(
        self,
        deployment: str,
        job_variables: dict[str, Any] | None = None,
        *,
        called: str = "",
        **parameters: Any,
    ) -> str:
        """What the button "Run" does; ``called`` is typed into the form as the run's name."""
        known = self.get(f"deployments/name/pipeline/{deployment}")
        body = {"parameters": parameters, "job_variables": job_variables or {}}
        body |= {"name": called} if called else {}
        return self.post(f"deployments/{known['id']}/create_flow_run", **body)["id"]

    def retry(self, flow_run: str) -> None:
        """What the button "Retry" does."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
        answer = self.post(f"flow_runs/{flow_run}/set_state", state=state)
        assert answer["status"] == "ACCEPT", answer

    def cancel(self, flow_run: str) -> None:
        """What the button "Cancel" does."""
        state = {"type": "CANCELLING", "name": "Cancelling"}
        assert self.post(f"flow_runs/{flow_run}/set_state", state=state)["status"] == "ACCEPT"

    def wait(self, flow_run: str, name: str = "Suspended") -> None:
        """What the button "Suspend" does, and with "Paused" a pause by the API."""
        details = {"pause_timeout": "2100-01-01T00:00:00Z", "pause_reschedule": name == "Suspended"}
        state = {"type": "PAUSED", "name": name, "state_details": details}
        assert self.post(f"flow_runs/{flow_run}/set_state", state=state)["status"] == "ACCEPT"

    def resume(self, flow_run: str) -> None:
        """What the button "Resume" does."""
        assert self.post(f"flow_runs/{flow_run}/resume")["status"] == "ACCEPT"

    def log(self, flow_run: str) -> str:
        """What the flow run's page shows under "Logs"."""
        chosen = {"flow_run_id": {"any_": [flow_run]}}
        found = self.post("logs/filter", logs=chosen, sort="TIMESTAMP_ASC")
        return "\n".join(line["message"] for line in found)

    def ended(self, flow_run: str, seconds: float = 120) -> dict[str, Any]:
        """The flow run when it has ended."""
        return until(lambda: self.run(flow_run), lambda run: run["state_type"] in FINAL, seconds)

    def heartbeats(self, flow_run: str) -> int:
        """How often the run has shown that it lives."""
        chosen = {
            "event": {"name": ["prefect.flow-run.heartbeat"]},
            "resource": {"id": [f"prefect.flow-run.{flow_run}"]},
        }
        return self.post("events/filter", filter=chosen)["total"]

    def artifacts(self, flow_run: str) -> dict[str, Any]:
        """Kind -> what the flow run's page shows."""
        chosen = {"flow_run_id": {"any_": [flow_run]}, "type": {"not_any_": ["result"]}}
        found = self.post("artifacts/filter", artifacts=chosen)
        shown = {entry["key"].rpartition("-")[2]: data_of(entry) for entry in found}
        assert len(shown) == len(found), "the page of a run that was retried shows some things twice"
        return shown


def checked(answer: httpx.Response) -> Any:
    assert answer.status_code < 300, f"{answer.request.url}: {answer.text[:500]}"
    return answer.json() if answer.content else None


def data_of(entry: dict[str, Any]) -> Any:
    data = entry["data"]
    return json.loads(data) if entry["type"] == "table" and isinstance(data, str) else data


PATIENCE = 6
"""Shared machines drift by a factor of three, and tests run beside each other."""


def until(ask: Callable[[], Any], good: Callable[[Any], Any], seconds: float) -> Any:
    """What ``ask`` says when it is ``good``: within so many seconds, or `PATIENCE` times as many on a slow machine."""
    seconds *= PATIENCE
    deadline = time.monotonic() + seconds
    while not good(answer := ask()):
        assert time.monotonic() < deadline, f"still {str(answer)[:1000]} after {seconds} s"
        time.sleep(0.2)
    return answer
