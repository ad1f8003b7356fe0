"""How the ranks of a training job are started, asked to save, and ended: as processes of this machine and of those
that share the work (`llm.machine.nodes`), through torchrun."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil

from data_pipeline.core.errors import UserError
from data_pipeline.core.text import last_lines
from flows.engine.stopping import STOP_SECONDS, Stop, asked
from llm.machine.environment import rank_environment
from llm.machine.nodes import Nodes, nodes_for

TORCHRUN = """
import json, os, pathlib, signal, socket
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until a rank listens, and in torchrun, it would be the end
try:
    main()
except ChildFailedError as failed:
    codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
    file = pathlib.Path(os.environ["LLMILL_LOGS"], f"ended-{socket.gethostname()}.json")
    file.write_text(json.dumps(codes, allow_nan=False))
    raise
"""
ENDED = "ended-*.json"
"""Files that each machine's torchrun leaves beside the log: rank -> exit code, of those that failed first."""
MARGIN_SECONDS = 5
"""Seconds that torchrun gets to end itself, after those that its ranks get."""

save_asked = threading.Event()
"""Set it to have the ranks that `local` runs write a checkpoint and continue."""


class Interrupted(Stop):
    """The ranks were asked to stop by others than us, and ended as they should; the message says where."""


def local(
    module: str,
    job: Path,
    ranks: int,
    *,
    logs: Path,
    grace_seconds: float = 30,
    while_running: Callable[[], None] | None = None,
    nodes: Nodes | None = None,
) -> None:
    """Run ``python -m module job`` as ``ranks`` processes under torchrun, here or on ``nodes``, and wait for their end.

    ``while_running`` is called about five times a second meanwhile and must not raise. The ranks' output goes
    to ``logs/ranks.log``. A rank that fails leaves ``logs/error.json`` ({"kind": "user", "interrupted", "timeout" or
    "fault", "message": str}). Ranks that are to end get SIGTERM, and ``grace_seconds`` later SIGKILL.

    Raises:
        UserError: a rank ended with a user's mistake.
        Interrupted: the ranks got a SIGTERM that was not ours.
        RuntimeError: a rank failed; the message holds the end of the log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for left in (logs / "error.json", *logs.glob(ENDED)):
        left.unlink(missing_ok=True)
    save_asked.clear()
    nodes = nodes or nodes_for(ranks)
    with open(logs / "ranks.log", "ab") as log:
        process = subprocess.Popen(
            nodes.everywhere(torchrun(nodes, module, job, ranks, grace_seconds)),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(ranks // nodes.count, logs),
            start_new_session=True,  # Ctrl-C reaches us; we end the ranks ourselves
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    if save_asked.is_set():
                        save_asked.clear()
                        signal_ranks(nodes, process, signal.SIGUSR1)
                    if while_running:
                        while_running()
        except BaseException:
            stop(nodes, process, grace_seconds + MARGIN_SECONDS)
            raise
    if code:
        raise_failure(f"the ranks ended with exit code {code}", logs)


def raise_failure(what: str, logs: Path) -> NoReturn:
    """Raise what ranks that did not end well left in ``logs``; ``what`` where they left nothing.

    Of one that a signal ended, the others only know that its connections are closed. One that hangs is ended by
    torchrun, after another has waited for it in vain: that is a "timeout", whatever signal ended it.
    """
    failure, killed = read_failure(logs / "error.json"), killed_ranks(logs)
    if killed and (not failure or failure[0] == "fault"):
        raise RuntimeError(f"{killed}\n(full log: {logs / 'ranks.log'})")
    if failure:
        kind, message = failure
        if kind == "interrupted":
            raise Interrupted(message)
        raise (
            UserError(message)
            if kind == "user"
            else RuntimeError(f"{message}\n(full log: {logs / 'ranks.log'})")
        )
    log = next(
        (logs / name for name in ("ranks.log", "slurm.log") if (logs / name).exists()), logs / "ranks.log"
    )
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else "(there is none)"
    raise RuntimeError(f"{what}; the end of {log}:\n{last_lines(text)}")


def join(module: str, job: Path, ranks: int) -> int:
    """Run this machine's part of ranks that `local` starts on another one; torchrun's exit code.

    `llm.machine.nodes` documents what the environment must hold, here as there.

    Raises:
        UserError: it names one machine only.
    """
    nodes = nodes_for(ranks)
    if nodes.started_by != "hand":
        raise UserError(
            "there is nothing to join: set LLMILL_NODES and LLMILL_ENDPOINT as on the first machine"
        )
    command = torchrun(nodes, module, job, ranks, grace_seconds=30)
    logs = job.parents[1] / "logs"
    logs.mkdir(exist_ok=True)
    return subprocess.run(command, env=environment(ranks // nodes.count, logs), check=False).returncode


def torchrun(nodes: Nodes, module: str, job: Path, ranks: int, grace_seconds: float) -> list[str]:
    """The command that starts one machine's part of ``ranks`` ranks."""
    command = [sys.executable, "-c", TORCHRUN, *nodes.rendezvous(ranks)]
    return [*command, f"--shutdown-timeout={math.ceil(grace_seconds)}", "-m", module, str(job)]


