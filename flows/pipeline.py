"""The pipeline: a Prefect flow over the stages' table, each stage a subflow, each sealed in the store.

Only a manifest says "done". So a second run of the same recipe, Prefect's retry of a failed one, and a run after
``kill -9`` are all the same thing: sealed stages are reused, an unfinished one goes on where it stopped.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import socket
import subprocess
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml
from prefect import flow
from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from data_pipeline.context import UserError, human_bytes, process_pool
from flows.context import PrefectContext
from flows.launch import cores
from flows.plan import Selection, Step, make_plan
from flows.recipe import Recipe
from flows.store import LOGS, Artifact, Store, now
from flows.terminal import Terminal, headline
from flows.tracking import Tracker

LIBRARIES = (
    "llmill",
    "torch",
    "deepspeed",
    "pyarrow",
    "tokenizers",
    "gigatoken",
    "datasets",
    "prefect",
    "mlflow",
)
FULL_BYTES = 1_000_000  # less free space than this, and no stage can seal its manifest


class StageFailed(Exception):
    """A stage ended with an error that is not the user's mistake; the message says how to resume it."""


class Run:
    """One run of a recipe: its plan, and the flow that carries it out."""

    def __init__(
        self, recipe: Recipe, home: Path, selection: Selection, terminal: Terminal, command: str
    ) -> None:
        self.recipe, self.selection, self.terminal = recipe, selection, terminal
        self.command = command
        """What a person types to run this again; said when a stage fails."""
        self.store = Store(home)
        self.tracker = Tracker(home, recipe.name, lambda text: terminal.note(text, warning=True))
        self.steps: list[Step] = []
        self.results: list[tuple[Artifact, str, float]] = []
        self._body_seconds = 0.0
        self._started = time.monotonic()

    def prepare(self) -> None:
        """Make the plan and reach MLflow.

        Raises:
            UserError: the plan can't be made, or a stage can't be resolved from here.
        """
        self.steps = make_plan(self.recipe, self.store, self.selection)
        for step in self.steps:
            if step.action == "unknown":
                raise UserError(f"{step.stage.name}: {'; '.join(step.why)}")
        self.tracker.open()

    def execute(self) -> None:
        """Run the plan as a Prefect flow; `results` then holds (artifact, how, seconds) for each stage."""
        name = f"{self.recipe.name} {datetime.now():%Y-%m-%d %H:%M:%S}"
        fingerprints = {step.stage.name: str(step.fingerprint) for step in self.steps}

        @flow(name=self.recipe.name, flow_run_name=name, description=self.recipe.description or None)
        def pipeline(recipe: str, fingerprints: dict[str, str]) -> None:
            self._pipeline()

        try:
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

    def _pipeline(self) -> None:
        self._start_tracking()
        runtime = self.recipe.runtime
        pool = process_pool(runtime.worker_count) if runtime.task_runner == "processes" else nullcontext()
        status = "KILLED"
        try:
            with pool as executor:
                for step in self.steps:
                    self.results.append(self._stage(step, executor))
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            self._finish_tracking(status)

    def _stage(self, step: Step, pool: Executor | None) -> tuple[Artifact, str, float]:
        """Reuse or build one stage, and tell the parent run."""
        name = step.stage.name
        if step.action == "reuse":
            assert step.artifact
            artifact, how, seconds = step.artifact, "reused", 0.0
        else:
            artifact, how, seconds = self._stage_flow(step, pool)
        if how == "reused":
            self.terminal.stage_reused(name, f"{headline(artifact)}  (reused)")
        self.tracker.add_to_parent(artifact, how, step.stage.headline)
        return artifact, how, seconds

    def _stage_flow(self, step: Step, pool: Executor | None) -> tuple[Artifact, str, float]:
        """Build one stage as a Prefect flow of its own; its parameters are there to be read on the run's page."""
        assert step.config
        runner: Any = ThreadPoolTaskRunner(self.recipe.runtime.worker_count)

        @flow(name=step.stage.name, flow_run_name=f"{step.stage.name} {step.fingerprint}", task_runner=runner)
        def stage(fingerprint: str, config: dict[str, Any], inputs: dict[str, str]) -> Any:
            return self._build(step, pool)

        result: Any = stage(str(step.fingerprint), step.config.identity(), step.inputs)
        return result

    def _build(self, step: Step, pool: Executor | None) -> tuple[Artifact, str, float]:
        """Build and seal one artifact under its lock, unless another run has just done so."""
        name, stage = str(step.fingerprint), step.stage.name
        inputs = {source: self._input(source) for source in step.stage.inputs}
        with self._locked(stage, name):
            sealed = self.store.get(stage, name)
            if sealed and not (
                step.artifact and sealed.manifest["finished"] == step.artifact.manifest["finished"]
            ):
                return sealed, "reused", 0.0
            how = "resumed" if self.store.partial(stage, name).exists() else "ran"
            self.terminal.stage_started(stage, "; ".join(step.why)[:120])
            with self.store.building(stage, name) as out, self._failures(stage, out):
                artifact = self._run_body(step, inputs, out, pool)
        self.terminal.stage_ended("✓", headline(artifact))
        self.tracker.finish_stage(artifact, self.recipe.runtime.upload_mb * 1e6)
        return artifact, how, artifact.manifest["seconds"]

    def _run_body(
        self, step: Step, inputs: Mapping[str, Artifact], out: Path, pool: Executor | None
    ) -> Artifact:
        """Call the stage's body on its folders, and seal what it wrote."""
        assert step.config
        stage, name, workers = step.stage.name, str(step.fingerprint), self.recipe.runtime.worker_count
        self.tracker.start_stage(stage, out, step.config.identity(), self._tags(step), list(inputs.values()))
        context = PrefectContext(stage, out, workers, pool, self.terminal, self.tracker)
        started, clock = now(), time.monotonic()
        paths = {source: artifact.path for source, artifact in inputs.items()}
        metrics = step.stage.body(step.config, paths, out, context)
        seconds = time.monotonic() - clock
        self._body_seconds += seconds
        manifest = self._manifest(step, inputs, metrics, context.notes)
        manifest |= {"started": started, "finished": now(), "seconds": round(seconds, 3)}
        return self.store.seal(stage, name, manifest)

    def _input(self, stage: str) -> Artifact:
        return next(artifact for artifact, _, _ in self.results if artifact.stage == stage)

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
            self._failed(str(error))
            raise self._stage_failed(stage, out, error) from error
        except BaseException:
            self._failed("stopped")
            raise

    def _failed(self, message: str) -> None:
        self.terminal.stage_ended("✗", message.splitlines()[0][:120] if message else "failed", "red")
        self.tracker.fail_stage(message)

    def _stage_failed(self, stage: str, out: Path, error: Exception) -> StageFailed:
        log = out / LOGS / "failure.txt"
        try:
            log.parent.mkdir(exist_ok=True)
            log.write_text("".join(traceback.format_exception(error)))
        except OSError:
            pass  # the failure itself matters more than its log
        return StageFailed(
            f"{stage} failed: {type(error).__name__}: {error}\nresume with: {self.command}\ntrace: {log}"
        )

    def _tags(self, step: Step) -> dict[str, str]:
        return {
            "llmill.stage": step.stage.name,
            "llmill.recipe": self.recipe.name,
            "llmill.fingerprint": str(step.fingerprint),
            "llmill.prefect_flow_run_id": str(flow_run.id),
        }

    def _manifest(
        self, step: Step, inputs: Mapping[str, Artifact], metrics: Mapping[str, float], notes: list[str]
    ) -> dict[str, Any]:
        """All of the manifest that the store does not know by itself."""
        assert step.config
        return {
            "version": step.stage.version,
            "config": step.config.identity(),
            "runtime": step.config.model_dump(mode="json", include={"runtime"}).get("runtime", {}),
            "inputs": {
                name: {"fingerprint": artifact.fingerprint, "payload_sha256": artifact.payload_sha256}
                for name, artifact in inputs.items()
            },
            "metrics": dict(metrics),
            "notes": notes,
            "recipe": self.recipe.name,
            "mlflow_run_id": self.tracker.stage_id,
            "prefect_flow_run_id": str(flow_run.id),
            "code": {"version": version("llmill"), "commit": git_commit()},
            "host": describe_host(),
            "libraries": {name: version(name) for name in LIBRARIES},
        }

    def _start_tracking(self) -> None:
        params = {step.stage.name: step.config.identity() for step in self.steps if step.config}
        tags = {"llmill.recipe": self.recipe.name, "llmill.prefect_flow_run_id": str(flow_run.id)}
        if self.recipe.description:
            tags["mlflow.note.content"] = self.recipe.description
        self.tracker.start(f"{self.recipe.name}-{self.steps[-1].fingerprint}", params, tags)
        recipe = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        self.tracker.attach("recipe.yaml", recipe)

    def _finish_tracking(self, status: str) -> None:
        rows = [
            f"| {a.stage} | {how} | {headline(a)} | {s:.1f} | `{a.fingerprint}` |"
            for a, how, s in self.results
        ]
        table = "\n".join(["| stage | | result | seconds | artifact |", "|---|---|---|---:|---|", *rows])
        self.tracker.attach("summary.md", table + "\n")
        self.tracker.finish(status, time.monotonic() - self._started)

    @property
    def overhead_seconds(self) -> float:
        """Wall time so far outside the stages' bodies: planning, sealing, Prefect and MLflow."""
        return time.monotonic() - self._started - self._body_seconds


def disk_is_full(home: Path, error: BaseException | None) -> bool:
    """Whether a failure comes from want of room: it says so, or hardly anything is left where all is written.

    Not only our own writes fail then; the databases of Prefect and MLflow have other words for it.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return shutil.disk_usage(home).free < FULL_BYTES


def git_commit() -> str | None:
    """The commit of the checkout this code runs from, with ``-dirty`` where it was changed; None outside of one."""
    root = Path(__file__).parent.parent
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe_host() -> dict[str, Any]:
    """Where an artifact was made."""
    return {
        "name": socket.gethostname(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "pid": os.getpid(),
    }
