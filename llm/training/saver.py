"""Checkpoints written during training: the loop waits for a copy of the state in host memory only, and a thread
writes, syncs and checks it. There is never more than one in flight, and a write that fails ends the training at its
next step. The threads of the ranks meet through the folder alone, so that no collective of theirs comes between
those of the loop.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llm.training import checkpoint


@dataclass(frozen=True)
class Saved:
    """Report of rank 0 on a checkpoint that is whole."""

    step: int
    seconds: float
    """From the start of its copy to its final name."""
    bytes: int


class Saver:
    """One rank's writer of checkpoints."""

    def __init__(
        self, root: Path, *, rank: int, setup: checkpoint.Setup, kept: Mapping[str, Any], patience: float
    ) -> None:
        """Args: ``kept``: see `checkpoint.prune`; ``patience``: seconds that ranks may be apart."""
        self.root, self.rank, self.setup = root, rank, setup
        self.kept, self.patience = kept, patience
        self._pool = ThreadPoolExecutor(1, "checkpoint", initializer=give_way)
        self._writing: Future[Saved | None] | None = None

    def start(self, step: int, slices: dict[str, Tensor], history: Any, since: float) -> None:
        """Write this rank's shard of a checkpoint that was begun, and on rank 0 seal it; `wait` must come before."""
        assert self._writing is None
        self._writing = self._pool.submit(self._write, step, slices, history, since)

    def poll(self) -> Saved | None:
        """Return what was completed since the last call, on rank 0; raise what a write failed with."""
        return self.wait() if self._writing and self._writing.done() else None

    def wait(self) -> Saved | None:
        """`poll`, when the write in flight has ended."""
        if self._writing is None:
            return None
        writing, self._writing = self._writing, None
        return writing.result()

    def _write(self, step: int, slices: dict[str, Tensor], history: Any, since: float) -> Saved | None:
        folder = checkpoint.unfinished(self.root, step)
        checkpoint.write_shard(folder, self.rank, slices)
        if self.rank != 0:
            return None
        checkpoint.await_shards(folder, self.setup.ranks, self.patience)
        size = checkpoint.commit(folder, step=step, setup=self.setup, history=history)
        checkpoint.prune(self.root, **self.kept)
        return Saved(step, time.perf_counter() - since, size)


def give_way() -> None:
    """Let this thread have what the training leaves of the processors."""
    with suppress(OSError, AttributeError):  # where a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
