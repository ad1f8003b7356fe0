"""Processes: pools of them, their ends, and the cores that they may use."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of fresh processes that end by themselves when the process that made them is killed.

    ``forkserver``, because forking a process that runs threads (Prefect, Arrow, torch) can deadlock.
    """
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["data_pipeline.preload"])
    pool = ProcessPoolExecutor(workers, forking, initializer=start_worker, initargs=(os.getpid(),))
    try:
        yield pool
    except BaseException:
        kill_workers(pool)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def compute_apart(fn: Callable[..., Result], *arguments: Any) -> Result:
    """Call a module-level function in a process of its own, which ends at once when this one is interrupted.

    For native code that takes long: Python heeds a signal only when such code returns.
    """
    with process_pool(1) as pool:
        return pool.submit(fn, *arguments).result()


def kill_workers(pool: ProcessPoolExecutor) -> None:
    """End what a pool computes at once: what was being written has a temporary name."""
    for process in list(pool._processes.values()):
        process.kill()


def start_worker(parent: int) -> None:
    """Leave Ctrl-C to ``parent``, and end when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)


def die_with(parent: int, poll_seconds: float = 0.5) -> None:
    """End this process, from a daemon thread, soon after process ``parent`` has ended.

    Works where the parent of this process is not ``parent`` itself (a fork server, torchrun's agent).
    """

    def watch() -> None:
        wait_for_end(parent, poll_seconds)
        os._exit(1)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()


def wait_for_end(pid: int, poll_seconds: float) -> None:
    """Return when process ``pid`` has ended, even if nobody has collected it yet (a zombie)."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # not Linux, or an old one
        while is_there(pid):
            time.sleep(poll_seconds)
        return
    select.select([descriptor], [], [])
    os.close(descriptor)


def is_there(pid: int) -> bool:
    """Return whether a process of this number exists, be it a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # someone else's
    return True


def has_ended(pid: int) -> bool:
    """Return whether process ``pid`` has ended, even if nobody has collected it yet (where the system shows it)."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except (AttributeError, OSError):  # not Linux, or an old one
        return not is_there(pid)
    ended, _, _ = select.select([descriptor], [], [], 0)
    os.close(descriptor)
    return bool(ended)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
