"""Files: written atomically, checksummed, made durable."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``, renamed to it when the block ends well, removed when it does not.

    So whatever has its final name is whole, after a power cut too, and a stage that starts again may skip it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of our own: an orphan of a killed run may still be writing the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path, fsync: bool = False) -> str:
    """SHA-256 of a file's content, in hex; with ``fsync``, the file is on disk when this returns."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if fsync:
            os.fsync(file.fileno())
    return digest


def write_durably(path: Path, text: str) -> None:
    """Write a file so that after a power cut it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync(path.parent)


def append_durably(file: int, data: bytes) -> None:
    """Add to the end of a file that is open to append to: all is on disk when this returns, or nothing is there."""
    size = os.fstat(file).st_size
    try:
        if os.write(file, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file)
    except OSError:
        os.ftruncate(file, size)
        raise


def append_line(path: Path, line: str) -> None:
    """Add a line to a file that several processes may add to; it is on disk when this returns.

    What a kill left of another's line becomes a line of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        size = os.fstat(file).st_size
        torn = size and os.pread(file, 1, size - 1) != b"\n"
        append_durably(file, b"\n" * bool(torn) + line.encode() + b"\n")
    finally:
        os.close(file)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def once(marker: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON object that ``work`` returns, kept in ``marker`` so that a stage that starts again skips it.

    The marker is written last: where it is, the files that ``work`` writes are whole.
    """
    if marker.exists():
        kept: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
        return kept
    result = work()
    with atomic_path(marker) as temporary:
        temporary.write_text(json.dumps(result, allow_nan=False), encoding="utf-8")
    return result
