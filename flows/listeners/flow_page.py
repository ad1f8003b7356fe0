"""The page of a run in Prefect: a table of its steps, the progress of the one at work, a link to MLflow.

All of it is sent by a thread of its own, the latest of each kind, so that a slow or absent server holds nothing up.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from logging import INFO, WARNING
from typing import Any
from uuid import UUID

from httpx import Limits
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate

from data_pipeline.core.text import duration
from flows.engine.events import (
    Compared,
    Event,
    Linked,
    Note,
    Progress,
    RunEnded,
    RunStarted,
    StepDispatched,
    StepFailed,
    StepReused,
    StepSealed,
    StepStarted,
)
from flows.headline import headline
from flows.listeners.mlflow.description import links

GATHER_SECONDS = 0.5
"""From news to its sending: a step's end is shown with the start of the next one, and not while Prefect
reports that to its server."""
SEND_SECONDS = 15.0
"""Between sends, and tries: on one machine, Prefect's server takes for them what training wants."""
IDLE_SECONDS = 4.0
"""For which a connection is kept. The server closes it after five, and a request that meets that is late by two."""
CLOSE_SECONDS = 5.0
LOG_SECONDS = 10.0
"""Between lines of a training in the flow run's log: a person who waits sees that it goes on, and finds the rest."""


class FlowPageListener:
    """Shows a run on the page of its flow run, and in its log there."""

    def __init__(self) -> None:
        self._run: RunStarted | None = None
        self._page: FlowPage | None = None
        self._flow_runs: dict[str, str] = {}
        self._results: dict[str, StepSealed | StepReused] = {}
        self._at_work: list[str] = []
        self._doing: dict[str, str] = {}
        """Step at work -> how far it is, in words."""
        self._log_again = 0.0
        self._links = Linked(url="")

    def handle(self, event: Event) -> None:
        match event:
            case RunStarted(flow_run={"id": id}):
                self._run, self._page = event, FlowPage(id, event.recipe)
                self._flow_runs[""] = id
            case Linked():
                self._links = event
            case StepStarted(late=False, step=step) | StepDispatched(step=step):
                self._at_work.append(step)
                self._flow_runs[step] = getattr(event, "flow_run", {}).get("id", "")
            case StepSealed(late=False, step=step) | StepReused(step=step):
                self._results[step] = event
                self._left(step)
                result = headline(event.stage, event.metrics)
                self._log(f"{step} {event.how}: {result} · {duration(event.seconds)}", INFO)
        if self._page is None:
            return
        match event:
            case Progress(step=step, done=done, total=total) if total:
                self._progress(event, 100 * done / total)
            case Note(text=text, warning=warning, step=step):
                self._log(text, WARNING if warning else INFO, step)
            case Compared(step=step, before=before, verdict=verdict):
                self._log(f"{step}: against “{before}”: {verdict}", INFO)
            case StepFailed(message=message, step=step):
                self._log(message, INFO, step)
                self._left(step)
            case RunStarted() | Linked() | StepStarted() | StepDispatched() | StepSealed() | StepReused():
                self._show("running")
            case RunEnded(status=status, step=step):
                self._at_work = [step] if step else []
                self._show({"KILLED": "stopped", "FAILED": "failed"}.get(status, ""))

    def close(self) -> None:
        if self._page:
            self._page.close()

    def _progress(self, event: Progress, percent: float) -> None:
        """Show how far a step is, in the table too; what a training reports is also a line of the log now and then."""
        assert self._page
        step = event.step
        self._doing[step] = event.text or f"{event.done:,.0f} of {event.total:,.0f} {event.unit}"
        self._page.progress(percent, f"{step}: {self._doing[step]}")
        self._show("running")
        if event.text and time.monotonic() >= self._log_again:
            self._log_again = time.monotonic() + LOG_SECONDS
            self._log(f"{step}: {event.text}", INFO)  # of the whole run: that is the page that people open

    def _left(self, step: str) -> None:
        """Take a step for one that is not at work."""
        self._at_work = [one for one in self._at_work if one != step]

    def _log(self, text: str, level: int, step: str = "") -> None:
        """A line in the log of the step's flow run, or of the whole run's."""
        flow_run_id = self._flow_runs.get(step) or self._flow_runs.get("")
        if flow_run_id:
            logging.getLogger("prefect.flow_runs").log(level, text, extra={"flow_run_id": flow_run_id})

    def _show(self, state: str) -> None:
        """Show the table of steps, the one at work in ``state``, and where else to look."""
        assert self._run
        assert self._page
        rows = [self._row(step, state) for step in self._run.steps]
        done = f"{len(self._results)} of {len(rows)} steps done"
        self._page.stages(rows, f"{done}, {', '.join(self._at_work)} {state}" if self._at_work else done)
        run, pages = self._run, self._links
        where = links(run.name, pages.url, pages.table, store=run.store, command=run.command)
        self._page.links(where, pages.url or "where else to look")

    def _row(self, planned: Mapping[str, Any], state: str) -> dict[str, str]:
        name = planned["step"]
        result = self._results.get(name)
        return {
            "stage": name,
            "state": result.how if result else state if name in self._at_work else "waiting",
            "result": headline(result.stage, result.metrics) if result else self._doing.get(name, ""),
            "duration": duration(result.seconds) if result and result.seconds else "",
            "fingerprint": str(planned["fingerprint"]),
        }


