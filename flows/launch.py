"""How the ranks of a training job are started: as processes of this machine, through torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from data_pipeline.context import UserError, cores, last_lines

ALLOCATOR = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296"
"""Keep freed memory: a step frees and takes the same large tensors again, and fresh pages cost a fifth of it."""


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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores() // ranks)),
        "GLIBC_TUNABLES": ALLOCATOR,
        **os.environ,
        "LLMILL_PARENT": str(os.getpid()),
    }
    with open(logs / "ranks.log", "ab") as log:
        process = subprocess.Popen(
            [*command, "-m", module, str(job)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
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
