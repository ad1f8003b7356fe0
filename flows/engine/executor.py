"""The executor walks a plan: it reuses what is sealed, builds the rest under its lock and seals it, and logs
that. It knows neither Prefect nor MLflow: where work is done, and how a run may be stopped, is up to its `Host`.

Only a manifest says "done". So a second run of the same recipe, a run after a failure and a run after ``kill -9`` are
all the same thing: sealed steps are reused, an unfinished one is resumed where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from data_pipeline.discards import warnings
from flows.engine.context import training_started
from flows.engine.course import Course
from flows.engine.elsewhere import Elsewhere
from flows.engine.log import RunLog
from flows.engine.manifest import describe_making
from flows.engine.order import Host, Order, Result
from flows.engine.plan import Step, ancestors
from flows.engine.reporter import Reporter
from flows.engine.store import Artifact, Store, begin_attempt, now, origin_of


class Executor:
    """One run of a plan."""

    def __init__(self, order: Order, log: RunLog, host: Host) -> None:
        self.order, self.log, self._host = order, log, host
        self.store: Store = order.planned.uses.store
        self.results: dict[str, Result] = {}
        self.reporter = Reporter(order, log, host)
        self._course = Course(order, log, host, self.reporter, self.results)
        self._elsewhere = Elsewhere(order, log, self.reporter)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Prefect sends a step's flow along with its tasks; no worker ever calls it, so nothing of the run goes."""
        return object, ()

    @property
    def overhead_seconds(self) -> float:
        """Wall time so far outside the bodies: planning, sealing, Prefect and MLflow."""
        elapsed = time.monotonic() - self.reporter.started
        here = sum(result.seconds for result in self.results.values() if result.how != "dispatched")
        return elapsed - here - self._elsewhere.seconds

    def run(self) -> None:
        """Carry the plan out; `results` then holds what became of each step.

        Raises:
            Stop: somebody wanted it to end; the message says who, and what is kept.
        """
        planned = self.order.planned
        with (
            self._course.reported(),
            self._host.at_work(planned.builds, self._course.give_up),
            self._elsewhere.ended_with_us(),
        ):
            waiting = list(planned.steps)
            while waiting or self._elsewhere.steps:
                self._advance(waiting)
            self._course.begin("")
            self.reporter.conclude(self.results)

    def _advance(self, waiting: list[Step]) -> None:
        """Do the first of the ``waiting`` steps that can be done; where none can, wait for one that is elsewhere."""
        ready = [step for step in waiting if set(step.sources.values()) <= self.results.keys()]
        for step in ready:
            if artifact := self._reusable(step):
                waiting.remove(step)
                self._course.begin(step.name)
                self._reuse(step, Result(artifact, "reused", 0.0))
                return
        elsewhere = self._elsewhere
        roomy = list(filter(elsewhere.has_room, ready))
        if not roomy:
            self._course.begin(", ".join(elsewhere.steps))
            for one, result in elsewhere.ended():
                self._reuse(one, result)
            if elsewhere.failure:
                waiting.clear()
            return
        step = roomy[0]
        waiting.remove(step)
        deployment = self._host.deployment(step)
        if deployment or elsewhere.steps or (elsewhere.most > 1 and len(ready) > 1):
            build = partial(self._host.dispatch, order=self.order, key=self.reporter.known.key)
            elsewhere.begin(step, build, deployment)
            return
        self._course.begin(step.name)
        with self._host.flow(step, partial(self._build, step)) as start:
            start()
        self._look(step)

    def _inputs(self, step: Step) -> dict[str, Artifact]:
        """Type of an input -> its artifact."""
        return {type_: self.results[name].artifact for type_, name in step.sources.items()}

    def _made_from_ours(self, step: Step, artifact: Artifact) -> bool:
        """Whether an artifact's inputs are, byte for byte, the ones of this run (one may have been built again)."""
        ours = self._inputs(step).items()
        return all(artifact.inputs[type_].payload_sha256 == one.payload_sha256 for type_, one in ours)

    def _reusable(self, step: Step) -> Artifact | None:
        """A step's artifact where it is to be reused, once the log has that it is there."""
        artifact = step.artifact
        if step.action != "reuse" or artifact is None or not self._made_from_ours(step, artifact):
            return None
        lock = self.store.lock(artifact.stage, artifact.fingerprint)
        with suppress(TimeoutError), lock.acquire(timeout=0):  # who holds the lock is about to log it
            if self.reporter.keys.unfinished(artifact.stage, artifact.fingerprint):
                inputs = list(self._inputs(step).values())
                started = self.reporter.step_started(step, inputs, late=True, resumed=True)
                self.log.append(training_started(started, 0))  # of which it is not known what was reported
                self.reporter.step_sealed(step, started, Result(artifact, "ran", 0.0))
        return artifact

    def _reuse(self, step: Step, result: Result) -> None:
        """Take what is there."""
        self.results[step.name] = result
        self.reporter.step_reused(step, result)
        self._look(step)

    def _look(self, step: Step) -> None:
        """Warn of what a step discarded in a share that the recipe does not allow without a word."""
        artifact = self.results[step.name].artifact
        for line in warnings(artifact.metrics, self.order.recipe.runtime.discard_shares):
            self.log.warn(f"{step.name}: {line}; see {artifact.path}")
        self.order.look(artifact)

    def _build(self, step: Step) -> None:
        """Build and seal one artifact under its lock, unless another run has just done so."""
        assert step.config
        planned, stage, name = self.order.planned, step.stage.name, str(step.fingerprint)
        with locked(step, self.order, self.log), self._course.failures(step):
            sealed = self.store.get(stage, name)
            known = step.artifact.manifest["finished"] if step.artifact else None
            if sealed and sealed.manifest["finished"] != known and self._made_from_ours(step, sealed):
                self.results[step.name] = result = Result(sealed, "reused", 0.0)
                self.reporter.step_reused(step, result)
                return
            inputs = self._inputs(step)
            origin = {"inputs": origin_of(inputs), "forced": planned.selection.force == step.name}
            out, begun = self.store.begin(stage, name, origin)
            started = self.reporter.step_started(step, list(inputs.values()), late=False, resumed=begun)
            self._course.context = context = self._host.context(started, out)
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
                "run": self.order.name,
                "seconds": round(earlier + seconds, 3),
                **self._host.made_by(started.key),
            }
            busy = f"another run is using {stage} {name}; this one takes its place when that ends"
            replacing = partial(planned.uses.alone, stage, name, partial(self.log.note, busy, step.name))
            artifact = self.store.seal(stage, name, manifest, context.checksum, replacing)
            self.results[step.name] = result = Result(artifact, "resumed" if begun else "ran", seconds)
            self.reporter.step_sealed(step, started, result)

    def _folders(self, step: Step) -> dict[str, Path]:
        """The folders that a body reads: of its inputs by type and, for some, of all before them by name."""
        folders = {type_: artifact.path for type_, artifact in self._inputs(step).items()}
        if step.stage.lineage:
            before = ancestors(self.order.planned.steps, [step.name])
            folders |= {one: result.artifact.path for one, result in self.results.items() if one in before}
        return folders


@contextmanager
def locked(step: Step, order: Order, log: RunLog) -> Iterator[None]:
    """Hold the lock of a step's artifact; wait for whoever builds it."""
    uses, stage, name = order.planned.uses, step.stage.name, str(step.fingerprint)
    lock = uses.store.lock(stage, name)
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        log.note(f"another run is building {stage} {name}; waiting for it", step.name)
        with uses.apart(stage, name):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
