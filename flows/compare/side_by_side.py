"""Runs of a sweep side by side, each in a process of its own.

What the run is comes on the process's standard input, what it shows leaves on standard error, and what came of it on
standard output, as JSON. It ends when its standard input does, so that it does not outlive the sweep.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import IO, Any

from data_pipeline.core.errors import UserError
from flows.compare.member_run import MemberRun, NoVerdict, carry_out
from flows.compare.members import Ended
from flows.engine import launch
from flows.engine.course import StageFailed
from flows.engine.launch import MARGIN_SECONDS
from flows.engine.order import Wishes
from flows.engine.process import begin_part
from flows.engine.stopping import Stop
from flows.listeners.terminal import Screen, Terminal, TerminalListener
from flows.recipe import Recipe, build_recipe
from llm.machine.gpus import gpus

POLL_SECONDS = 0.2
MARGIN = 5
"""Columns before a line, which say whose it is."""
CarryOut = Callable[[MemberRun, Recipe], str]
"""Carries out a run of a recipe, and returns the key by which it is found in MLflow."""
FAILURES = {"no verdict": NoVerdict, "mistake": UserError, "failed": StageFailed}
"""The word of a process for how it failed, and the error that is raised here."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The input of the process."""

    run: MemberRun
    recipe: dict[str, Any]
    """As a file would say it."""


def shares(jobs: int) -> list[dict[str, str]]:
    """Share the GPUs and cores out among ``jobs`` processes: variables of each one's environment.

    Raises:
        UserError: there are GPUs, but not one for each.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    if not (count := gpus()):
        return [threads] * jobs
    if count < jobs:
        raise UserError(f"--jobs {jobs}: each needs a GPU of its own, and this machine has {count}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",")[:count] if visible else [str(device) for device in range(count)]
    each = count // jobs
    return [threads | {"CUDA_VISIBLE_DEVICES": ",".join(devices[each * job :][:each])} for job in range(jobs)]


def side_by_side(
    work: Sequence[Callable[[CarryOut], Ended]],
    environments: Sequence[Mapping[str, str]],
    show: Callable[[int, str], None],
) -> Generator[Ended]:
    """Yield what pieces of ``work`` return, as they end; as many are at work as there are ``environments``.

    Each is given what carries a run out in a process of one of these environments; ``show`` gets the number of the
    piece, from 1, and a line that the process prints. Where this is closed before its end, those at work are asked to
    stop, and waited for.
    """
    wishes = Wishes()
    free: SimpleQueue[Mapping[str, str]] = SimpleQueue()
    for environment in environments:
        free.put(environment)

    def do(number: int, piece: Callable[[CarryOut], Ended]) -> Ended:
        environment = free.get()
        try:
            if wishes.stop.is_set():
                raise Stop("stopped")
            apart = partial(
                run_apart,
                wishes=wishes,
                show=partial(show, number),
                environment=environment,
                jobs=len(environments),
            )
            return piece(apart)
        finally:
            free.put(environment)

    with ThreadPoolExecutor(len(environments), thread_name_prefix="member") as threads:
        try:
            waiting = {threads.submit(do, *one) for one in enumerate(work, 1)}
            while waiting:
                done, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                if launch.save_asked.is_set():
                    launch.save_asked.clear()
                    wishes.saves += 1
                yield from (future.result() for future in done)
        finally:
            wishes.stop.set()


def run_apart(
    run: MemberRun,
    recipe: Recipe,
    *,
    wishes: Wishes,
    show: Callable[[str], None],
    environment: Mapping[str, str],
    jobs: int,
) -> str:
    """Have another process carry a run out, and wait for its end; ``show`` gets its lines.

    Returns:
        The key by which the run is found in MLflow.

    Raises:
        NoVerdict: the sweep could not show anything when all of it was trained.
        UserError: by a person's mistake, it could not be carried out.
        StageFailed: it failed.
        Stop: it was stopped, because we are.
    """
    from flows.prefect.alongside import follow, written

    process = subprocess.Popen(
        [sys.executable, "-m", "flows.compare.side_by_side"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": str(shutil.get_terminal_size().columns - MARGIN), **environment},
        start_new_session=True,  # Ctrl-C reaches us, and we ask it to stop
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    pickle.dump(Job(run=run, recipe=written(recipe, jobs)), process.stdin)
    process.stdin.flush()
    reading = threading.Thread(target=relay, args=(process.stderr, show), daemon=True)
    reading.start()
    grace = max((getattr(step.config.runtime, "grace_seconds", 0) for step in recipe.steps), default=0)
    code, stopped = follow(process, wishes, grace + MARGIN_SECONDS)
    reading.join()
    process.stdin.close()
    found = json.loads(process.stdout.read() or "{}")  # one line, for which a pipe has room
    if "key" in found and code == 0:
        return str(found["key"])
    if stopped:
        raise Stop("stopped")
    for name, kind in FAILURES.items():
        if name in found:
            raise kind(found[name])
    raise StageFailed(f"its process ended with code {code}")


def relay(lines: IO[bytes], show: Callable[[str], None]) -> None:
    """Show what a process prints."""
    for line in lines:
        show(line.decode("utf-8", "replace").rstrip("\n"))


def main() -> None:
    """Carry out the run that comes on standard input."""
    job: Job
    job, reports = begin_part()
    told: dict[str, str] = {}
    code = 0
    try:
        listener = TerminalListener(Terminal(Screen(stderr=True)))
        told = {"key": carry_out(job.run, build_recipe(job.recipe), listener)}
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        kind = next((name for name, kind in FAILURES.items() if isinstance(error, kind)), "failed")
        told, code = {kind: str(error) or type(error).__name__}, 1
    reports.write(json.dumps(told, allow_nan=False))
    reports.flush()
    sys.exit(code)


if __name__ == "__main__":
    main()
