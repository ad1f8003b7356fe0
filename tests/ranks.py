"""Ranks at work held still, so that what a test does meanwhile takes as long as it takes."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from operator_api import until


def torchrun(tree: Iterable[psutil.Process]) -> psutil.Process:
    """The parent of the ranks."""
    [found] = [process for process in tree if "--shutdown-timeout" in " ".join(process.cmdline())]
    return found


@contextmanager
def held(tree: Iterable[psutil.Process]) -> Iterator[list[psutil.Process]]:
    """Hold the ranks among some processes for as long as the block lasts."""
    ranks = torchrun(tree).children()
    assert ranks
    for rank in ranks:
        rank.suspend()
    try:
        yield ranks
    finally:
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.resume()


@contextmanager
def held_until_asked(tree: Iterable[psutil.Process]) -> Iterator[None]:
    """Hold the ranks until they are asked to end: a fast machine would be done before that."""
    with ThreadPoolExecutor(1) as pool, held(tree) as ranks:
        released = pool.submit(release_when_asked, ranks)
        yield
        released.result()


def release_when_asked(ranks: Sequence[psutil.Process]) -> None:
    until(lambda: all(map(is_asked_to_end, ranks)), bool, 120)
    for rank in ranks:
        rank.resume()


def is_asked_to_end(process: psutil.Process) -> bool:
    """Whether a SIGTERM waits for the process to go on."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    pending = [
        int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))
    ]
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in pending)
