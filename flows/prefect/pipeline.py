"""The pipeline: a Prefect flow over the stages' table, each stage a subflow, each sealed in the store.

Only a manifest says "done". So a second run of the same recipe, a run after a failure and a run after ``kill -9``
are all the same thing: sealed stages are reused, an unfinished one goes on where it stopped.
"""

from __future__ import annotations

import errno
import functools
import gc
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from logging import INFO, WARNING
from pathlib import Path
from threading import Lock
from typing import Any

import yaml
from prefect import flow, tags
from prefect.events.worker import EventsWorker
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY as HEARTBEATS

from data_pipeline.core.errors import UserError
from data_pipeline.core.text import human_bytes, last_lines
from data_pipeline.discards import warnings
from flows.engine.launch import Interrupted
from flows.engine.manifest import describe_making
from flows.engine.plan import Planned, Selection, Step, ancestors, plan_and_hold
from flows.engine.ports import answers
from flows.engine.stopping import Stop, asked, ending_in_time
from flows.engine.store import LOGS, Artifact, Store, begin_attempt, now, origin_of
from flows.engine.uses import Uses, recover
from flows.listeners.flow_page import FlowPage
from flows.listeners.markdown import code
from flows.listeners.mlflow.description import run_note, summary_table
from flows.listeners.mlflow.tracker import Tracker
from flows.listeners.notices import LAST_LINES, Notice, check_receivers, send_notice, unset_receivers
from flows.listeners.terminal import Terminal, duration, headline
from flows.prefect.context import PrefectContext
from flows.prefect.dispatch import Dispatcher
from flows.prefect.flow_runs import STOPS, at_work, give_up, in_flow, settle
from flows.prefect.names import FLOW, TIME
from flows.prefect.runners import Workers, reach, start_workers
from flows.recipe import Recipe
from flows.stages import WITH_TEXTS

MOST_ENTRIES = 20  # of a list among a flow run's parameters
EVENTS_SECONDS = 5.0  # for what Prefect's server has not been told of states when a run ends
FULL_BYTES = 1_000_000  # less free space than this, and no stage can seal its manifest


class StageFailed(Exception):
    """A stage ended with an error that is not the user's mistake; the message says how to resume it."""


@dataclass(frozen=True)
class Result:
    """What became of one stage."""

    artifact: Artifact
    how: str
    """``reused``, ``ran``, ``resumed`` or, by a flow run elsewhere, ``dispatched``."""
    seconds: float
    """In the stage's body, this time; 0 where it was reused."""


@dataclass(frozen=True)
class Failure:
    """Why a stage failed, and the last lines that it said."""

    message: str = ""
    log: str = ""


