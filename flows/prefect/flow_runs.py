"""Which flow runs this home's processes carry out, so that none stays "running" in Prefect when its process is gone.

Each leaves a note while it is at work. Whoever comes next on the same machine finds the notes of dead processes, and
reports to Prefect what became of their runs: the end that could not be reported while the server was away, or a crash.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, Self, TypeVar
from uuid import UUID

import httpx
from httpx import Limits
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound, Pause, PrefectHTTPStatusError, TerminationSignal
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Failed, State, Suspended

from flows.engine.ports import answers, answers_soon
from flows.engine.process import lives
from flows.engine.stopping import asked, heeding_signals
from flows.prefect.run_notes import Note, end_note, here, read_notes, write_note

Value = TypeVar("Value")
AT_WORK = {StateType.RUNNING, StateType.CANCELLING}
OPEN = {*AT_WORK, StateType.PENDING}
CRASHED = "the process that ran this is gone; Retry resumes from what it sealed"
STOPS = (KeyboardInterrupt, TerminationSignal, Pause)
"""Exceptions that end a run because somebody wants it to: ours, and Prefect's own."""
WATCH_SECONDS = 5.0
"""Between looks at what Prefect has of our run: its server takes 10 ms of a processor for each. Its connections are
not kept for the next one, which would come as the server closes them."""


class Attempt(Generic[Value]):
    """One try to do something within a flow, of which Prefect may learn nothing: the block in the flow's function."""

    def __init__(self) -> None:
        self.begun = False
        self.raised: BaseException | None = None
        self._open = ExitStack()
        self._impatient = ExitStack()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Prefect sends a flow's function along with its tasks; no worker ever calls it."""
        return object, ()

    def __enter__(self) -> Self:
        self.begun = True
        self._open.enter_context(heeding_signals())
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.raised = error
        self._open.close()
        if not answers_soon(PREFECT_API_URL.value()):
            self._impatient.enter_context(temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}))
        return isinstance(error, STOPS)

    @property
    def state(self) -> State | None:
        """Return value of the flow's function: for Prefect, what was stopped is cancelled, with what it leaves."""
        return Cancelled(message=str(self.raised)) if self.raised else None

    def end(self) -> None:
        self._impatient.close()


@contextmanager
def attempted(missed: Callable[[], None]) -> Iterator[Attempt[Any]]:
    """Let a flow be called in the block, whose function does its work within the `Attempt`.

    ``missed`` is called when Prefect did not learn of the beginning or of the end. Whatever was raised in the attempt
    is raised here; where `begun` is false behind the block, Prefect could not be reached, and nothing was done.
    """
    attempt = Attempt[Any]()
    try:
        yield attempt
    except BaseException as error:
        if attempt.raised:
            raise attempt.raised from attempt.raised.__cause__
        if not isinstance(error, Exception) or not unreachable(error):
            raise
        missed()
    finally:
        attempt.end()
    if attempt.raised:
        raise attempt.raised


def stopped(stop: BaseException) -> State:
    """The state in which a deployment's run ends that was stopped.

    Raises:
        Pause: it was suspended, or paused, which is made the same, for nobody is left to wait; or another attempt at
            the run has begun since. Its state is to stay as it is.
    """
    ended: State = Cancelled(message=str(stop))
    with suppress(Exception), get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(str(flow_run.id)))
        if run.state and not ours(run, int(flow_run.run_count)):
            close_steps(client, run.id, ended)
            if run.state.type == StateType.PAUSED and not run.state.state_details.pause_reschedule:
                state: State = Suspended(pause_expiration_time=run.state.state_details.pause_timeout)
                state.message = str(stop)
                client.set_flow_run_state(run.id, state, force=True)
            raise Pause(state=run.state)
    return ended


def finished() -> State | None:
    """The state in which a deployment's run ends whose steps are all done; None leaves it to Prefect.

    Of a run that was cancelled in its last seconds Prefect takes no "completed": it would stay Cancelling.
    """
    with suppress(Exception), get_client(sync_client=True) as client:
        if client.read_flow_run(UUID(str(flow_run.id))).state_type == StateType.CANCELLING:
            return Cancelled(message="cancelled in Prefect, when all steps were done")
    return None


