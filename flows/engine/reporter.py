"""The report of a run on itself: the events of its log, from a plan and what becomes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from data_pipeline.core.errors import UserError
from data_pipeline.core.text import last_lines
from flows.engine.continuation import Continuation, Known, plan_id
from flows.engine.events import (
    Compared,
    RunEnded,
    RunStarted,
    StepFailed,
    StepReused,
    StepSealed,
    StepStarted,
)
from flows.engine.log import RunLog
from flows.engine.order import Host, Order, Result
from flows.engine.plan import Step
from flows.engine.store import Artifact
from flows.engine.training import EVENTS, read_lines
from flows.recipe import Recipe

LAST_LINES = 20


class Reporter:
    """Appends the events of one run."""

    def __init__(self, order: Order, log: RunLog, host: Host) -> None:
        self._order, self._log, self._host = order, log, host
        self._store = order.planned.uses.store
        self.keys = Continuation(self._store.home)
        self.known = Known(key=order.run_key, new=False)
        """The key and the name by which the run is known."""
        self.started = time.monotonic()
        self.open_key = ""
        """The key of the step that is logged as begun, and not as ended."""
        self._compared: list[dict[str, str]] = []
        self._ended = threading.Lock()

    @property
    def _run(self) -> str:
        """The key of the run to which steps are reported; empty where who dispatched us reports them."""
        return "" if self._order.run_key else self.known.key

    def run_started(self) -> None:
        order, recipe, steps = self._order, self._order.recipe, self._order.planned.steps
        if not order.run_key:
            self.known = self.keys.claim(plan_id(recipe, steps), order.name)
        started = RunStarted(
            key=self.known.key,
            name=order.name,
            renamed=self.known.name not in ("", order.name),
            new=self.known.new,
            joined=bool(order.run_key),
            recipe=recipe.name,
            steps=[planned_step(step) for step in steps],
            params={step.name: step.config.identity() for step in steps if step.config},
            resolved=resolved_yaml(recipe, steps),
            sweep=order.sweep,
            flow_run=self._host.flow_run(),
            notify=[] if order.run_key else list(recipe.runtime.notify),
            **described_run(self._order),
        )
        self._log.append(started)

    def conclude(self, results: Mapping[str, Result]) -> None:
        """Log how what was made compares with what was there; who dispatched us does that for us."""
        if self._run:
            self._compared = comparisons(self._order, self._run, results, log=self._log)

    def run_ended(
        self, status: str, results: Mapping[str, Result], *, message: str, step: str, details: str
    ) -> None:
        """Log, once, how the run ended: FINISHED, FAILED or KILLED; ``step`` was at work, ``details`` has its trace."""
        if not self._ended.acquire(blocking=False):
            return
        ended = RunEnded(
            key=self._run,
            status=status,
            seconds=time.monotonic() - self.started,
            message=message,
            step=step,
            log=last_lines(details, LAST_LINES),
            results=[done_step(name, result) for name, result in results.items()],
            compared=self._compared,
            name=self._order.name,
            **described_run(self._order),
        )
        if self._log.append(ended) and status == "FINISHED":
            self.keys.end()

    def release(self) -> None:
        """Let other runs of the plan resume this one."""
        self.keys.release()

    def step_reused(self, step: Step, result: Result) -> None:
        artifact = result.artifact
        reused = StepReused(
            step=step.name,
            stage=step.stage.name,
            fingerprint=str(step.fingerprint),
            run=self._run,
            how=result.how,
            seconds=result.seconds,
            quoting=self._order.recipe.runtime.upload_texts,
            **described(artifact),
            **made_by(artifact),
        )
        self._log.append(reused)

    def step_started(
        self, step: Step, inputs: Sequence[Artifact], *, late: bool, resumed: bool
    ) -> StepStarted:
        """Log that a step is built, or resumed; ``late``: that it was, by a run that had no time to log it."""
        stage, name = step.stage.name, str(step.fingerprint)
        known = self.keys.step(stage, name)
        folder = self._store.partial(stage, name)
        assert step.config
        config = step.artifact.manifest["config"] if late and step.artifact else step.config.identity()
        started = StepStarted(
            step=step.name,
            stage=stage,
            fingerprint=name,
            key=known.key,
            new=known.new,
            run=self.known.key,
            recipe=self._order.recipe.name,
            why="; ".join(step.why)[:120],
            resumed=resumed and not known.new,
            late=late,
            params=config,
            inputs=[described_input(one) for one in inputs],
            seen=0 if known.new or late else read_lines(folder / EVENTS, 0)[1],
            begun=known.begun,
            quoting=self._order.recipe.runtime.upload_texts,
            flow_run=self._host.flow_run(),
        )
        self.open_key = known.key  # before it is logged: a stop may come within that
        self._log.append(started)
        return started

    def step_sealed(self, step: Step, started: StepStarted, result: Result) -> None:
        """Log that an artifact is there; from here on it need not be logged again."""
        artifact, runtime = result.artifact, self._order.recipe.runtime
        sealed = StepSealed(
            step=step.name,
            stage=artifact.stage,
            fingerprint=artifact.fingerprint,
            key=started.key,
            run=self._run,
            recipe=artifact.manifest["recipe"],
            how=result.how,
            seconds=result.seconds,
            total_seconds=artifact.manifest["seconds"],
            size=artifact.size,
            payload_sha256=artifact.payload_sha256,
            **described(artifact),
            late=started.late,
            resumed=started.resumed,
            withheld=step.stage.texts and not runtime.upload_texts,
            quoting=runtime.upload_texts,
            upload_bytes=runtime.upload_mb * 1e6,
            candidate=not self._order.sweep,
        )
        kept = self._log.append(sealed)
        self.open_key = ""
        if kept:
            self.keys.forget(artifact.stage, artifact.fingerprint)

    def step_failed(self, step: str, message: str, status: str) -> None:
        self._log.append(StepFailed(step=step, message=message, status=status, key=self.open_key))
        self.open_key = ""


def described(artifact: Artifact) -> dict[str, Any]:
    """Where an artifact is, its metrics, and when it was sealed."""
    return {"path": str(artifact.path), "metrics": artifact.metrics, "finished": artifact.sealed_at}


def made_by(artifact: Artifact) -> dict[str, Any]:
    """The run in MLflow that made an artifact, as far as its manifest knows."""
    manifest = artifact.manifest
    return {"made_by": manifest.get("mlflow_run_id", ""), "made_by_key": manifest.get("mlflow_key", "")}


def planned_step(step: Step) -> dict[str, Any]:
    """A step of the plan, as the log has it."""
    return {
        "step": step.name,
        "stage": step.stage.name,
        "action": step.action,
        "fingerprint": step.fingerprint,
        "why": step.why,
    }


def done_step(name: str, result: Result) -> dict[str, Any]:
    """A step that is done, as the log has it."""
    return {
        "step": name,
        "stage": result.artifact.stage,
        "fingerprint": result.artifact.fingerprint,
        "how": result.how,
        "seconds": result.seconds,
    }


def described_input(artifact: Artifact) -> dict[str, Any]:
    """An input, as the log has it."""
    return {
        "stage": artifact.stage,
        "fingerprint": artifact.fingerprint,
        "path": str(artifact.path),
        "metrics": artifact.metrics,
    }


def resolved_yaml(recipe: Recipe, steps: Sequence[Step]) -> str:
    """A recipe as it was resolved: where a source is does not count, but its listing does."""
    head: dict[str, Any] = {"name": recipe.name, "description": recipe.description}
    head["runtime"] = recipe.runtime.model_dump(mode="json")
    return yaml.safe_dump(head | dict(map(resolved_step, steps)), sort_keys=False, allow_unicode=True)


def resolved_step(step: Step) -> tuple[str, Mapping[str, Any]]:
    """Name and settings of a step, with its place among the others where the recipe must name it."""
    settings: dict[str, Any] = {"stage": step.stage.name} if step.name != step.stage.name else {}
    settings |= {"inputs": step.sources} if settings and step.sources else {}
    if step.config:
        runtime = step.config.runtime.model_dump(mode="json")
        settings |= step.config.identity() | ({"runtime": runtime} if runtime else {})
    return step.name, settings


def described_run(order: Order) -> dict[str, Any]:
    """Return the fields that a run's first and last event have in common."""
    return {
        "description": "\n\n".join(filter(None, (order.note, order.recipe.description))),
        "command": order.command,
        "store": str(order.planned.uses.store.root.resolve()),
        "quoting": order.recipe.runtime.upload_texts,
    }


def comparisons(
    order: Order, key: str, results: Mapping[str, Result], *, log: RunLog
) -> list[dict[str, str]]:
    """Log the comparisons that an order asks for, and describe them; that one can't be made is no failure of a run."""
    described = []
    try:
        for compared in order.conclude(order, key, results):
            log.append(compared)
            described.append(summary(compared))
    except UserError as error:
        log.note(f"not compared with the run before: {error}")
    except Exception as error:
        log.warn(f"not compared with the run before: {type(error).__name__}: {error}")
    return described


def summary(compared: Compared) -> dict[str, str]:
    """Describe a comparison, without its page."""
    return {name: getattr(compared, name) for name in ("step", "before", "verdict", "page")}
