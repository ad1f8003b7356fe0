"""The pipeline: a Prefect flow over the stages' table, each stage a subflow, each sealed in the store.

Only a manifest says "done". So a second run of the same recipe, a run after a failure and a run after ``kill -9``
are all the same thing: sealed stages are reused, an unfinished one goes on where it stopped.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from prefect import flow
from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY as HEARTBEATS
from prefect.settings import temporary_settings

from data_pipeline.context import UserError, human_bytes
from flows.context import PrefectContext
from flows.manifest import describe_making
from flows.plan import Selection, Step, make_plan
from flows.recipe import Recipe
from flows.runners import Workers, reach, start_workers
from flows.store import LOGS, Artifact, Store, now
from flows.terminal import Terminal, headline
from flows.tracking import Tracker

MOST_ENTRIES = 20  # of a list among a flow run's parameters
FULL_BYTES = 1_000_000  # less free space than this, and no stage can seal its manifest


class StageFailed(Exception):
    """A stage ended with an error that is not the user's mistake; the message says how to resume it."""


@dataclass(frozen=True)
class Result:
    """What became of one stage."""

    artifact: Artifact
    how: str
    """``reused``, ``ran`` or ``resumed``."""
    seconds: float
    """In the stage's body, this time; 0 where it was reused."""


