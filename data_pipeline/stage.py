"""The contract between a stage and its surroundings.

A body is a plain function ``body(config, inputs, out, context) -> Metrics``. It reads the folders in
``inputs``, writes only under ``out``, and asks everything else of ``context``: work over shards, progress,
notes for a person, and processes that must run as ranks. Under `flows` the context is Prefect and MLflow;
`LocalContext` serves tests and scripts with a pool of local processes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

from data_pipeline.core.config import Config
from data_pipeline.core.errors import UserError
from data_pipeline.core.processes import process_pool

Item = TypeVar("Item")
Result = TypeVar("Result")
Metrics = dict[str, float]
"""Metrics that a stage body returns. They depend on its config and inputs only, never on the clock."""


class Runtime(Config):
    """How a stage is executed: no part of an artifact's identity.

    Nothing in here changes what a stage writes, but for training: how often it measures itself on the way is here too,
    and the number of ranks and the micro-batch decide the order of sums, and so the last bits of floating point.
    """


class StageConfig(Config):
    """Base of the stages' configs. Every field but ``runtime`` is part of the artifact's identity."""

    moved: ClassVar[Mapping[str, str]] = {}
    """Settings that stood elsewhere before, and where they are now."""
    runtime: Runtime = Runtime()

    def resolve(self) -> Self:
        """Return a copy in which all that depends on the world (files, revisions, ``auto``) is pinned.

        Raises:
            UserError: what is named does not exist or can't be used.
            Unresolved: it can't be known from here (no network).
        """
        return self

    def identity(self) -> dict[str, Any]:
        """Return the JSON value that is hashed into the fingerprint. Call it on a resolved config."""
        return self.model_dump(mode="json", exclude={"runtime"})

    def makes(self) -> tuple[str, ...]:
        """Return the types of what a step with this config makes; empty: as in the table of stages."""
        return ()

    def left_out(self) -> Metrics | None:
        """Count what a resolved config knows to be left unread, as metrics ``left_out/reason``; None: unknown."""
        return None

    def check_wired(self, inputs: Collection[str]) -> None:
        """Refuse, when a recipe is read, settings that do not go with the types of inputs that the step has.

        Raises:
            UserError: they don't.
        """
        return

    def check_inputs(self, configs: Mapping[str, StageConfig], made: Mapping[str, Path]) -> None:
        """Refuse, when planned, inputs that this stage can't be built from. Call it on a resolved config.

        Args:
            configs: type of an input -> config of the step that makes it.
            made: type of an input -> its folder, where it is sealed.

        Raises:
            UserError: their configs, or what they made, rule it out.
        """
        return

    def kept_out(self) -> frozenset[str] | None:
        """Return the SHA-256 of the files whose texts this stage keeps out of documents; None where it never does."""
        return None

    def continued(self, made: Path, inputs: Mapping[str, str]) -> list[str]:
        """Return lines for a person, when planned, on what of an earlier result the stage goes on from; often none.

        Args:
            made: the folder of all that the stage has made.
            inputs: type of an input -> its fingerprint.
        """
        return []

    def foresee(self, lineage: Mapping[str, Sequence[StageConfig]]) -> list[str]:
        """Return warnings for a person, when planned, of what the inputs were made by; often none.

        Args:
            lineage: type of an input -> resolved configs of the step that makes it and of all before that.
        """
        return []

    def predict(self, metrics: Mapping[str, float], workers: int) -> list[str]:
        """Return lines for a person on what a run of this stage will need (memory, disk, time) and find; often none.

        Args:
            metrics: of the sealed artifact that is the stage's first input; empty where that is not built yet.
            workers: items that are worked on at once.
        """
        return []


class StageContext(Protocol):
    """The surroundings of a stage body."""

    workers: int
    """How many items `map` may work on at once."""

    def map(
        self, fn: Callable[[Item], Result], items: Sequence[Item], *, names: Sequence[str] | None = None
    ) -> list[Result]:
        """Apply ``fn`` to every item and return the results in the order of ``items``.

        ``fn`` and the items must be picklable (a module-level function or a `functools.partial` of one):
        they may run in another process or on another machine that shares the file system. Make an item
        seconds to minutes of work. ``names`` (one an item) are for people. The first exception is raised.
        """
        ...

    def progress(self, done: float, total: float | None, unit: str) -> None:
        """Report how far the stage is: ``done`` of ``total`` ``unit`` ("documents", "MB", "steps")."""
        ...

    def note(self, message: str, *, warning: bool = False) -> None:
        """Report one line to a person: a choice made ("precision fp32: ...") or a warning."""
        ...

    def launch(
        self,
        module: str,
        job: Path,
        ranks: int,
        *,
        events: Path,
        logs: Path,
        grace_seconds: float = 30,
        batch: Runtime | None = None,
    ) -> None:
        """Run ``python -m module job`` as ``ranks`` processes of one `torch.distributed` job.

        Returns when all have ended well. ``events`` is the JSON-lines file that rank 0 appends to, which the
        caller may follow meanwhile; ``logs`` the folder for what the ranks print; ``grace_seconds`` what they get
        to save their work when they are to end; ``batch`` what a batch system is asked for, which starts them in
        place of this machine (`llm.machine.slurm`).

        Raises:
            UserError: a rank ended with a user's mistake (see `llm.pretrain`).
            RuntimeError: a rank failed; the message holds the end of its log.
        """
        ...


class LocalContext:
    """`StageContext` for tests and scripts: a pool of local processes, notes kept in a list.

    Each `map` starts a pool of its own; within ``with LocalContext(...) as context:`` one serves them all.
    """

    def __init__(self, workers: int = 1, launcher: Callable[..., None] | None = None) -> None:
        self.workers = workers
        self.notes: list[str] = []
        self._launcher = launcher
        self._pool: ProcessPoolExecutor | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        if self.workers > 1:
            self._pool = self._open.enter_context(process_pool(self.workers))
        return self

    def __exit__(self, *fault: Any) -> None:
        self._pool = None
        self._open.__exit__(*fault)

    def map(
        self, fn: Callable[[Item], Result], items: Sequence[Item], *, names: Sequence[str] | None = None
    ) -> list[Result]:
        if self.workers == 1 or len(items) < 2:
            return [fn(item) for item in items]
        if self._pool:
            return list(self._pool.map(fn, items))
        with process_pool(min(self.workers, len(items))) as pool:
            return list(pool.map(fn, items))

    def progress(self, done: float, total: float | None, unit: str) -> None:
        pass

    def note(self, message: str, *, warning: bool = False) -> None:
        self.notes.append(message)

    def launch(
        self,
        module: str,
        job: Path,
        ranks: int,
        *,
        events: Path,
        logs: Path,
        grace_seconds: float = 30,
        batch: Runtime | None = None,
    ) -> None:
        if self._launcher is None or batch:
            raise UserError(
                "this context starts no ranks: give LocalContext a launcher (flows.engine.launch.local)"
            )
        self._launcher(module, job, ranks, logs=logs, grace_seconds=grace_seconds)
