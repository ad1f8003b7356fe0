"""Who uses which artifact: a run holds all that its plan names, so that `llmill gc` leaves them alone.

A use is a shared lock on a file beside the artifact, which the system frees when its holder dies; whoever takes it
writes to the file, so that its time is that of the last use. Who wants to remove or to replace an artifact takes the
lock for himself alone, and, before a removal, looks at that time once more. A run takes its locks when it has made its
plan, and then looks whether what it wants to reuse is still there.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flows.engine.store import Store, lock_mode


class Uses:
    """The artifacts that this process uses, until `release`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._files: dict[Path, int] = {}

    def take(self, stage: str, fingerprint: str) -> None:
        """Use an artifact from now on, whether it is there yet or not; waits while another process removes it."""
        path = use_path(self.store, stage, fingerprint)
        if path not in self._files:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = None
            while file is None:
                file = lock_file(path, fcntl.LOCK_SH)
            with suppress(OSError):  # a full disk: it is held all the same
                os.pwrite(file, b"used\n", 0)
            self._files[path] = file

    @contextmanager
    def alone(self, stage: str, fingerprint: str, wait: Callable[[], None]) -> Iterator[None]:
        """Keep others from using an artifact that we use; ``wait`` is called where some do, and have to end first."""
        file = self._files[use_path(self.store, stage, fingerprint)]
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_SH)

    @contextmanager
    def apart(self, stage: str, fingerprint: str) -> Iterator[None]:
        """Use an artifact not for as long as the block lasts: whoever is building it may replace it."""
        file = self._files[use_path(self.store, stage, fingerprint)]
        fcntl.flock(file, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_SH)

    def others(self, stage: str, fingerprint: str) -> bool:
        """Whether another process uses an artifact that we use."""
        file = self._files[use_path(self.store, stage, fingerprint)]
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            fcntl.flock(file, fcntl.LOCK_SH)
        return False

    def release(self) -> None:
        """Use nothing any more."""
        for file in self._files.values():
            fcntl.flock(file, fcntl.LOCK_UN)  # also for children that inherited the file
            os.close(file)
        self._files.clear()


def recover(store: Store) -> None:
    """Bring to its end what a kill came to while an artifact got its name, unless somebody is at it."""
    for stage, fingerprint in store.interrupted():
        lock = store.lock(stage, fingerprint)
        with suppress(TimeoutError), lock.acquire(timeout=0), alone(store, stage, fingerprint) as free:
            if free:
                store.finish(stage, fingerprint)


def use_path(store: Store, stage: str, fingerprint: str) -> Path:
    return store.root / stage / f".{fingerprint}.use"


def last_used(store: Store, stage: str, fingerprint: str) -> int:
    """When a run last took an artifact into use, in nanoseconds since 1970; 0 where none did."""
    try:
        file = use_path(store, stage, fingerprint).stat()
    except FileNotFoundError:
        return 0
    return file.st_mtime_ns if file.st_size else 0  # an empty one was made by who wanted it alone


@contextmanager
def alone(store: Store, stage: str, fingerprint: str) -> Iterator[bool]:
    """Keep all runs from using an artifact for as long as the block lasts, if none does, which is yielded."""
    path = use_path(store, stage, fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = lock_file(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file = None
    try:
        yield file is not None
    finally:
        if file is not None:
            os.close(file)


def lock_file(path: Path, how: int) -> int | None:
    """A descriptor of a locked file; None where the file was removed before we had the lock, which then guards nothing.

    Raises:
        BlockingIOError: ``how`` says not to wait, and another process holds it.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with suppress(PermissionError):  # another user made it
            os.fchmod(file, lock_mode(path))
    except PermissionError:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # locks all the same
    try:
        fcntl.flock(file, how)
        if os.fstat(file).st_nlink:
            return file
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None
