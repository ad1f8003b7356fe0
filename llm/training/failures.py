"""How a rank fails: one job at a time on a folder, and what went wrong left where the launcher looks, with
what to do where a person can do something.
"""

from __future__ import annotations

import errno
import fcntl
import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from data_pipeline.core.errors import UserError

LOCK_SECONDS = 60
"""How long to wait for the ranks of a killed run to be gone: they notice within a second."""

DISK_FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed", "unexpected pos")
"""Messages on a full disk of libraries that raise no OSError: safetensors, and torch's writer of archives."""


TIMED_OUT = (
    "Timed out waiting",
    "Application timeout caused",
    "Watchdog caught collective operation timeout",
)
"""Messages of libraries on a rank that does not answer: gloo (twice), and NCCL."""


class Interrupted(Exception):
    """A signal asked the training to stop; the message has the step."""


@contextmanager
def only_trainer(scratch: Path) -> Iterator[None]:
    """Hold the lock that one training job at a time has on a folder.

    Raises:
        RuntimeError: another job still held it after `LOCK_SECONDS`.
    """
    with open(scratch / "trainer.lock", "w", encoding="utf-8") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"another training job holds {file.name}") from None
                time.sleep(0.2)
        yield


def report_failure(error: Exception, folder: Path) -> None:
    """Leave what went wrong where the launcher looks, unless another rank was first."""
    if no_room(error):
        error = UserError(f"the disk of {folder.parent} is full: make room and run again")
    elif isinstance(error, torch.OutOfMemoryError):
        error = UserError("the GPU's memory does not hold a micro-batch: lower pretrain.runtime.micro_batch")
    unanswered = timed_out(error)
    if unanswered:
        error = RuntimeError(
            "another rank did not answer within pretrain.runtime.collective_timeout_seconds: it hangs, or its "
            f"machine is gone; run it again to resume from what is saved ({str(error)[:200]})"
        )
    kind = (
        "interrupted"
        if isinstance(error, Interrupted)
        else "user"
        if isinstance(error, UserError)
        else "timeout"
        if unanswered
        else "fault"
    )
    message = str(error) if kind in ("interrupted", "user") else f"{type(error).__name__}: {error}"
    with suppress(OSError), open(folder / "error.json", "x", encoding="utf-8") as file:
        json.dump({"kind": kind, "message": message}, file, allow_nan=False)
    if kind in ("timeout", "fault"):
        traceback.print_exception(error)


def timed_out(error: Exception) -> bool:
    """Return whether an error is of a collective that was not answered in time, as gloo or NCCL put it."""
    return any(words in str(error) for words in TIMED_OUT)


def no_room(error: Exception) -> bool:
    """Return whether an error is of a full disk."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(words in str(error) for words in DISK_FULL)