class Run:
    """One run of a recipe: its plan, and the flow that carries it out."""

    def __init__(
        self, recipe: Recipe, home: Path, selection: Selection, terminal: Terminal, command: str
    ) -> None:
        self.recipe, self.selection, self.terminal = recipe, selection, terminal
        self.command = command
        """What a person types to run this again; said when a stage fails."""
        if recipe.runtime.task_runner in ("dask", "ray"):
            home = home.resolve()  # a worker elsewhere has another current folder
        self.store = Store(home)
        self.tracker = Tracker(home, recipe.name, lambda text: terminal.note(text, warning=True))
        self.steps: list[Step] = []
        self.results: dict[str, Result] = {}
        self._started = time.monotonic()
        self._workers: Workers

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Prefect sends a stage's flow along with its tasks; no worker ever calls it, so nothing of the run goes."""
        return object, ()

    def prepare(self) -> None:
        """Make the plan, and reach the workers' cluster and MLflow.

        Raises:
            UserError: the plan can't be made, a stage can't be resolved from here, or no cluster answers.
        """
        self.steps = make_plan(self.recipe, self.store, self.selection)
        for step in self.steps:
            if step.action == "unknown":
                raise UserError(f"{step.stage.name}: {'; '.join(step.why)}")
        if self._computes:
            reach(self.recipe.runtime)
        self.tracker.open()

    def execute(self) -> None:
        """Run the plan as a Prefect flow; `results` then holds what became of each stage."""
        name = f"{self.recipe.name} {datetime.now():%Y-%m-%d %H:%M:%S}"
        fingerprints = {step.stage.name: str(step.fingerprint) for step in self.steps}
        description = self.recipe.description or None

        # No retries of Prefect's: whoever runs the recipe again goes on where this run ended.
        @flow(name=self.recipe.name, flow_run_name=name, description=description, retries=0)
        def pipeline(recipe: str, fingerprints: dict[str, str]) -> None:
            self._pipeline()

        try:
            with ExitStack() as stack:
                if HEARTBEATS.name not in os.environ:
                    # A flow waits up to a second for the thread that sends them to wake and end.
                    stack.enter_context(temporary_settings({HEARTBEATS: None}))
                if self._computes:
                    self._workers = stack.enter_context(start_workers(self.recipe.runtime, self.store.home))
                pipeline(recipe=self.recipe.name, fingerprints=fingerprints)
        except Exception as error:
            if not isinstance(error, UserError) and disk_is_full(self.store.home, error):
                where = f"{self.store.home.resolve()} ({human_bytes(shutil.disk_usage(self.store.home).free)} free)"
                raise UserError(
                    f"the disk is full: {where}; make room, then {self.command} goes on"
                ) from None
            raise
        finally:
            # What is still queued must reach the server before ours is stopped, or Prefect prints a trace.
            APILogHandler().flush()

    @property
    def _computes(self) -> bool:
        """Whether the plan has a stage to build; where it has none, no workers are needed."""
        return any(step.action != "reuse" for step in self.steps)

    @property
    def overhead_seconds(self) -> float:
        """Wall time so far outside the stages' bodies: planning, sealing, Prefect and MLflow."""
        return time.monotonic() - self._started - sum(result.seconds for result in self.results.values())

    def _pipeline(self) -> None:
        """The body of the pipeline's flow: every step in order, told to MLflow."""
        self._start_tracking()
        status = "KILLED"
        try:
            for step in self.steps:
                result = self._stage(step)
                self.results[step.stage.name] = result
                self.tracker.add_to_parent(result.artifact, result.how, step.stage.headline)
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            self._finish_tracking(status)

    def _stage(self, step: Step) -> Result:
        """Reuse one stage's artifact, or build it in a Prefect flow of its own."""
        assert step.config
        name = step.stage.name
        if step.action == "reuse" and step.artifact and self._made_from_ours(step.artifact):
            self._settle(step.artifact)
            result = Result(step.artifact, "reused", 0.0)
        else:
            runner: Any = self._workers.task_runner()

            @flow(name=name, flow_run_name=f"{name} {step.fingerprint}", task_runner=runner, retries=0)
            def stage(fingerprint: str, config: dict[str, Any], inputs: dict[str, str]) -> Any:
                return self._build(name)

            # The parameters are there to be read on the flow run's page.
            built: Any = stage(str(step.fingerprint), shortened(step.config.identity()), step.inputs)
            result = built
        if result.how == "reused":
            self.terminal.stage_reused(name, f"{headline(result.artifact)}  (reused)")
        return result

    def _made_from_ours(self, artifact: Artifact) -> bool:
        """Whether an artifact's inputs are, byte for byte, the ones of this run (one may have been built again)."""
        return all(
            source["payload_sha256"] == self.results[name].artifact.payload_sha256
            for name, source in artifact.manifest["inputs"].items()
        )

    def _settle(self, artifact: Artifact) -> None:
        """Tell MLflow of an artifact whose run was killed between sealing it and telling."""
        lock = self.store.lock(artifact.stage, artifact.fingerprint)
        with suppress(TimeoutError), lock.acquire(timeout=0):  # who holds the lock is about to tell it
            if self.tracker.unfinished(artifact):
                self._start_tracking_stage(artifact.stage, artifact.fingerprint, artifact.manifest["config"])
                self.tracker.finish_stage(artifact, self.recipe.runtime.upload_mb * 1e6)

    def _build(self, stage: str) -> Result:
        """Build and seal one artifact under its lock, unless another run has just done so."""
        step = next(step for step in self.steps if step.stage.name == stage)
        name = str(step.fingerprint)
        with self._locked(stage, name):
            sealed = self.store.get(stage, name)
            planned = step.artifact.manifest["finished"] if step.artifact else None
            if sealed and sealed.manifest["finished"] != planned and self._made_from_ours(sealed):
                return Result(sealed, "reused", 0.0)
            sources = {source: self.results[source].artifact.payload_sha256 for source in step.stage.inputs}
            origin = {"inputs": sources, "forced": self.selection.force == stage}
            out, begun = self.store.begin(stage, name, origin)
            self.terminal.stage_started(stage, "; ".join(step.why)[:120])
            with self._failures(stage, out):
                artifact = self._run_body(step, out)
            self.terminal.stage_ended("✓", headline(artifact))
            self.tracker.finish_stage(artifact, self.recipe.runtime.upload_mb * 1e6)
        return Result(artifact, "resumed" if begun else "ran", artifact.manifest["seconds"])

    def _run_body(self, step: Step, out: Path) -> Artifact:
        """Call the stage's body on its folders, and seal what it wrote."""
        assert step.config
        stage, name = step.stage.name, str(step.fingerprint)
        inputs = {source: self.results[source].artifact for source in step.stage.inputs}
        self._start_tracking_stage(stage, name, step.config.identity())
        context = PrefectContext(stage, out, self._workers, self.terminal, self.tracker)
        manifest = describe_making(step, self.recipe, inputs) | {"started": now()}
        clock = time.monotonic()
        metrics = step.stage.body(
            step.config, {key: value.path for key, value in inputs.items()}, out, context
        )
        manifest |= {
            "metrics": dict(metrics),
            "notes": context.notes,
            "finished": now(),
            "seconds": round(time.monotonic() - clock, 3),
            "mlflow_run_id": self.tracker.stage_id,
            "prefect_flow_run_id": str(flow_run.id),
        }
        return self.store.seal(stage, name, manifest, context.checksum)

    @contextmanager
    def _locked(self, stage: str, fingerprint: str) -> Iterator[None]:
        lock = self.store.lock(stage, fingerprint)
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            self.terminal.note(f"another run is building {stage} {fingerprint}; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _failures(self, stage: str, out: Path) -> Iterator[None]:
        """Keep the trace of a failure beside the unfinished artifact, and say how to go on."""
        try:
            yield
        except UserError as error:
            self._failed(str(error))
            raise UserError(f"{stage}: {error}") from None
        except Exception as error:
            self._failed(f"{type(error).__name__}: {error}")
            log = out / LOGS / "failure.txt"
            with suppress(OSError):  # the failure itself matters more than its log
                log.parent.mkdir(exist_ok=True)
                log.write_text("".join(traceback.format_exception(error)))
            raise StageFailed(
                f"{stage} failed: {type(error).__name__}: {error}\nresume with: {self.command}\ntrace: {log}"
            ) from error
        except BaseException:
            self._failed("stopped")
            raise

    def _failed(self, message: str) -> None:
        self.terminal.stage_ended("✗", message.splitlines()[0][:120], "red")
        self.tracker.fail_stage(message)

    def _start_tracking(self) -> None:
        """Begin the parent run: identity as params, the resolved recipe as a file."""
        identities = {step.stage.name: step.config.identity() for step in self.steps if step.config}
        tags = {"llmill.recipe": self.recipe.name, "llmill.prefect_flow_run_id": str(flow_run.id)}
        if self.recipe.description:
            tags["mlflow.note.content"] = self.recipe.description
        self.tracker.start(f"{self.recipe.name}-{self.steps[-1].fingerprint}", identities, tags)
        resolved: dict[str, Any] = {"name": self.recipe.name, "description": self.recipe.description}
        resolved["runtime"] = self.recipe.runtime.model_dump(mode="json")
        for step in self.steps:
            if step.config:
                runtime = step.config.runtime.model_dump(mode="json")
                resolved[step.stage.name] = step.config.identity() | ({"runtime": runtime} if runtime else {})
        self.tracker.attach("recipe.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))

    def _start_tracking_stage(self, stage: str, fingerprint: str, identity: Mapping[str, Any]) -> None:
        """Begin (or go on with) a stage's child run."""
        inputs = next(step.stage.inputs for step in self.steps if step.stage.name == stage)
        tags = {
            "llmill.stage": stage,
            "llmill.recipe": self.recipe.name,
            "llmill.fingerprint": fingerprint,
            "llmill.prefect_flow_run_id": str(flow_run.id),
        }
        self.tracker.start_stage(
            stage, fingerprint, identity, tags, [self.results[name].artifact for name in inputs]
        )

    def _finish_tracking(self, status: str) -> None:
        rows = [
            f"| {stage} | {result.how} | {headline(result.artifact)} | {result.seconds:.1f} "
            f"| `{result.artifact.fingerprint}` |"
            for stage, result in self.results.items()
        ]
        table = "\n".join(["| stage | | result | seconds | artifact |", "|---|---|---|---:|---|", *rows])
        self.tracker.attach("summary.md", table + "\n")
        self.tracker.finish(status, time.monotonic() - self._started)
        self.tracker.close()


def disk_is_full(home: Path, error: BaseException | None) -> bool:
    """Whether a failure comes from want of room: it says so, or hardly anything is left where all is written.

    Not only our own writes fail then; the databases of Prefect and MLflow have other words for it.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return shutil.disk_usage(home).free < FULL_BYTES


def shortened(value: Any) -> Any:
    """``value`` with long lists cut: Prefect refuses parameters above half a megabyte, and a source may list more."""
    if isinstance(value, Mapping):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        more = [f"and {len(value) - MOST_ENTRIES} more"] if len(value) > MOST_ENTRIES else []
        return [shortened(item) for item in value[:MOST_ENTRIES]] + more
    return value
