"""Files: written atomically, checksummed, made durable."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, renamed to it when the block ends well, removed when it does not.

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


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as ``.npy``."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def once(marker: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON object that ``work`` returns, kept in ``marker`` so that a stage that starts again skips it.

    The marker is written last: where it is, the files that ``work`` writes are whole.
    """
    if marker.exists():
        kept: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
        return kept
    result = work()
    with atomic_path(marker) as temporary:
        temporary.write_text(json.dumps(result, allow_nan=False), encoding="utf-8")
    return result
