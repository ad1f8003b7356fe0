"""The executor walks a plan: it reuses what is sealed, builds the rest under its lock and seals it, and says so in the
run log. It knows neither Prefect nor MLflow: where work is done, and how a run may be stopped, is said by its `Host`.

Only a manifest says "done". So a second run of the same recipe, a run after a failure and a run after ``kill -9`` are
all the same thing: sealed steps are reused, an unfinished one is resumed where it stopped.
"""

from __future__ import annotations

import errno
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml

from data_pipeline.core.errors import UserError
from data_pipeline.core.text import human_bytes, last_lines
from data_pipeline.discards import warnings
from flows.engine.context import StepContext
from flows.engine.continuation import Continuation, Known
from flows.engine.events import (
    RunEnded,
    RunStarted,
    StepDispatched,
    StepFailed,
    StepReused,
    StepSealed,
    StepStarted,
)
from flows.engine.launch import Interrupted
from flows.engine.log import RunLog
from flows.engine.manifest import describe_making
from flows.engine.plan import Planned, Step, ancestors
from flows.engine.stopping import Stop, asked
from flows.engine.store import LOGS, Artifact, Store, begin_attempt, now, origin_of
from flows.engine.training import EVENTS, read_lines
from flows.recipe import Recipe

FULL_BYTES = 1_000_000  # less free space than this, and no step can seal its manifest
LAST_LINES = 20
TIME = "%Y-%m-%d %H:%M:%S"


class StageFailed(Exception):
    """A step ended with an error that is not the user's mistake; the message says how to resume it."""


@dataclass(frozen=True)
class Order:
    """What is to be run, and for whom."""

    planned: Planned
    command: str
    """What a person types to run it again."""
    sweep: str = ""
    """The key of the sweep that the run belongs to."""
    run_key: str = ""
    """The key of the run that dispatched us to do a step of it."""
    look: Callable[[Artifact], None] = lambda artifact: None
    """Sees each artifact before the next step begins; what it raises ends the run."""

    @property
    def recipe(self) -> Recipe:
        return self.planned.recipe


@dataclass(frozen=True)
class Result:
    """What became of one step."""

    artifact: Artifact
    how: str
    """``reused``, ``ran``, ``resumed`` or, by a flow run elsewhere, ``dispatched``."""
    seconds: float
    """In its body, this time; 0 where it was reused."""


class Host(Protocol):
    """The surroundings of a run."""

    stops: tuple[type[BaseException], ...]
    """What ends a run because somebody wants it to."""

    def at_work(self, builds: bool, give_up: Callable[[], None]) -> AbstractContextManager[None]:
        """Have what it takes to build, where the plan ``builds``; call ``give_up`` when we are too slow to end."""
        ...

    def flow(self, step: Step, work: Callable[[], None]) -> AbstractContextManager[Callable[[], Any]]:
        """Give what to call in place of ``work``, within a flow of the step."""
        ...

    def context(self, started: StepStarted, out: Path) -> StepContext:
        """Make the context of a body."""
        ...

    def deployment(self, step: Step) -> str:
        """The deployment that a step is left to; empty where it is built here."""
        ...

    def dispatch(self, step: Step, key: str, forced: bool) -> None:
        """Have it build the step, as a part of the run of ``key``, and wait for its end."""
        ...

    def flow_run(self) -> dict[str, str]:
        """Id and url of the flow run that we are in; empty outside of one."""
        ...

    def made_by(self, key: str) -> dict[str, str]:
        """What a manifest says of the runs that made it: ids that are known by now."""
        ...

    def stopped(self, message: str) -> None:
        """Say, from any thread, that this process is about to end."""
        ...


