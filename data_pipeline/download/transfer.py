"""Common code of fetching, whatever the protocol: trying again, waiting, and taking turns at a host."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TypeVar

from filelock import FileLock, Timeout

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import file_sha256
from data_pipeline.download.sources import Listed

Result = TypeVar("Result")

ATTEMPTS = 5
"""Consecutive attempts that bring nothing new, before a transfer is given up."""
BACKOFF_SECONDS = 0.5
"""Wait before the second attempt; doubled for each that follows."""
LONGEST_BACKOFF_SECONDS = 30.0
LONGEST_WAIT_SECONDS = 300.0
"""The longest wait that a server is granted (``Retry-After``)."""
POLL_SECONDS = 0.1


class Transient(Exception):
    """A fault of the network or the server that may pass, ``after`` so many seconds if the server asks for it."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class Stopped(Exception):
    """Another item of work failed, so this one need not continue."""


@dataclass(frozen=True)
class Fetching:
    """How files are brought here."""

    timeout: float
    """Seconds without an answer or a byte, after which a connection counts as lost."""
    connections: int
    """At most so many at once to one host, of all workers together."""
    turns: Path
    """A folder of lock files for that, which all workers share."""
    stop: Event = field(default_factory=Event)
    """Set when nobody wants the file any more."""


def retried(
    attempt: Callable[[], Result], reached: Callable[[], int] = lambda: 0, stop: Event | None = None
) -> Result:
    """Call ``attempt`` again, after a growing wait, while it raises `Transient`; return what it returns in the end.

    Args:
        reached: how far a transfer is; `ATTEMPTS` in a row that don't get beyond what was reached end it.
        stop: ends the waiting.

    Raises:
        Transient: the last one.
        Stopped: ``stop`` was set.
    """
    fruitless, farthest = 0, reached()
    while True:
        try:
            return attempt()
        except Transient as fault:
            now = reached()
            fruitless = 0 if now > farthest else fruitless + 1
            farthest = max(farthest, now)
            if fruitless == ATTEMPTS:
                raise
            if (stop or Event()).wait(pause(fruitless, fault.after)):
                raise Stopped from fault


def pause(fruitless: int, after: float | None) -> float:
    """Return the seconds to wait: as the server asks, else doubled each time; spread, so that workers come apart."""
    if after is not None:
        return min(after, LONGEST_WAIT_SECONDS) + random.uniform(0, BACKOFF_SECONDS)
    backoff = min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2 ** max(0, fruitless - 1))
    return backoff * random.uniform(0.5, 1)


@contextmanager
def turn(host: str, fetching: Fetching) -> Iterator[None]:
    """Wait until fewer than ``connections`` of all workers are at ``host``, and be one of them for a while.

    Turns are locks of the operating system, so those of a killed worker are free again.

    Raises:
        Stopped: while waiting.
    """
    fetching.turns.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^A-Za-z0-9.-]", "_", host)
    while True:
        for number in random.sample(range(fetching.connections), fetching.connections):
            lock = FileLock(fetching.turns / f"{stem}-{number}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                yield
            finally:
                lock.release()
            return
        if fetching.stop.wait(POLL_SECONDS * random.uniform(0.5, 1)):
            raise Stopped


def size_of(path: Path) -> int:
    """Return the bytes that are here."""
    return path.stat().st_size if path.exists() else 0


class Mismatch(UserError):
    """Content that came and is not what was listed."""


def check(listed: Listed, path: Path) -> None:
    """Make sure that what was fetched has the size and the hash (if known) that were listed; else remove it.

    Raises:
        Mismatch: it has not.
    """
    size = path.stat().st_size
    if listed.size and size != listed.size:
        path.unlink()
        raise Mismatch(f"{listed.name}: {size} bytes came, {listed.size} were announced; run again")
    kind, _, expected = listed.version.partition(":")
    if kind == "sha256":
        found = file_sha256(path)
        if found != expected:
            path.unlink()
            raise Mismatch(f"{listed.name}: its sha256 is {found}, the recipe expects {expected}")


def wait_until(moment: float) -> float:
    """Return the seconds from now to ``moment`` (of `time.time`), not below 0."""
    return max(0.0, moment - time.time())
