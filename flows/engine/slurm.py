"""Ranks that a job of Slurm starts in place of this machine: submitted, followed, cancelled with us, and found again.

The job runs `flows.engine.slurm_job`. Its number lies beside the training's ``job.json``: a run that was killed leaves
the job at work, and the next run of the same plan follows it. All machines see the home under one path.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import write_durably
from data_pipeline.core.text import last_lines
from flows.engine import launch
from flows.engine.stopping import STOP_SECONDS, asked
from llm.machine.slurm import SlurmJob

STATE = "slurm.json"
FORGOTTEN = "FORGOTTEN"
"""Our word for a job that Slurm, which answers, does not know."""
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
}
ENDED |= {"TIMEOUT", FORGOTTEN}
WAITING = {
    "CONFIGURING",
    "PENDING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESV_DEL_HOLD",
    "SPECIAL_EXIT",
}
ENDING_POLL_SECONDS = 1.0
"""Between questions while a job ends."""
KILL_SECONDS = 40
"""Slurm's KillWait, 30 by default, and some more."""


@dataclass(frozen=True)
class Standing:
    """The standing of a job, as Slurm reports it."""

    state: str
    reason: str = ""
    machines: str = ""

    def __str__(self) -> str:
        why = self.reason if self.state in WAITING and self.reason not in ("", "None") else ""
        return " ".join(part for part in (self.state, f"({why})" if why else "", self.machines) if part)


def run(
    job: Path,
    wanted: SlurmJob,
    *,
    logs: Path,
    grace_seconds: float,
    while_running: Callable[[], None],
    note: Callable[[str], None],
) -> None:
    """Have a job of Slurm train what ``job`` describes, and wait for its end.

    ``while_running`` is called about five times a second meanwhile and must not raise. When we are to end, the job
    gets ``grace_seconds`` to save.

    Raises:
        UserError: Slurm refuses the job, or a rank ended with a user's mistake.
        Interrupted: it was asked to stop by others than us, and is not queued again.
        RuntimeError: it failed; the message holds the end of its log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    number = at_work(job.parent)
    if number:
        note(f"Slurm job {number} trains already: this run follows it")
    else:
        (logs / "error.json").unlink(missing_ok=True)
        number = submit(job, wanted, logs)
        remember(job.parent, number)
    launch.save_asked.clear()
    try:
        standing = follow(number, wanted.poll_seconds, while_running, note)
    except BaseException:
        cancel(job.parent, number, grace_seconds + launch.MARGIN_SECONDS)
        raise
    if standing.state != "COMPLETED":
        launch.raise_failure(f"Slurm job {number} ended as {standing.state}", logs)


def at_work(folder: Path) -> str:
    """The number of the job that an earlier run submitted and that has not ended; empty where there is none."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    if has_ended(state["number"]):
        return ""
    if state["cancelled"]:
        end(state["number"])
        return ""
    return str(state["number"])


def remember(folder: Path, number: str, *, cancelled: bool = False) -> None:
    write_durably(folder / STATE, json.dumps({"number": number, "cancelled": cancelled}, allow_nan=False))


def is_cancelled(folder: Path) -> bool:
    """Whether a run has cancelled its job, which must then not be queued again."""
    return bool(json.loads((folder / STATE).read_text(encoding="utf-8"))["cancelled"])


def submit(job: Path, wanted: SlurmJob, logs: Path) -> str:
    """The number of a new job.

    Raises:
        UserError: sbatch is not there, or refuses the job.
    """
    script = job.parent / "slurm.sh"
    command = shlex.join([sys.executable, "-m", "flows.engine.slurm_job", str(job.resolve())])
    lines = ["#!/bin/bash", *wanted.setup, f"exec {command}"]
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    where = ["--job-name=llmill", f"--output={logs.resolve() / 'slurm.log'}", "--open-mode=append"]
    done = ask("sbatch", "--parsable", *wanted.arguments(), *where, str(script.resolve()))
    if done.returncode:
        raise UserError(f"pretrain.runtime.slurm: sbatch refuses the job: {last_lines(done.stderr, 3)}")
    return done.stdout.strip().partition(";")[0]


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm's."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"pretrain.runtime.launcher is slurm, but {command[0]} is not installed here:\n"
            "run where jobs are submitted, or set it to local"
        ) from None


def standing_of(number: str) -> Standing | None:
    """Ask Slurm for the standing of a job now; None where it does not answer."""
    found = ask("squeue", f"--jobs={number}", "--states=all", "--noheader", "--format=%T|%r|%N")
    if not found.returncode and found.stdout.strip():
        return Standing(*found.stdout.splitlines()[-1].strip().split("|"))
    kept = ask("sacct", f"--jobs={number}", "--allocations", "--noheader", "--parsable2", "--format=State")
    if not kept.returncode and kept.stdout.strip():
        return Standing(kept.stdout.splitlines()[-1].split()[0])
    return None if ask("scontrol", "ping").returncode else Standing(FORGOTTEN)


def has_ended(number: str) -> bool:
    """Whether nothing of a job is at work or will be.

    Raises:
        UserError: Slurm does not answer.
    """
    standing = standing_of(number)
    if not standing:
        raise UserError(f"Slurm does not answer, and job {number} may be training: try again when it does")
    return standing.state in ENDED


def follow(
    number: str, poll_seconds: float, while_running: Callable[[], None], note: Callable[[str], None]
) -> Standing:
    """Wait until a job has ended: until Slurm has reported so twice, for a job that is queued again may seem to end."""
    last = Standing("")
    due = 0.0
    while True:
        if time.monotonic() >= due:
            due = time.monotonic() + poll_seconds
            now = standing_of(number)
            if now and now.state in ENDED and now.state in (last.state, "COMPLETED"):
                return now
            if now and now != last:
                if now.state not in ENDED:
                    note(f"Slurm job {number}: {now}")
                last = now
        if launch.save_asked.is_set():
            launch.save_asked.clear()
            ask("scancel", "--batch", "--signal=USR1", number)
        while_running()
        time.sleep(min(0.2, poll_seconds))


def cancel(folder: Path, number: str, seconds: float) -> None:
    """Have a job save and end within ``seconds``; when it has not, or we are interrupted again, end it for good."""
    asked.allow(seconds + STOP_SECONDS)
    remember(folder, number, cancelled=True)
    try:
        standing = standing_of(number)
        if standing and standing.state not in WAITING:
            ask("scancel", "--batch", "--signal=TERM", number)
            wait_for_end(number, seconds)
    finally:
        ask("scancel", number)


def end(number: str) -> None:
    """See that a job which was cancelled is gone.

    Raises:
        RuntimeError: it is not.
    """
    ask("scancel", number)
    if not wait_for_end(number, KILL_SECONDS):
        raise RuntimeError(f"Slurm job {number} was cancelled and has not ended: try again later")


def wait_for_end(number: str, seconds: float) -> bool:
    """Whether a job ends within ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        standing = standing_of(number)
        if standing and standing.state in ENDED:
            return True
        time.sleep(ENDING_POLL_SECONDS)
    return False
