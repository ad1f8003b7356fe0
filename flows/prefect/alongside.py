"""A step that another process of this machine builds, so that it runs beside other steps of the run.

It is a run of that step alone, as of a deployment (`flows.prefect.dispatch`): it joins ours under our key in MLflow,
and its flow under ours in Prefect. `flows.prefect.one_step` is its side of this: it reports on its standard output, one
event a line, and ends when its standard input does, so that it does not outlive us, however we die.
"""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from prefect.context import serialize_context

from data_pipeline.core.errors import UserError
from flows.engine.course import StageFailed
from flows.engine.events import Activity, Event, Note, Progress, read_event
from flows.engine.launch import MARGIN_SECONDS
from flows.engine.log import RunLog
from flows.engine.order import Order, Wishes
from flows.engine.plan import Step
from flows.engine.stopping import END_SECONDS, STOP_SECONDS, Stop, asked
from flows.prefect.run_notes import needs
from flows.recipe import Recipe

POLL_SECONDS = 0.2
CODES = {UserError: 2, StageFailed: 1, Stop: 130}


@dataclass(frozen=True, kw_only=True)
class Job:
    """The input of the process."""

    recipe: dict[str, Any]
    """As a file would say it."""
    home: str
    step: str
    force: bool
    command: str
    sweep: str
    name: str
    key: str
    prefect: dict[str, Any]
    """Prefect's context; without a flow run, where there is none."""


def build(step: Step, log: RunLog, wishes: Wishes, *, order: Order, key: str) -> None:
    """Have another process build ``step`` as a part of the run of ``key``, and wait for its end.

    Raises:
        UserError: by a person's mistake, it could not.
        StageFailed: it failed.
        Stop: it was stopped, because we are.
    """
    grace = getattr(step.config.runtime, "grace_seconds", 0) + MARGIN_SECONDS if step.config else 0
    needs(grace + 2 * END_SECONDS)
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.prefect.one_step"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches us, and we ask it to stop
    )
    assert process.stdin
    assert process.stdout
    pickle.dump(job_of(step, order, key), process.stdin)
    process.stdin.flush()
    last = [f"{step.name}: its process began, and reported nothing"]
    reading = threading.Thread(target=relay, args=(step.name, process.stdout, log.append, last), daemon=True)
    reading.start()
    code, stopping = follow(process, wishes, grace)
    reading.join()
    process.stdin.close()
    if code == CODES[UserError]:
        raise UserError(last[-1])
    if code == CODES[Stop] and stopping:
        raise Stop(last[-1])
    if code:
        raise StageFailed(
            last[-1] if code in CODES.values() else f"{step.name}: its process ended with code {code}"
        )


def follow(process: subprocess.Popen[bytes], wishes: Wishes, grace: float) -> tuple[int, bool]:
    """Wait for a process's end, and tell it meanwhile what is wished.

    Args:
        grace: seconds that its ranks get to save in when it is asked to stop.

    Returns:
        Its code, and whether it was asked to stop.
    """
    saves, stopping = wishes.saves, False
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(POLL_SECONDS), stopping
        if wishes.saves > saves:
            saves = wishes.saves
            process.send_signal(signal.SIGUSR1)
        if wishes.stop.is_set() and not stopping:
            stopping = True
            asked.allow(grace + STOP_SECONDS + END_SECONDS)
            process.send_signal(signal.SIGTERM)


def job_of(step: Step, order: Order, key: str) -> Job:
    """Describe what the process is to do."""
    context = serialize_context()
    context["flow_run_context"].pop("flow", None)  # it holds what can't be sent, such as locks
    return Job(
        recipe=written(order.recipe, order.recipe.runtime.parallel_steps),
        home=str(order.planned.uses.store.home),
        step=step.name,
        force=order.planned.selection.force == step.name,
        command=order.command,
        sweep=order.sweep,
        name=order.name,
        key=key,
        prefect=context,
    )


def written(recipe: Recipe, at_once: int) -> dict[str, Any]:
    """Write a recipe as a file would say it, for one of the processes that may be ``at_once`` at work: with its share
    of the cores."""
    runtime, said = recipe.runtime, recipe.model_dump(exclude_unset=True)
    steps = {
        one.name: said.pop(one.name, {}) | {"stage": one.stage.name, "inputs": one.sources}
        for one in recipe.steps
    }
    workers = max(1, runtime.worker_count // at_once)
    return said | {"runtime": said.get("runtime", {}) | {"workers": workers}} | steps


def relay(step: str, lines: IO[bytes], append: Callable[[Event], object], last: list[str]) -> None:
    """Pass on what people see of a step at work; ``last`` gets the message with which its process failed.

    Notes of no step are about the run, such as what the steps before it discarded: they are ours to make.
    """
    for line in lines:
        values = json.loads(line)
        if values.keys() == {"failed"}:
            last.append(values["failed"])
            continue
        event = read_event(values)
        if isinstance(event, Progress | Activity | Note) and event.step == step:
            append(event)