def ours(run: FlowRun, attempt: int) -> bool:
    """Whether the state of a flow run is that of an attempt which still has to end it."""
    elsewhere = run.state_type in (StateType.PAUSED, StateType.SCHEDULED, StateType.PENDING)
    return not elsewhere and run.run_count <= attempt


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
    """Leave a note of the current flow run for as long as the block lasts; for longer, where its end is not reported.

    Meanwhile, what is pressed on the run's page in Prefect stops it.
    """
    if not flow_run.id:  # Prefect could not be reached
        yield
        return
    name, attempt = flow_run.name or "", flow_run.run_count
    write_note(home, flow_run.id, api=PREFECT_API_URL.value(), name=name, attempt=attempt)
    final, message = "failed", ""
    try:
        with watched(UUID(flow_run.id), attempt):
            yield
        final = "completed"
    except STOPS as stop:
        final, message = "cancelled", str(stop)
        raise
    finally:
        end_note(final, message)


@contextmanager
def watched(flow_run_id: UUID, attempt: int) -> Iterator[None]:
    """Stop this process when somebody wants its flow run to end or to wait, by a button or by the API.

    A worker of Prefect's is notified of a cancel only; a run that no worker started, of nothing.
    """
    done = threading.Event()

    def watch() -> None:
        with get_client({"limits": Limits(max_keepalive_connections=0)}, sync_client=True) as client:
            while not done.wait(WATCH_SECONDS) and not asked.why:
                with suppress(Exception):
                    if why := wish(client.read_flow_run(flow_run_id), attempt):
                        asked.stop(why)

    thread = threading.Thread(target=watch, name="watch-flow-run", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(WATCH_SECONDS)


def wish(run: FlowRun, attempt: int) -> str:
    """Why a flow run should not go on, in words; empty where it should."""
    if run.state_type == StateType.PAUSED:
        return "suspended in Prefect" if run.state_name == "Suspended" else "paused in Prefect"
    if run.state_type in (StateType.CANCELLING, StateType.CANCELLED):
        return "cancelled in Prefect"
    return "" if ours(run, attempt) else "stopped, for another attempt at the same run has begun"


def settle(home: Path) -> None:
    """Report to Prefect what became of the flow runs whose processes are gone; where that can't be, another time."""
    api = PREFECT_API_URL.value()
    for note in read_notes(home):
        try:
            if note.api == api and here(note) and is_gone(note):
                close_run(note)
                note.file.unlink(missing_ok=True)
        except Exception as error:  # it is about another run, and must not stop ours
            if unreachable(error):
                return


def give_up(message: str) -> None:
    """Report to Prefect, from any thread, that the flow run of this process, which is about to end, is stopped."""
    if note := end_note("cancelled", message):
        close_run(note)


def is_gone(note: Note) -> bool:
    """Whether the process that left a note has ended; we ourselves, when our flow has."""
    if note.pid == os.getpid():
        return bool(note.final)
    return not lives(note.pid, note.created)


def close_run(note: Note) -> None:
    """Set the last state of a flow run, and of what it began, where Prefect still thinks that it is at work."""
    state: State = {
        "completed": Completed(),
        "failed": Failed(),
        "cancelled": Cancelled(message=note.message),
        "": Crashed(message=CRASHED),
    }[note.final]
    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        run = client.read_flow_run(UUID(note.flow_run_id))
        if run.run_count > note.attempt:  # it was retried since
            return
        close_steps(client, run.id, state)
        if run.state_type in AT_WORK:
            client.set_flow_run_state(run.id, state, force=True)


def close_steps(client: SyncPrefectClient, flow_run_id: UUID, state: State) -> None:
    """Set the last state of what a flow run began and did not end."""
    begun = FlowRunFilterParentFlowRunId(any_=[flow_run_id])
    for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=begun)):
        if run.state_type in OPEN:
            client.set_flow_run_state(run.id, state, force=True)