class FlowPage:
    """The artifacts of one flow run. Nothing that it does raises or waits, but `close`, for some seconds at most.

    Where there is no flow run, for Prefect could not be reached, nothing is shown.
    """

    def __init__(self, flow_run_id: str | None, recipe: str) -> None:
        self._flow_run_id = UUID(flow_run_id) if flow_run_id else None
        self._prefix = re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")
        self._ids: dict[str, UUID] = {}
        self._shown: dict[str, dict[str, Any]] = {}
        self._wanted: dict[str, dict[str, Any]] = {}
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="flow-page", daemon=True)
        if flow_run_id:
            self._thread.start()

    def stages(self, rows: Sequence[Mapping[str, Any]], summary: str) -> None:
        """Show a table with one row a step."""
        self._show(
            "stages", "table", json.dumps(list(rows), allow_nan=False), summary
        )  # text, as Prefect's own tables are

    def progress(self, percent: float, description: str) -> None:
        """Show how far the step at work is."""
        self._show("progress", "progress", round(percent, 1), description)

    def links(self, text: str, summary: str) -> None:
        """Show where else to look, in Markdown."""
        self._show("links", "markdown", text, summary)

    def close(self) -> None:
        """Send what is wanted last."""
        with self._change:
            self._closing = True
            self._change.notify()
        if self._flow_run_id:
            self._thread.join(CLOSE_SECONDS)

    def _show(self, kind: str, type_: str, data: Any, description: str) -> None:
        fields = {"type": type_, "data": data, "description": description}
        with self._change:
            if self._shown.get(kind) != fields:
                self._shown[kind] = self._wanted[kind] = fields
                self._change.notify()

    def _serve(self) -> None:
        """Send what changed, now and then, to the end."""
        settings = {"limits": Limits(keepalive_expiry=IDLE_SECONDS)}
        with get_client(settings, sync_client=True) as client:
            while True:
                with self._change:
                    self._change.wait_for(lambda: self._wanted or self._closing)
                    self._change.wait_for(lambda: self._closing, GATHER_SECONDS)
                    wanted, self._wanted = self._wanted, {}
                    closing = self._closing
                sent = False
                with suppress(Exception):  # no run should end for want of its page
                    for kind, fields in wanted.items():
                        self._send(client, kind, fields)
                    sent = True
                if closing:
                    return
                with self._change:
                    if not sent:
                        self._wanted = {**wanted, **self._wanted}
                    self._change.wait_for(lambda: self._closing, SEND_SECONDS)

    def _send(self, client: Any, kind: str, fields: Mapping[str, Any]) -> None:
        if not self._ids:  # a run that is retried resumes what its page shows
            ours = {"flow_run_id": {"any_": [str(self._flow_run_id)]}, "type": {"not_any_": ["result"]}}
            for entry in client.request("POST", "/artifacts/filter", json={"artifacts": ours}).json():
                self._ids[entry["key"].removeprefix(f"{self._prefix}-")] = UUID(entry["id"])
        if kind in self._ids:
            changes = {name: value for name, value in fields.items() if name != "type"}
            client.update_artifact(self._ids[kind], ArtifactUpdate(**changes))
            return
        created = client.create_artifact(
            ArtifactCreate(key=f"{self._prefix}-{kind}", flow_run_id=self._flow_run_id, **fields)
        )
        self._ids[kind] = created.id
