"""The keys by which a run and its steps are known, in MLflow too: what a killed run had begun is continued, not begun
again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from data_pipeline.core.files import write_durably
from flows.engine.events import milliseconds
from flows.engine.log import runs
from flows.engine.plan import Step
from flows.engine.store import shared_lock
from flows.recipe import Recipe


@dataclass(frozen=True)
class Known:
    """A run, or the run of a step."""

    key: str
    new: bool
    """Whether nobody knows the key yet."""
    name: str = ""
    """The name that it has had until now."""
    begun: int = 0
    """When it began, in milliseconds since 1970."""


class Continuation:
    """The work to be continued, in ``<home>/runs``: a file for each run of a plan and each step that is not ended."""

    def __init__(self, home: Path) -> None:
        self._folder = runs(home)
        self._file: Path | None = None
        self._lock: FileLock | None = None

    def claim(self, plan: str, name: str) -> Known:
        """The run of a plan that was not ended, or a new one; for us alone, until `release`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = shared_lock(self._folder / f".{plan}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:  # another run of the plan is at work
            return Known(key=uuid4().hex, new=True)
        self._lock, self._file = lock, self._folder / f"{plan}.json"
        record = read_record(self._file)
        known = Known(
            key=record.get("key") or uuid4().hex, new="key" not in record, name=record.get("name") or ""
        )
        self._write(self._file, {"key": known.key, "name": name})
        return known

    def name_of(self, plan: str) -> str:
        """The name of the run of a plan that was not ended; empty where there is none."""
        return str(read_record(self._folder / f"{plan}.json").get("name") or "")

    def end(self) -> None:
        """Forget the run: it ended well, and its log has that."""
        if self._file:
            self._file.unlink(missing_ok=True)

    def release(self) -> None:
        """Let other runs of the plan resume this one."""
        if self._lock:
            self._lock.release()

    def step(self, stage: str, fingerprint: str) -> Known:
        """The run of a step that was not ended, or a new one."""
        file = self._step(stage, fingerprint)
        record = read_record(file)
        known = Known(
            key=record.get("key") or uuid4().hex,
            new=not record,
            begun=record.get("begun") or milliseconds(),
        )
        self._write(file, {"key": known.key, "begun": known.begun})
        return known

    def unfinished(self, stage: str, fingerprint: str) -> bool:
        """Whether a killed run sealed an artifact but did not live to log it."""
        return self._step(stage, fingerprint).exists()

    def forget(self, stage: str, fingerprint: str) -> None:
        """The step is ended, and its log has that."""
        self._step(stage, fingerprint).unlink(missing_ok=True)

    def _step(self, stage: str, fingerprint: str) -> Path:
        return self._folder / f"{stage}-{fingerprint}.json"

    def _write(self, file: Path, record: dict[str, Any]) -> None:
        write_durably(file, json.dumps(record, allow_nan=False))


def plan_id(recipe: Recipe, steps: Sequence[Step]) -> str:
    """Return the name by which a plan is known, whoever runs it; no step has such a one."""
    return f"{recipe.name}-{steps[-1].fingerprint}.run"


def read_record(path: Path) -> dict[str, Any]:
    """Read what an unfinished run left in a file; nothing where there is none."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # damaged: what it was is begun anew
        return {}
    return record if isinstance(record, dict) else {}
