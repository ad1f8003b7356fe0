"""What a stage body may ask of its surroundings, and nothing more.

A body is a plain function ``body(config, inputs, out, context) -> Metrics``. It reads the folders in
``inputs``, writes only under ``out``, and asks everything else of ``context``: work over shards, progress,
notes for a person, and processes that must run as ranks. Under `flows` the context is Prefect and MLflow;
`LocalContext` serves tests and scripts with a pool of local processes.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import secrets
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

EXPONENT = re.compile(r"[+-]?\d[\d_]*(\.\d*)?e[+-]?\d+", re.IGNORECASE)
"""Numbers that YAML 1.1 and pydantic's integers do not take for what they are."""

Item = TypeVar("Item")
Result = TypeVar("Result")

Metrics = dict[str, float]
"""Figures that a stage body returns. They depend on its config and inputs only, never on the clock."""


class UserError(Exception):
    """A mistake that the user can mend: one or two lines that say what, where and what to do."""


class Unresolved(UserError):
    """Something a plan needs that can't be known here and now (a hub that can't be reached)."""


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, defaults checked like given values."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_numbers(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            key: read_numbers(value, leaf_types(fields[key].annotation)) if key in fields else value
            for key, value in values.items()
        }


def read_numbers(value: Any, types: frozenset[Any]) -> Any:
    """Make the numbers in a raw value of a field of ``types`` numbers, by one rule, wherever they were written.

    YAML reads ``2e5`` and ``1e-3`` as text. And pydantic takes true for 1: where a number is wanted it becomes text,
    which is refused in its place.
    """
    if not types & {int, float}:
        return value
    if isinstance(value, list | tuple):
        return type(value)(read_numbers(one, types) for one in value)
    if isinstance(value, dict):
        return {key: read_numbers(one, types) for key, one in value.items()}
    if isinstance(value, bool) and bool not in types:
        return str(value).lower()
    if isinstance(value, str) and str not in types and EXPONENT.fullmatch(value.strip()):
        return float(value)
    return value


def leaf_types(annotation: Any) -> frozenset[Any]:
    """The types that values of an annotation consist of: ``dict[str, float] | None`` gives float and None."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return frozenset()
    if origin is Annotated:
        args = args[:1]
    elif origin is dict:
        args = args[1:]
    return frozenset().union(*map(leaf_types, args)) if args else frozenset({annotation})


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
        """A copy in which all that depends on the world (files, revisions, ``auto``) is pinned.

        Raises:
            UserError: what is named does not exist or can't be used.
            Unresolved: it can't be known from here (no network).
        """
        return self

    def identity(self) -> dict[str, Any]:
        """The JSON value that is hashed into the fingerprint. Call it on a resolved config."""
        return self.model_dump(mode="json", exclude={"runtime"})

    def left_out(self) -> Metrics | None:
        """Count what a resolved config knows to be left unread, as metrics ``left_out/reason``; None: it can't tell."""
        return None

    def check_inputs(self, configs: Mapping[str, StageConfig], made: Mapping[str, Path]) -> None:
        """Refuse, when planned, inputs that this stage can't be built from. Call it on a resolved config.

        Args:
            configs: of the stages that are its inputs.
            made: the folders of those that are sealed.

        Raises:
            UserError: their configs, or what they made, rule it out.
        """
        return

    def predict(self, metrics: Mapping[str, float], workers: int) -> list[str]:
        """Lines for a person on what a run of this stage will need (memory, disk, time) and find; often none.

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
        """Say how far the stage is: ``done`` of ``total`` ``unit`` ("documents", "MB", "steps")."""
        ...

    def note(self, message: str, *, warning: bool = False) -> None:
        """Tell a person one line: a choice made ("precision fp32: ...") or a warning."""
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
        place of this machine (`llm.slurm`).

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
            raise UserError("this context starts no ranks: give LocalContext a launcher (flows.launch.local)")
        self._launcher(module, job, ranks, logs=logs, grace_seconds=grace_seconds)


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes that end by themselves when the process that made them is killed.

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
    """Whether a process of this number exists, be it a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # someone else's
    return True


def has_ended(pid: int) -> bool:
    """Whether process ``pid`` has ended, even if nobody has collected it yet (where the system can tell)."""
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


def finite(value: Any) -> Any:
    """Put None for numbers that are not finite, at any depth: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value


def last_lines(text: str, count: int = 12) -> str:
    """The last ``count`` lines of ``text``."""
    return "\n".join(text.strip().splitlines()[-count:])


def human_bytes(size: float) -> str:
    """``1536`` -> ``1.5 kB`` (powers of 1000, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