class Executor:
    """One run of a plan."""

    def __init__(self, order: Order, log: RunLog, host: Host) -> None:
        self.order, self.log, self._host = order, log, host
        self.store: Store = order.planned.uses.store
        self.results: dict[str, Result] = {}
        self._keys = Continuation(self.store.home)
        self.known = Known(key=order.run_key, new=False)
        self._started = time.monotonic()
        self._at_work = ""
        self._failure = ("", "")  # the message, and the last lines of what was said
        self._context: StepContext | None = None
        self._ended = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Prefect sends a step's flow along with its tasks; no worker ever calls it, so nothing of the run goes."""
        return object, ()

    @property
    def overhead_seconds(self) -> float:
        """Wall time so far outside the bodies: planning, sealing, Prefect and MLflow."""
        return time.monotonic() - self._started - sum(result.seconds for result in self.results.values())

    def run(self) -> None:
        """Carry the plan out; `results` then holds what became of each step.

        Raises:
            Stop: somebody wanted it to end; the message says who, and what is kept.
        """
        planned = self.order.planned
        with self._reporting(), self._host.at_work(planned.builds, self._give_up):
            for step in planned.steps:
                self._at_work, self._context = step.name, None
                if artifact := self._reusable(step):
                    self._reused(step, Result(artifact, "reused", 0.0))
                elif deployment := self._host.deployment(step):
                    self._dispatch(step, deployment)
                else:
                    with self._host.flow(step, partial(self._build, step)) as start:
                        start()
                self._look(step)
            self._at_work = ""

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Say that the run begins, and how it ends."""
        status = "KILLED"
        self._start()
        try:
            yield
            status = "FINISHED"
        except Exception as error:
            status = "FAILED"
            raise self._told(error) from error.__cause__
        except self._host.stops as stop:
            raise self._stopped(stop) from None
        finally:
            self._end(status)

    def _told(self, error: Exception) -> Exception:
        """A failure as people should read it."""
        self._failure = self._failure if self._failure[0] else (str(error) or type(error).__name__, "")
        if isinstance(error, UserError) or not disk_is_full(self.store.home, error):
            return error
        home = self.store.home.resolve()
        where = f"{home} ({human_bytes(shutil.disk_usage(home).free)} free)"
        return UserError(f"the disk is full: {where}; make room, then `{self.order.command}` goes on")

    def _start(self) -> None:
        order, recipe, steps = self.order, self.order.recipe, self.order.planned.steps
        name = f"{recipe.name} {datetime.now():{TIME}}"
        if not order.run_key:
            self.known = self._keys.claim(f"{recipe.name}-{steps[-1].fingerprint}", name)
        planned = [
            {
                "step": s.name,
                "stage": s.stage.name,
                "action": s.action,
                "fingerprint": s.fingerprint,
                "why": s.why,
            }
            for s in steps
        ]
        self.log.append(
            RunStarted(
                key=self.known.key,
                name=self.known.name or name,
                new=self.known.new,
                joined=bool(order.run_key),
                recipe=recipe.name,
                description=recipe.description,
                command=order.command,
                steps=planned,
                params={step.name: step.config.identity() for step in steps if step.config},
                resolved=resolved_yaml(recipe, steps),
                sweep=order.sweep,
                flow_run=self._host.flow_run(),
                notify=[] if order.run_key else list(recipe.runtime.notify),
                store=str(self.store.root.resolve()),
                quoting=recipe.runtime.upload_texts,
            )
        )

    def _end(self, status: str) -> None:
        """Say once how the run ended: FINISHED, FAILED or KILLED."""
        if not self._ended.acquire(blocking=False):
            return
        message, said = self._failure
        results = [
            {
                "step": name,
                "stage": result.artifact.stage,
                "fingerprint": result.artifact.fingerprint,
                "how": result.how,
                "seconds": result.seconds,
            }
            for name, result in self.results.items()
        ]
        seconds = time.monotonic() - self._started
        ended = RunEnded(
            key="" if self.order.run_key else self.known.key,
            status=status,
            seconds=seconds,
            message=message,
            step=self._at_work,
            log=said,
            results=results,
            name=self.known.name,
            description=self.order.recipe.description,
            command=self.order.command,
            store=str(self.store.root.resolve()),
            quoting=self.order.recipe.runtime.upload_texts,
        )
        self.log.append(ended)
        self._keys.release(status == "FINISHED")

    def _give_up(self) -> None:
        """Say everywhere that the run was stopped, while what is at work does not let it end."""
        if not self._failure[0]:
            self._failed(str(self._stopped(Stop())), "", "KILLED")
        message = self._failure[0]
        self.log.warn(f"{message}: ended by force; the same command goes on from here: {self.order.command}")
        with suppress(Exception):
            self._host.stopped(message)
        self._end("KILLED")
        self.log.close()

    def _stopped(self, stop: BaseException) -> Stop:
        """What a stop is raised as: the message says in which step, who wanted it, and what is kept of that."""
        if not self._failure[0]:
            why = asked.why or (str(stop) if isinstance(stop, Stop) else "stopped by Prefect")
            told = isinstance(stop, Interrupted)  # it says itself what is saved
            kept = self._context.kept if self._context and not told else ""
            where = f"{self._at_work}: " if self._at_work else ""
            self._failure = ("; ".join(part for part in (f"{where}{why}", kept) if part), "")
        return Stop(self._failure[0])

    def _inputs(self, step: Step) -> dict[str, Artifact]:
        """Type of an input -> its artifact."""
        return {type_: self.results[name].artifact for type_, name in step.sources.items()}

    def _reusable(self, step: Step) -> Artifact | None:
        """A step's artifact where it is to be reused, once its log says that it is there."""
        artifact = step.artifact
        if step.action != "reuse" or artifact is None or not self._made_from_ours(step, artifact):
            return None
        lock = self.store.lock(artifact.stage, artifact.fingerprint)
        with suppress(TimeoutError), lock.acquire(timeout=0):  # who holds the lock is about to say it
            if self._keys.unfinished(artifact.stage, artifact.fingerprint):
                started = self._start_step(step, late=True, resumed=True)
                self._sealed(step, started, Result(artifact, "ran", 0.0))
        return artifact

    def _made_from_ours(self, step: Step, artifact: Artifact) -> bool:
        """Whether an artifact's inputs are, byte for byte, the ones of this run (one may have been built again)."""
        return all(
            artifact.inputs[type_].payload_sha256 == one.payload_sha256
            for type_, one in self._inputs(step).items()
        )

    def _reused(self, step: Step, result: Result) -> None:
        self.results[step.name] = result
        manifest = result.artifact.manifest
        reused = StepReused(
            step=step.name,
            stage=step.stage.name,
            fingerprint=str(step.fingerprint),
            run="" if self.order.run_key else self.known.key,
            how=result.how,
            seconds=result.seconds,
            path=str(result.artifact.path),
            metrics=result.artifact.metrics,
            finished=sealed_at(result.artifact),
            made_by=manifest.get("mlflow_run_id", ""),
            made_by_key=manifest.get("mlflow_key", ""),
        )
        self.log.append(reused)

    def _look(self, step: Step) -> None:
        """Warn of what a step discarded in a share that the recipe does not allow without a word."""
        artifact = self.results[step.name].artifact
        for line in warnings(artifact.metrics, self.order.recipe.runtime.discard_shares):
            self.log.warn(f"{step.name}: {line}; see {artifact.path}")
        self.order.look(artifact)

    def _dispatch(self, step: Step, deployment: str) -> None:
        """Have a step built by a flow run of its own deployment."""
        stage, name, clock = step.stage.name, str(step.fingerprint), time.monotonic()
        self.log.append(StepDispatched(step=step.name, deployment=deployment))
        try:
            with self.order.planned.uses.apart(stage, name):  # else it could not replace what is there
                forced = self.order.planned.selection.force == step.name
                self._host.dispatch(step, self.known.key, forced)
        except BaseException as error:
            self.log.append(StepFailed(step=step.name, message=str(error) or "stopped", status="FAILED"))
            raise
        artifact = self.store.get(stage, name)
        if artifact is None:
            raise StageFailed(
                f"{step.name}: its flow run ended well, but {name} is not in {self.store.root}: do its worker "
                "and this one share the home, and resolve the recipe alike?"
            )
        self._reused(step, Result(artifact, "dispatched", time.monotonic() - clock))

    def _build(self, step: Step) -> None:
        """Build and seal one artifact under its lock, unless another run has just done so."""
        assert step.config
        stage, name = step.stage.name, str(step.fingerprint)
        with self._locked(step), self._failures(step):
            sealed = self.store.get(stage, name)
            planned = step.artifact.manifest["finished"] if step.artifact else None
            if sealed and sealed.manifest["finished"] != planned and self._made_from_ours(step, sealed):
                self._reused(step, Result(sealed, "reused", 0.0))
                return
            inputs = self._inputs(step)
            origin = {"inputs": origin_of(inputs), "forced": self.order.planned.selection.force == step.name}
            out, begun = self.store.begin(stage, name, origin)
            started = self._start_step(step, late=False, resumed=begun)
            self._context = context = self._host.context(started, out)
            manifest = describe_making(step, self.order.recipe, inputs) | {"started": now()}
            attempts, earlier = begin_attempt(out)
            clock = time.monotonic()
            metrics = step.stage.body(step.config, self._folders(step), out, context)
            seconds = time.monotonic() - clock
            manifest |= {
                "metrics": dict(metrics),
                "notes": context.notes,
                "finished": now(),
                "attempts": attempts + 1,
                "seconds": round(earlier + seconds, 3),
                **self._host.made_by(started.key),
            }
            replacing = partial(self.order.planned.uses.alone, stage, name, partial(self._replacing, step))
            artifact = self.store.seal(stage, name, manifest, context.checksum, replacing)
            self._sealed(step, started, Result(artifact, "resumed" if begun else "ran", seconds))

    def _folders(self, step: Step) -> dict[str, Path]:
        """The folders that a body reads: of its inputs by type and, for some, of all before them by name."""
        folders = {type_: artifact.path for type_, artifact in self._inputs(step).items()}
        if step.stage.lineage:
            before = ancestors(self.order.planned.steps, [step.name])
            folders |= {one: result.artifact.path for one, result in self.results.items() if one in before}
        return folders

    def _start_step(self, step: Step, *, late: bool, resumed: bool) -> StepStarted:
        """Say that a step is built, or continued."""
        stage, name = step.stage.name, str(step.fingerprint)
        known = self._keys.step(stage, name)
        inputs = [
            {
                "stage": one.stage,
                "fingerprint": one.fingerprint,
                "path": str(one.path),
                "metrics": one.metrics,
            }
            for one in self._inputs(step).values()
        ]
        folder = self.store.path(stage, name) if late else self.store.partial(stage, name)
        seen = 0 if known.new else read_lines(folder / EVENTS, 0)[1]
        config = step.artifact.manifest["config"] if late and step.artifact else None
        assert step.config
        started = StepStarted(
            step=step.name,
            stage=stage,
            fingerprint=name,
            key=known.key,
            new=known.new,
            run=self.known.key,
            recipe=self.order.recipe.name,
            why="; ".join(step.why)[:120],
            resumed=resumed and not known.new,
            late=late,
            params=config or step.config.identity(),
            inputs=inputs,
            seen=seen,
            begun=known.begun,
            flow_run=self._host.flow_run(),
        )
        self.log.append(started)
        return started

    def _sealed(self, step: Step, started: StepStarted, result: Result) -> None:
        """Say that an artifact is there; from here on it need not be said again."""
        artifact, runtime = result.artifact, self.order.recipe.runtime
        sealed = StepSealed(
            step=step.name,
            stage=artifact.stage,
            fingerprint=artifact.fingerprint,
            key=started.key,
            run="" if self.order.run_key else self.known.key,
            recipe=artifact.manifest["recipe"],
            how=result.how,
            seconds=result.seconds,
            total_seconds=artifact.manifest["seconds"],
            path=str(artifact.path),
            size=artifact.size,
            metrics=artifact.metrics,
            payload_sha256=artifact.payload_sha256,
            finished=sealed_at(artifact),
            late=started.late,
            resumed=started.resumed,
            withheld=step.stage.texts and not runtime.upload_texts,
            upload_bytes=runtime.upload_mb * 1e6,
            candidate=not self.order.sweep,
        )
        self.results[step.name] = result
        self.log.append(sealed)
        self._keys.forget(artifact.stage, artifact.fingerprint)

    def _replacing(self, step: Step) -> None:
        self.log.note(
            f"another run is using {step.stage.name} {step.fingerprint}; this one takes its place when that ends",
            step.name,
        )

    @contextmanager
    def _locked(self, step: Step) -> Iterator[None]:
        stage, name = step.stage.name, str(step.fingerprint)
        lock = self.store.lock(stage, name)
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            self.log.note(f"another run is building {stage} {name}; waiting for it", step.name)
            with self.order.planned.uses.apart(stage, name):
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _failures(self, step: Step) -> Iterator[None]:
        """Keep the trace of a failure beside the unfinished artifact, and say how to go on."""
        try:
            yield
        except UserError as error:
            self._failed(str(error), str(error))
            raise UserError(f"{step.name}: {error}") from None
        except Exception as error:
            trace = "".join(traceback.format_exception(error))
            self._failed(f"{type(error).__name__}: {error}", trace)
            log = self.store.partial(step.stage.name, str(step.fingerprint)) / LOGS / "failure.txt"
            with suppress(OSError):  # the failure itself matters more than its log
                log.parent.mkdir(exist_ok=True)
                log.write_text(trace)
            said = f"{step.name} failed: {type(error).__name__}: {error}"
            raise StageFailed(f"{said}\nresume with: `{self.order.command}`\ntrace: {log}") from error
        except self._host.stops as stop:
            stopped = self._stopped(stop)
            self._failed(str(stopped), "", "KILLED")
            raise stopped from None

    def _failed(self, message: str, text: str, status: str = "FAILED") -> None:
        self._failure = (message, last_lines(text, LAST_LINES))
        key = self._context.key if self._context else ""
        self.log.append(StepFailed(step=self._at_work, message=message, status=status, key=key))


