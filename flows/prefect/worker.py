"""A worker of a process pool that waits for what it has started: Prefect's own kills a run as soon as it is to end
itself, and 30 seconds after a cancel.

Asked to end (SIGTERM, Ctrl-C), it takes no more runs, asks those at work to end, and waits for as long as each notes
that it needs to save; a second Ctrl-C ends them at once. A cancel, a pause or a suspension is heeded by the run itself
(`flows.prefect.flow_runs.watched`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import psutil
from anyio.abc import Process, TaskStatus
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Scheduled, State
from prefect.utilities.processutils import command_from_string, sanitize_subprocess_env
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult

from flows.listeners.terminal import Terminal
from flows.prefect.run_notes import WORKER, Note, read_notes

KILL_SECONDS = 5.0
"""Seconds that a run gets on top of those that it notes it needs."""


class Worker(ProcessWorker):
    """Serves a pool of processes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.at_work: dict[UUID, Process] = {}
        """Flow run -> the process that carries it out."""

    @classmethod
    def __dispatch_key__(cls) -> str:
        """Another than Prefect's, whose own worker stays the one that it finds for pools of processes."""
        return "llmill"

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: TaskStatus[int] | None = None,
    ) -> ProcessWorkerResult:
        """Carry a flow run out as a process, to its end; when we are to end meanwhile, see it end first."""
        environment = sanitize_subprocess_env({**configuration.env, WORKER: "1"})
        process = await anyio.open_process(
            command_from_string(configuration.command or f"{sys.executable} -m prefect.engine"),
            cwd=configuration.working_dir,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=None,
            stderr=None,
        )
        self.at_work[flow_run.id] = process
        if task_status:
            task_status.started(process.pid)
        try:
            await process.wait()
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await end(process, flow_run)
                await self._give_back(flow_run)
            raise
        finally:
            del self.at_work[flow_run.id]
        assert process.returncode is not None
        return ProcessWorkerResult(status_code=process.returncode, identifier=str(process.pid))

    async def _submit_run(self, flow_run: FlowRun) -> None:
        """Take a flow run; when we are to end before its process is there, give it back."""
        try:
            await super()._submit_run(flow_run)
        except asyncio.CancelledError:
            if flow_run.id not in self.at_work:  # else `run` sees to it
                with anyio.CancelScope(shield=True):
                    await self._give_back(flow_run)
            raise

    async def _give_back(self, flow_run: FlowRun) -> None:
        """Have a run that had not yet begun wait for the next worker."""
        try:
            now = await self.client.read_flow_run(flow_run.id)
            if now.state_type == StateType.PENDING:
                waits: State = Scheduled(message="its worker ended before it began")
                await self.client.set_flow_run_state(flow_run.id, waits, force=True)
        except Exception as error:  # Prefect may be away, too
            self._logger.warning(
                "flow run “%s” may stay pending: Prefect can't be told: %s", flow_run.name, error
            )

    def kill_runs(self) -> None:
        """End what is at work at once."""
        for process in self.at_work.values():
            kill_tree(process.pid)


async def end(process: Process, flow_run: FlowRun) -> None:
    """Ask a run that is at work to end, and wait until it has; not longer than it noted, and some seconds."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    noted = note_of(flow_run)
    with anyio.move_on_after((noted.seconds if noted else Note.seconds) + KILL_SECONDS):
        await process.wait()
    if process.returncode is None:
        kill_tree(process.pid)
        await process.wait()


def note_of(flow_run: FlowRun) -> Note | None:
    """Return the note of a flow run in its home; None before it has come that far."""
    parameters: Mapping[str, Any] = flow_run.parameters
    home = Path(parameters.get("home") or os.environ.get("LLMILL_HOME", ".llmill"))
    return next((note for note in read_notes(home) if note.flow_run_id == str(flow_run.id)), None)


def kill_tree(pid: int) -> None:
    """End a process and all that it has started, for good."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for member in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                member.kill()


def serve(pool: str, *, healthcheck: bool = False, name: str = "") -> None:
    """Serve a pool until this process is asked to end."""
    worker = Worker(work_pool_name=pool, name=name or f"{pool}@{socket.gethostname()}")
    asyncio.run(serve_until_asked(worker, healthcheck))


async def serve_until_asked(worker: Worker, healthcheck: bool) -> None:
    serving = asyncio.ensure_future(worker.start(with_healthcheck=healthcheck))

    def stop(number: signal.Signals) -> None:
        if not serving.cancelling():
            serving.cancel()
        elif number == signal.SIGINT:
            worker.kill_runs()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    with suppress(asyncio.CancelledError):
        await serving
    Terminal().console.print(f"worker {worker.name} has ended")
