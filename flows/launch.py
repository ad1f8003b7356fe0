"""How the ranks of a training job are started: as processes of this machine and of those that share the work
(`llm.nodes`), through torchrun."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from data_pipeline.context import UserError, last_lines
from llm.environment import rank_environment
from llm.nodes import Nodes, nodes_for


def local(
    module: str, job: Path, ranks: int, *, logs: Path, while_running: Callable[[], None] | None = None
) -> None:
    """Run ``python -m module job`` as ``ranks`` local processes under torchrun and wait for their end.

    ``while_running`` is called about five times a second meanwhile and must not raise. The ranks' output goes
    to ``logs/ranks.log``. A rank that fails leaves ``logs/error.json`` ({"user": bool, "message": str}).

    Raises:
        UserError: a rank ended with a user's mistake.
        RuntimeError: a rank failed; the message holds the end of the log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    error = logs / "error.json"
    error.unlink(missing_ok=True)
    nodes = nodes_for(ranks)
    with open(logs / "ranks.log", "ab") as log:
        process = subprocess.Popen(
            nodes.everywhere(torchrun(nodes, module, job, ranks)),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(ranks // nodes.count),
            start_new_session=True,  # Ctrl-C reaches us; we end the ranks ourselves
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    if while_running:
                        while_running()
        except BaseException:
            stop(process)
            raise
    if code == 0:
        return
    if failure := read_failure(error):
        user, message = failure
        raise UserError(message) if user else RuntimeError(f"{message}\n(full log: {logs / 'ranks.log'})")
    tail = last_lines((logs / "ranks.log").read_text(encoding="utf-8", errors="replace"))
    raise RuntimeError(f"the ranks ended with exit code {code}; the end of {logs / 'ranks.log'}:\n{tail}")


def join(module: str, job: Path, ranks: int) -> int:
    """Run this machine's part of ranks that `local` starts on another one; torchrun's exit code.

    `llm.nodes` says what the environment must tell, here as there.

    Raises:
        UserError: it tells of one machine only.
    """
    nodes = nodes_for(ranks)
    if nodes.started_by != "hand":
        raise UserError(
            "there is nothing to join: set LLMILL_NODES and LLMILL_ENDPOINT as on the first machine"
        )
    command = torchrun(nodes, module, job, ranks)
    return subprocess.run(command, env=environment(ranks // nodes.count), check=False).returncode


def torchrun(nodes: Nodes, module: str, job: Path, ranks: int) -> list[str]:
    """The command that starts one machine's part of ``ranks`` ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", *nodes.rendezvous(ranks)]
    return [*command, "-m", module, str(job)]


def environment(ranks_here: int) -> dict[str, str]:
    """What ranks find in theirs: ours, with what pays where it does not say otherwise."""
    return {
        **rank_environment(ranks_here),
        **os.environ,
        "LLMILL_PARENT": str(os.getpid()),
        "LLMILL_PARENT_HOST": socket.gethostname(),
    }


def read_failure(path: Path) -> tuple[bool, str] | None:
    """(whether it is a user's mistake, message) as a rank left it; None where it could not, or not all of it."""
    try:
        failure = json.loads(path.read_text(encoding="utf-8"))
        return bool(failure["user"]), str(failure["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stop(process: subprocess.Popen[bytes], grace_seconds: float = 10) -> None:
    """End torchrun and its ranks: politely first, then for good."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):  # it may just have ended
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace_seconds)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
