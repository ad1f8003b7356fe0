"""Which flow runs this home's processes carry out, so that none stays "running" in Prefect when its process is gone.

Each leaves a note while it is at work. Whoever comes next on the same machine finds the notes of dead processes, and
tells Prefect what became of their runs: the end that could not be told while the server was away, or a crash.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Completed, Crashed, Failed, State

from flows.process import lives
from flows.servers import answers, answers_soon
from flows.store import write_durably

Value = TypeVar("Value")
OPEN = {StateType.RUNNING, StateType.PENDING, StateType.CANCELLING}
CRASHED = "the process that ran this is gone; Retry goes on from what it sealed"


def in_flow(
    start: Callable[[Callable[[], Value]], Any], body: Callable[[], Value], missed: Callable[[], None]
) -> Value:
    """Call ``body`` within a flow that ``start`` makes of it; without one where Prefect can't be reached.

    ``missed`` is called when Prefect did not learn of the beginning or of the end. Whatever ``body`` raises is raised.
    """
    given: list[Value] = []
    raised: list[BaseException] = []

    def kept() -> Value:
        try:
            given.append(body())
        except BaseException as error:
            raised.append(error)
            raise
        finally:
            if not answers_soon(PREFECT_API_URL.value()):
                ending.enter_context(temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}))
        return given[0]

    try:
        if not answers(PREFECT_API_URL.value()):  # before Prefect's client tries for long
            raise httpx.ConnectError("no answer")
        with ExitStack() as ending:
            start(kept)
    except Exception as error:
        if raised:
            raise raised[0] from raised[0].__cause__
        if not unreachable(error):
            raise
        missed()
    return given[0] if given else body()


def unreachable(error: BaseException | None) -> bool:
    """Whether an error of Prefect's client says that its server is not there, or not able to answer."""
    while error is not None:
        if isinstance(error, httpx.TransportError):
            return True
        if isinstance(error, PrefectHTTPStatusError) and error.response.status_code >= 500:
            return True
        error = error.__cause__ or error.__context__
    return False


def wait_for_prefect(seconds: float) -> None:
    """Give a server that is away time to come back, so that it learns how a run ended."""
    deadline = time.monotonic() + seconds
    while not answers(PREFECT_API_URL.value()) and time.monotonic() < deadline:
        time.sleep(1)


@contextmanager
def at_work(home: Path) -> Iterator[None]:
    """Leave a note of the current flow run for as long as the block lasts; for longer, where its end is not told."""
    if not flow_run.id:  # Prefect could not be reached
        yield
        return
    note = notes(home) / f"{flow_run.id}.json"
    process = psutil.Process()
    content = {
        "api": PREFECT_API_URL.value(),
        "host": socket.gethostname(),
        "pid": process.pid,
        "created": process.create_time(),
    }
    write_durably(note, json.dumps(content, allow_nan=False))
    final = "failed"
    try:
        yield
        final = "completed"
    finally:
        write_durably(note, json.dumps({**content, "final": final}, allow_nan=False))


def settle(home: Path) -> None:
    """Tell Prefect what became of the flow runs whose processes are gone; where it can't be told, another time."""
    api = PREFECT_API_URL.value()
    for note in notes(home).glob("*.json"):
        try:
            content = json.loads(note.read_text())
            if content["host"] == socket.gethostname() and content["api"] == api and is_gone(content):
                close_run(note.stem, content.get("final"))
                note.unlink(missing_ok=True)
        except Exception as error:  # it is about another run, and must not stop ours
            if unreachable(error):
                return


def is_gone(content: dict[str, Any]) -> bool:
    """Whether the process that left a note has ended; we ourselves, when our flow has."""
    if content["pid"] == os.getpid():
        return "final" in content
    return not lives(content["pid"], content["created"])


def close_run(flow_run_id: str, final: str | None) -> None:
    """Set the last state of a flow run, and of what it began, where Prefect still thinks that it is at work."""
    state: State = {"completed": Completed(), "failed": Failed(), None: Crashed(message=CRASHED)}[final]
    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        begun = FlowRunFilterParentFlowRunId(any_=[UUID(flow_run_id)])
        stages = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=begun))
        for run in [*stages, client.read_flow_run(UUID(flow_run_id))]:
            if run.state_type in OPEN:
                client.set_flow_run_state(run.id, state, force=True)


def notes(home: Path) -> Path:
    folder = home / "runs" / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