def sealed_at(artifact: Artifact) -> int:
    """When an artifact was sealed, in milliseconds since 1970: what is said of it again is then said of one time."""
    return int(datetime.fromisoformat(artifact.manifest["finished"]).timestamp() * 1000)


def resolved_yaml(recipe: Recipe, steps: list[Step]) -> str:
    """A recipe as it was resolved, which can be run again."""
    head: dict[str, Any] = {"name": recipe.name, "description": recipe.description}
    head["runtime"] = recipe.runtime.model_dump(mode="json")
    return yaml.safe_dump(head | dict(map(resolved_step, steps)), sort_keys=False, allow_unicode=True)


def resolved_step(step: Step) -> tuple[str, Mapping[str, Any]]:
    """Name and settings of a step, with its place among the others where the recipe must say it."""
    said: dict[str, Any] = {"stage": step.stage.name} if step.name != step.stage.name else {}
    said |= {"inputs": step.sources} if said and step.sources else {}
    if step.config:
        runtime = step.config.runtime.model_dump(mode="json")
        said |= step.config.identity() | ({"runtime": runtime} if runtime else {})
    return step.name, said


def disk_is_full(home: Path, error: BaseException | None) -> bool:
    """Whether a failure comes from want of room: it says so, or hardly anything is left where all is written.

    Not only our own writes fail then; the databases of Prefect and MLflow have other words for it.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return shutil.disk_usage(home).free < FULL_BYTES