def environment(ranks_here: int, logs: Path) -> dict[str, str]:
    """Return the environment of ranks: ours, with what pays where it does not say otherwise."""
    return {
        **rank_environment(ranks_here),
        **os.environ,
        "LLMILL_LOGS": str(logs.resolve()),
        "LLMILL_PARENT": str(os.getpid()),
        "LLMILL_PARENT_HOST": socket.gethostname(),
    }


def killed_ranks(logs: Path) -> str:
    """Which ranks a signal ended, in words; empty where none."""
    codes: dict[str, int] = {}
    for file in logs.glob(ENDED):
        with suppress(OSError, ValueError):
            codes |= json.loads(file.read_text(encoding="utf-8"))
    signals = {int(rank): -code for rank, code in codes.items() if code < 0}
    if not signals:
        return ""
    ended = ", ".join(f"rank {rank} was ended by {name_of(signals[rank])}" for rank in sorted(signals))
    memory = signal.SIGKILL in signals.values()
    hint = "; the system does that when memory runs out: see `dmesg`" if memory else ""
    return f"{ended}, which nobody here sent{hint}; the next run resumes from what is saved"


def name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def read_failure(path: Path) -> tuple[str, str] | None:
    """(kind, message) as a rank left it; None where it could not, or not all of it."""
    try:
        failure = json.loads(path.read_text(encoding="utf-8"))
        return str(failure["kind"]), str(failure["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def signal_ranks(nodes: Nodes, process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to the ranks of a torchrun, or of all that an srun has started."""
    if nodes.started_by == "srun":
        signal_steps(number)
        return
    with suppress(psutil.NoSuchProcess):  # it may just have ended
        for rank in psutil.Process(process.pid).children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)


def signal_steps(number: signal.Signals) -> None:
    """Send a signal to what srun has started on the machines of our job; srun itself would kill it all on SIGTERM."""
    command = ["scancel", f"--signal={number.name.removeprefix('SIG')}", os.environ["SLURM_JOB_ID"]]
    subprocess.run(command, capture_output=True, check=False)


def stop(nodes: Nodes, process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """End torchrun and its ranks: politely first, then for good; at once when we are interrupted again.

    Not torchrun alone is waited for: asked twice to end (by a scheduler too) it goes before its ranks have saved.
    """
    asked.allow(grace_seconds + STOP_SECONDS)
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):  # it may just have ended
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    if nodes.started_by == "srun":
        signal_steps(signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM)
    try:
        psutil.wait_procs(family, grace_seconds)
    finally:
        if nodes.started_by == "srun" and process.poll() is None:
            signal_steps(signal.SIGKILL)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