class Run:
    """One run of a recipe: its plan, and the flow that carries it out."""

    def __init__(
        self,
        recipe: Recipe,
        home: Path,
        selection: Selection,
        terminal: Terminal,
        command: str,
        dispatcher: Dispatcher | None = None,
        sweep: str = "",
        planned: Planned | None = None,
    ) -> None:
        self.recipe, self.selection, self.terminal = recipe, selection, terminal
        self.command = command
        """What a person types to run this again; said when a stage fails."""
        if recipe.runtime.elsewhere:
            home = home.resolve()  # a worker elsewhere has another current folder
        self.store = Store(home)
        self.tracker = Tracker(home, recipe.name, self._warn)
        self._uses = planned.uses if planned else Uses(self.store)
        self.steps: list[Step] = planned.steps if planned else []
        self.results: dict[str, Result] = {}
        self._dispatcher = dispatcher or Dispatcher()
        self._sweep = sweep  # the key of the run in MLflow that this one is a part of
        self.look: Callable[[Artifact], None] = lambda artifact: None
        """Sees each stage's artifact before the next one begins; what it raises ends the run."""
        self._started = time.monotonic()
        self._workers: Workers
        self._page: FlowPage
        self._at_work = ""
        self._failure = Failure()
        self._context: PrefectContext | None = None
        self._ended = Lock()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Prefect sends a stage's flow along with its tasks; no worker ever calls it, so nothing of the run goes."""
        return object, ()

    def prepare(self) -> None:
        """Make the plan, and reach the workers' cluster and MLflow.

        Raises:
            UserError: the plan can't be made, a stage can't be resolved from here, or no cluster answers.
        """
        check_receivers(self.recipe.runtime.notify)
        for receiver in unset_receivers(self.recipe.runtime.notify):
            self._warn(f"runtime.notify: {receiver} can't be told of this run's end: the variable is not set")
        if not self.steps:
            recover(self.store)
            self.steps = plan_and_hold(self.recipe, self.store, self.selection, self._uses)
        for step in self.steps:
            if step.action == "unknown":
                raise UserError(f"{step.name}: {'; '.join(step.why)}")
            self._dispatcher.check(step)
            self._check_forced(step)
        for step in self.steps:
            if step.action != "reuse":
                _ = step.stage.body  # its libraries take seconds to import, in which a server of ours starts
        if self._computes:
            reach(self.recipe.runtime)
        self.tracker.open()

    def _check_forced(self, step: Step) -> None:
        """See that nobody reads what is to be built again and replaced."""
        if step.why == ["--force"] and self._uses.others(step.stage.name, str(step.fingerprint)):
            raise UserError(
                f"another run is using {step.stage.name} {step.fingerprint}, which --force would replace under it: "
                "wait for its end, or stop it"
            )

    def execute(self, parameters: Mapping[str, Any]) -> None:
        """Carry the plan out as a Prefect flow of this process; `results` then holds what became of each stage.

        ``parameters`` are those by which a deployment would run the same.
        """
        name = f"{self.recipe.name} {datetime.now():{TIME}}"

        def start(body: Callable[[], Any]) -> None:
            # No retries of Prefect's: whoever runs the recipe again goes on where this run ended.
            @flow(name=FLOW, flow_run_name=name, retries=0, validate_parameters=False)
            def pipeline(**parameters: Any) -> Any:
                return body()

            with tags(self.recipe.name):
                pipeline(**parameters)

        with ExitStack() as stack:
            if HEARTBEATS.name not in os.environ:
                # A flow waits up to a second for the thread that sends them to wake and end.
                stack.enter_context(temporary_settings({HEARTBEATS: None}))
            try:
                in_flow(start, self._noted, lambda: self._missed("the run"))
            finally:
                # What is still queued must reach the server before ours is stopped, or Prefect prints a trace.
                if answers(PREFECT_API_URL.value()):
                    APILogHandler().flush()
                    EventsWorker.drain_all(timeout=EVENTS_SECONDS)
                settle(self.store.home)

    def _noted(self) -> None:
        with at_work(self.store.home):
            self.work()

    def work(self) -> None:
        """Carry the plan out within the flow run that calls this, if there is one.

        Raises:
            Stop: somebody wanted it to end; the message says who, and what is kept.
        """
        keep_imports()
        try:
            with ExitStack() as stack:
                stack.enter_context(ending_in_time(self._give_up))
                stack.callback(self._uses.release)
                settle(self.store.home)
                if self._computes:
                    self._workers = stack.enter_context(start_workers(self.recipe.runtime, self.store.home))
                self._pipeline()
        except Exception as error:
            if not isinstance(error, UserError) and disk_is_full(self.store.home, error):
                where = f"{self.store.home.resolve()} ({human_bytes(shutil.disk_usage(self.store.home).free)} free)"
                raise UserError(
                    f"the disk is full: {where}; make room, then `{self.command}` goes on"
                ) from None
            raise

    @property
    def _computes(self) -> bool:
        """Whether the plan has a stage to build; where it has none, no workers are needed."""
        return any(step.action != "reuse" for step in self.steps)

    @property
    def overhead_seconds(self) -> float:
        """Wall time so far outside the stages' bodies: planning, sealing, Prefect and MLflow."""
        return time.monotonic() - self._started - sum(result.seconds for result in self.results.values())

    def _pipeline(self) -> None:
        """The body of the pipeline's flow: every step in order, told to MLflow and on the flow run's page."""
        self._page = FlowPage(flow_run.id, self.recipe.name)
        self._start_tracking()
        status = "KILLED"
        try:
            for step in self.steps:
                self._at_work = step.name
                self._show_stages("running")
                result = self._stage(step)
                self.results[step.name] = result
                shown = step.stage.shown(result.artifact.metrics)
                self.tracker.add_to_parent(step.name, result.artifact, result.how, shown)
            status, self._at_work = "FINISHED", ""
        except Exception:
            status = "FAILED"
            raise
        except STOPS as stop:
            raise self._stopped(stop) from None
        finally:
            self._end(status)

    def _end(self, status: str) -> None:
        """Tell everybody, once, how the run ended: FINISHED, FAILED or KILLED."""
        if not self._ended.acquire(blocking=False):
            return
        self._show_stages({"KILLED": "stopped", "FAILED": "failed"}.get(status, ""))
        self._finish_tracking(status)
        self._page.close()
        self._give_notice(status)

    def _give_up(self) -> None:
        """Tell everybody that the run was stopped, while what is at work does not let it end."""
        if not self._failure.message:
            self._failed(str(self._stopped(Stop())), "", "KILLED")
        self._warn(
            f"{self._failure.message}: ended by force; the same command goes on from here: {self.command}"
        )
        with suppress(Exception):
            give_up(self._failure.message)
        self._end("KILLED")

    def _stopped(self, stop: BaseException) -> Stop:
        """What a stop is raised as: the message says in which stage, who wanted it, and what is kept of that."""
        if not self._failure.message:
            why = asked.why or (str(stop) if isinstance(stop, Stop) else "stopped by Prefect")
            told = isinstance(stop, Interrupted)  # it says itself what is saved
            kept = self._context.kept if self._context and not told else ""
            where = f"{self._at_work}: " if self._at_work else ""
            self._failure = Failure("; ".join(part for part in (f"{where}{why}", kept) if part))
        return Stop(self._failure.message)

    def _stage(self, step: Step) -> Result:
        """Reuse one stage's artifact, have it built elsewhere, or build it in a Prefect flow of its own."""
        assert step.config
        name = step.name
        if step.action == "reuse" and step.artifact and self._made_from_ours(step, step.artifact):
            self._settle(step, step.artifact)
            result = Result(step.artifact, "reused", 0.0)
        elif self._dispatcher.takes(name):
            result = self._dispatch(step)
        else:
            result = in_flow(
                lambda body: self._subflow(step, body), lambda: self._build(step), lambda: self._missed(name)
            )
        if result.how == "reused":
            self.terminal.stage_reused(name, f"{headline(result.artifact)}  (reused)")
        log(f"{name} {result.how}: {headline(result.artifact)} · {duration(result.seconds)}")
        self._warn_of_discards(result.artifact)
        self.look(result.artifact)
        return result

    def _warn_of_discards(self, artifact: Artifact) -> None:
        """Warn of what a stage discarded in a share that the recipe does not allow without a word."""
        for line in warnings(artifact.metrics, self.recipe.runtime.discard_shares):
            text = f"{artifact.stage}: {line}; see {artifact.path}"
            self._warn(text)
            log(text, WARNING)

    def _subflow(self, step: Step, body: Callable[[], Any]) -> None:
        """Call ``body`` as a Prefect flow named as the step."""
        assert step.config
        name = step.name
        runner: Any = self._workers.task_runner()

        @flow(name=name, flow_run_name=f"{name} {step.fingerprint}", task_runner=runner, retries=0)
        def stage(fingerprint: str, config: dict[str, Any], inputs: dict[str, str]) -> Any:
            return body()

        # The parameters are there to be read on the flow run's page.
        stage(str(step.fingerprint), shortened(step.config.identity()), step.inputs)

    def _dispatch(self, step: Step) -> Result:
        """Have a stage built by a flow run of its own deployment, and wait for it."""
        name, clock = step.name, time.monotonic()
        stage = step.stage.name
        self.terminal.stage_started(name, f"dispatched as {self._dispatcher.deployment(name)}")
        try:
            with self._uses.apart(stage, str(step.fingerprint)):  # else it could not replace what is there
                self._dispatcher.run(name, self.tracker.parent_key, self.selection.force == name)
        except BaseException as error:
            self.terminal.stage_ended(
                "✗", str(error).splitlines()[0][:120] if str(error) else "stopped", "red"
            )
            raise
        artifact = self.store.get(stage, str(step.fingerprint))
        if artifact is None:
            raise StageFailed(
                f"{name}: its flow run ended well, but {step.fingerprint} is not in {self.store.root}: do its worker "
                "and this one share the home, and resolve the recipe alike?"
            )
        self.terminal.stage_ended("✓", headline(artifact))
        return Result(artifact, "dispatched", time.monotonic() - clock)

    def _show_stages(self, state: str) -> None:
        """Show the table of stages, the one at work in ``state``, and where else to look."""
        rows = []
        for step in self.steps:
            name, result = step.name, self.results.get(step.name)
            at_work = name == self._at_work
            rows.append(
                {
                    "stage": name,
                    "state": result.how if result else state if at_work else "waiting",
                    "result": headline(result.artifact) if result else "",
                    "duration": duration(result.seconds) if result and result.seconds else "",
                    "fingerprint": str(step.fingerprint),
                }
            )
        done = f"{len(self.results)} of {len(self.steps)} stages done"
        self._page.stages(rows, f"{done}, {self._at_work} {state}" if self._at_work else done)
        self._page.links(self._links(), self.tracker.page_url or "where else to look")

    def _links(self) -> str:
        run = f"“{self.tracker.parent_name}”" if self.tracker.parent_name else "of this plan"
        mlflow = f"MLflow run {run}; `llmill ui` shows it"
        if url := self.tracker.page_url:
            mlflow = f"[run {run} in MLflow]({url}) · [all runs of the recipe]({self.tracker.table_url})"
        return f"{mlflow}\n\nartifacts: {code(str(self.store.root.resolve()))}\n\nagain by hand: {code(self.command)}\n"

    def _warn(self, text: str) -> None:
        self.terminal.note(text, warning=True)

    def _missed(self, what: str) -> None:
        """Say that Prefect did not learn how something began or ended."""
        self._warn(f"Prefect at {PREFECT_API_URL.value()} does not answer; {what} goes on without it")

    def _give_notice(self, status: str) -> None:
        """Tell those whom the recipe names what became of the run."""
        receivers = self.recipe.runtime.notify
        if not receivers:
            return
        state = {"FINISHED": "completed", "FAILED": "failed", "KILLED": "stopped"}[status]
        notice = Notice(
            recipe=self.recipe.name,
            state=state,
            summary=self._failure.message or ", ".join(f"{name} {r.how}" for name, r in self.results.items()),
            stage=self._at_work,
            log=self._failure.log,
            resume=self.command if status != "FINISHED" else "",
            prefect_url=flow_run.ui_url or "",
            mlflow_url=self.tracker.page_url,
            seconds=round(time.monotonic() - self._started, 1),
        )
        send_notice(notice, receivers, self._warn)

    def _inputs(self, step: Step) -> dict[str, Artifact]:
        """Type of an input -> its artifact."""
        return {type_: self.results[name].artifact for type_, name in step.sources.items()}

    def _made_from_ours(self, step: Step, artifact: Artifact) -> bool:
        """Whether an artifact's inputs are, byte for byte, the ones of this run (one may have been built again)."""
        return all(
            artifact.inputs[type_].payload_sha256 == one.payload_sha256
            for type_, one in self._inputs(step).items()
        )

    def _settle(self, step: Step, artifact: Artifact) -> None:
        """Tell MLflow of an artifact whose run was killed between sealing it and telling."""
        lock = self.store.lock(artifact.stage, artifact.fingerprint)
        with suppress(TimeoutError), lock.acquire(timeout=0):  # who holds the lock is about to tell it
            if self.tracker.unfinished(artifact):
                self._start_tracking_stage(step, artifact.manifest["config"])
                self._finish_tracking_stage(artifact)

    def _build(self, step: Step) -> Result:
        """Build and seal one artifact under its lock, unless another run has just done so."""
        stage, name = step.stage.name, str(step.fingerprint)
        with self._locked(stage, name):
            sealed = self.store.get(stage, name)
            planned = step.artifact.manifest["finished"] if step.artifact else None
            if sealed and sealed.manifest["finished"] != planned and self._made_from_ours(step, sealed):
                return Result(sealed, "reused", 0.0)
            origin = {"inputs": origin_of(self._inputs(step)), "forced": self.selection.force == step.name}
            out, begun = self.store.begin(stage, name, origin)
            self.terminal.stage_started(step.name, "; ".join(step.why)[:120])
            with self._failures(step.name, out):
                artifact, seconds = self._run_body(step, out)
            self.terminal.stage_ended("✓", headline(artifact))
            self._finish_tracking_stage(artifact)
        return Result(artifact, "resumed" if begun else "ran", seconds)

    def _run_body(self, step: Step, out: Path) -> tuple[Artifact, float]:
        """Call the stage's body on its folders, and seal what it wrote; how many seconds the body took this time."""
        assert step.config
        stage, name = step.stage.name, str(step.fingerprint)
        inputs = self._inputs(step)
        self._start_tracking_stage(step, step.config.identity())
        context = PrefectContext(step.name, out, self._workers, self.terminal, self.tracker, self._page)
        self._context = context
        manifest = describe_making(step, self.recipe, inputs) | {"started": now()}
        earlier_attempts, earlier_seconds = begin_attempt(out)
        clock = time.monotonic()
        folders = {type_: artifact.path for type_, artifact in inputs.items()}
        if step.stage.lineage:
            before = ancestors(self.steps, [step.name])
            folders |= {one: result.artifact.path for one, result in self.results.items() if one in before}
        metrics = step.stage.body(step.config, folders, out, context)
        seconds = time.monotonic() - clock
        manifest |= {
            "metrics": dict(metrics),
            "notes": context.notes,
            "finished": now(),
            "attempts": earlier_attempts + 1,
            "seconds": round(earlier_seconds + seconds, 3),
            "mlflow_run_id": self.tracker.stage_id,
            "mlflow_key": self.tracker.stage_key,
            "prefect_flow_run_id": str(flow_run.id),
        }

        def busy() -> None:
            self.terminal.note(
                f"another run is using {stage} {name}; this one takes its place when that ends"
            )

        replacing = partial(self._uses.alone, stage, name, busy)
        return self.store.seal(stage, name, manifest, context.checksum, replacing), seconds

    @contextmanager
    def _locked(self, stage: str, fingerprint: str) -> Iterator[None]:
        lock = self.store.lock(stage, fingerprint)
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            self.terminal.note(f"another run is building {stage} {fingerprint}; waiting for it")
            with self._uses.apart(stage, fingerprint):
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
            self._failed(str(error), str(error))
            raise UserError(f"{stage}: {error}") from None
        except Exception as error:
            trace = "".join(traceback.format_exception(error))
            self._failed(f"{type(error).__name__}: {error}", trace)
            log = out / LOGS / "failure.txt"
            with suppress(OSError):  # the failure itself matters more than its log
                log.parent.mkdir(exist_ok=True)
                log.write_text(trace)
            raise StageFailed(
                f"{stage} failed: {type(error).__name__}: {error}\nresume with: `{self.command}`\ntrace: {log}"
            ) from error
        except STOPS as stop:
            stopped = self._stopped(stop)
            self._failed(str(stopped), "", "KILLED")
            raise stopped from None

    def _failed(self, message: str, text: str, status: str = "FAILED") -> None:
        self._failure = Failure(message, last_lines(text, LAST_LINES))
        self.terminal.stage_ended("✗", message.splitlines()[0][:120], "red")
        log(message)
        self.tracker.fail_stage(message, status)

    def _start_tracking(self) -> None:
        """Begin the parent run: identity as params, the resolved recipe as a file."""
        identities = {step.name: step.config.identity() for step in self.steps if step.config}
        labels = {"llmill.recipe": self.recipe.name, **prefect_labels()}
        if self.recipe.description:
            labels["mlflow.note.content"] = self.recipe.description
        key = f"{self.recipe.name}-{self.steps[-1].fingerprint}"
        self.tracker.start(key, identities, labels, self._dispatcher.parent_key)
        if self._sweep:
            self.tracker.belong_to(self._sweep)
        resolved: dict[str, Any] = {"name": self.recipe.name, "description": self.recipe.description}
        resolved["runtime"] = self.recipe.runtime.model_dump(mode="json")
        for step in self.steps:
            if step.config:
                runtime = step.config.runtime.model_dump(mode="json")
                resolved[step.name] = step.config.identity() | ({"runtime": runtime} if runtime else {})
        self.tracker.attach("recipe.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))

    def _start_tracking_stage(self, step: Step, identity: Mapping[str, Any]) -> None:
        """Begin (or go on with) a step's child run."""
        labels = {
            "llmill.stage": step.stage.name,
            "llmill.step": step.name,
            "llmill.recipe": self.recipe.name,
            "llmill.fingerprint": str(step.fingerprint),
            **prefect_labels(),
        }
        name = (step.name, step.stage.name, str(step.fingerprint))
        self.tracker.start_stage(name, identity, labels, list(self._inputs(step).values()))

    def _finish_tracking_stage(self, artifact: Artifact) -> None:
        """End a stage's child run, with the files that the recipe lets MLflow have."""
        runtime = self.recipe.runtime
        withheld = artifact.stage in WITH_TEXTS and not runtime.upload_texts
        self.tracker.finish_stage(artifact, runtime.upload_mb * 1e6, withheld)

    def _finish_tracking(self, status: str) -> None:
        results = {
            stage: (result.artifact, result.how, result.seconds) for stage, result in self.results.items()
        }
        self.tracker.attach("summary.md", summary_table(results))
        self.tracker.note(
            run_note(
                self.recipe.description,
                results,
                failure=self._failure.message,
                links=self._links(),
                quoting=self.recipe.runtime.upload_texts,
            )
        )
        self.tracker.finish(status, time.monotonic() - self._started)
        self.tracker.close(status)


@functools.cache
def keep_imports() -> None:
    """Let the garbage collector pass over what is there by now: half a million objects that live to the end.

    To go through them takes it 0.3 s, in the midst of a stage.
    """
    gc.freeze()


def log(text: str, level: int = INFO) -> None:
    """A line in the log of the flow run, which Prefect shows on its page."""
    with suppress(MissingContextError):
        get_run_logger().log(level, text)


def prefect_labels() -> dict[str, str]:
    """The tags by which a run in MLflow leads back to its flow run in Prefect; none outside of one."""
    if not flow_run.id:
        return {}
    return {"llmill.prefect_flow_run_id": str(flow_run.id), "llmill.prefect_url": str(flow_run.ui_url)}


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
