"""The operations that report each event of a run log to MLflow; `flows.listeners.mlflow.operations` carries them out.

The recipe is the experiment; a run is a parent run, each step that is built a child. Params are the identity parts of
the configs, dataset inputs carry our fingerprints as digests. An event gives the same operations whenever it is read,
and each can be sent any number of times.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.engine.events import (
    Compared,
    Event,
    Killed,
    Measured,
    RunEnded,
    RunStarted,
    StepFailed,
    StepReused,
    StepSealed,
    StepStarted,
    Told,
    milliseconds,
)
from flows.engine.store import Damaged, Store, canonical_json
from flows.engine.training import EVENTS, read_lines
from flows.listeners.mlflow.description import NOTE, clipped, outcomes, run_note, summary_table
from flows.listeners.mlflow.lineage import ARTIFACT, PARENT
from flows.listeners.mlflow.points import SYSTEM, Point, curve_points
from flows.listeners.mlflow.samples import samples_of, samples_table
from flows.recipe import flatten
from flows.stages import BY_NAME

Operation = Mapping[str, Any]
VALUE_LENGTH = 6000  # the longest value of a param that MLflow takes
REQUEST = 800  # points: MLflow takes 1000
ERROR = "llmill.error"


def operations(event: Event, store: Store) -> Iterator[Operation]:
    """Return the operations that report an event to MLflow."""
    match event:
        case RunStarted():
            yield from run_started(event)
        case StepStarted():
            yield from step_started(event)
        case StepSealed():
            yield from step_sealed(event, store)
            yield from linked(event, store, {"to": event.key, "id": ""})
        case StepReused():
            yield from linked(event, store, {"to": event.made_by_key, "id": event.made_by})
        case StepFailed(key=key) if key:
            yield {"op": "tags", "run": key, "tags": {ERROR: event.message[:VALUE_LENGTH]}}
            yield {"op": "end", "run": key, "status": event.status, "time": event.time}
        case Compared(run=key, page=page, html=html):
            yield {"op": "text", "run": key, "name": page, "text": html}
        case RunEnded(key=key) if key:
            yield from run_ended(event, store)
        case Measured():
            yield measured(event.key, event.points)
            if event.run:
                yield measured(event.run, on_the_run(event))
        case Killed():
            yield {"op": "end", "run": event.key, "status": "KILLED", "time": event.time}
        case Told():
            yield event.operation


def run_started(event: RunStarted) -> Iterator[Operation]:
    """Begin the parent run, or resume it; join the one of who dispatched us."""
    run = {"run": event.key}
    if event.joined:
        yield {"op": "join", **beginning(event.key, event.name, event.time)}
        return
    yield {"op": "begin", **beginning(event.key, event.name, event.time), "rename": event.renamed}
    tags = {"llmill.recipe": event.recipe, **prefect_tags(event.flow_run)}
    if event.description:
        tags[NOTE] = clipped(event.description)
    yield from description(event.key, event.params, tags)
    if event.sweep:
        yield {"op": "link", **run, "tag": PARENT, "to": event.sweep, "id": ""}
    if event.resolved:
        yield {"op": "text", **run, "name": "recipe.yaml", "text": event.resolved}


def step_started(event: StepStarted) -> Iterator[Operation]:
    """Begin the step's child run, or resume it."""
    begin = {"op": "begin", **beginning(event.key, event.step, event.time), "parent": event.run}
    if event.seen:
        begin["seen"] = {"stage": event.stage, "fingerprint": event.fingerprint, "offset": event.seen}
    yield begin
    tags = {
        "llmill.stage": event.stage,
        "llmill.step": event.step,
        "llmill.recipe": event.recipe,
        "llmill.fingerprint": event.fingerprint,
        **prefect_tags(event.flow_run),
    }
    yield from description(event.key, event.params, tags)
    if event.inputs:
        yield {"op": "inputs", "run": event.key, "datasets": [dataset(one) for one in event.inputs]}


def step_sealed(event: StepSealed, store: Store) -> Iterator[Operation]:
    """Log a sealed step's metrics and files, and end its run; of files withheld, only checksums."""
    run = {"run": event.key}
    name = {"stage": event.stage, "fingerprint": event.fingerprint, "payload_sha256": event.payload_sha256}
    files = ("manifest", "reference") if event.withheld else ("about", *payload_uploads(event))
    note = {} if event.withheld else report_note(event, store)
    metrics = {**event.metrics, "seconds": event.total_seconds}
    yield measured(event.key, points_of(metrics, event.finished))
    yield {"op": "tags", **run, "tags": {"llmill.payload_sha256": event.payload_sha256, **note}}
    if event.resumed:
        yield {"op": "untag", **run, "tag": ERROR}
    yield from ({"op": "artifact", **run, **name, "what": what} for what in ("plots", *files))
    if event.stage == "export" and event.candidate:  # of a sweep's, the best one is, when all are there
        yield candidate(event.recipe, event.fingerprint, newest=True)
    yield {"op": "end", **run, "status": "FINISHED", "time": event.time}


def linked(event: StepSealed | StepReused, store: Store, made_by: Mapping[str, str]) -> Iterator[Operation]:
    """Link a step to the parent run and copy its headline metrics and curves there, whether it was built or reused."""
    if not event.run:
        return  # who dispatched us does that
    step, run = event.step, {"run": event.run}
    tags = {f"llmill.{step}.how": event.how, f"llmill.{step}.fingerprint": event.fingerprint}
    if step != event.stage:
        tags |= {f"llmill.{step}.stage": event.stage, f"{ARTIFACT}{event.fingerprint}": step}
        tags |= {"llmill.evaluated": "yes"} if event.stage == "evaluate" else {}
    yield {"op": "tags", **run, "tags": tags}
    yield {"op": "link", **run, "tag": f"llmill.{step}.run_id", **made_by}
    row = BY_NAME.get(event.stage)
    shown = row.shown(event.metrics) if row else []
    yield measured(
        event.run, points_of({f"{step}/{name}": event.metrics[name] for name in shown}, event.finished)
    )
    yield from curves(event, store)
    if row and row.makes in ("documents", "tokens"):
        made = {"stage": step, "fingerprint": event.fingerprint, "path": event.path, "metrics": event.metrics}
        yield {"op": "inputs", **run, "datasets": [dataset(made)]}
    if row and row.makes in ("model", "folder"):
        yield {"op": "models", **run, "fingerprint": event.fingerprint}


def curves(event: StepSealed | StepReused, store: Store) -> Iterator[Operation]:
    """Draw a training on the parent run; of one that was followed, MLflow has the points by now."""
    lines, _ = read_lines(store.path(event.stage, event.fingerprint) / EVENTS, 0)
    points = [point for line in lines for point in curve_points(event.step, json.loads(line))]
    for start in range(0, len(points), REQUEST):
        yield measured(event.run, points[start : start + REQUEST])
    if event.quoting:
        yield from samples_table(event.run, samples_of(event.step), lines)


def on_the_run(event: Measured) -> list[Point]:
    """The system metrics that the parent run has, at the second since that began."""
    return [
        (name, value, stamp, max(0, stamp - event.begun) // 1000)
        for name, value, stamp, _ in event.points
        if name in SYSTEM
    ]


def run_ended(event: RunEnded, store: Store) -> Iterator[Operation]:
    """Describe the parent run, and end it. One that is not finished is continued by the next run of its plan."""
    run = {"run": event.key}
    found = outcomes(event.results, store)
    yield {"op": "text", **run, "name": "summary.md", "text": summary_table(found)}
    note = run_note(event.description, found, event.compared, failure=event.message, quoting=event.quoting)
    about = {"name": event.name, "store": event.store, "command": event.command}
    yield {"op": "note", **run, "text": note, **about, "pages": [one["page"] for one in event.compared]}
    if event.status == "FINISHED":
        yield measured(event.key, points_of({"seconds": event.seconds}, event.time))
    yield {"op": "end", **run, "status": event.status, "time": event.time}


def payload_uploads(event: StepSealed) -> tuple[str, ...]:
    """How a sealed payload gets into MLflow: whole where it is small enough, else as a reference; models as models."""
    small = event.size <= event.upload_bytes
    if event.stage == "export":
        return "reference", "version" if small else "version-reference"
    more = ("checkpoints",) if event.stage == "pretrain" else ()
    whole = "payload" if event.quoting else "payload-without-samples"
    return whole if small else "reference", *more


def report_note(event: StepSealed, store: Store) -> dict[str, str]:
    """The step's report as the note on its run's page."""
    try:
        artifact = store.get(event.stage, event.fingerprint)
        report = (artifact.path if artifact else Path(event.path)) / "report.md"
        return {NOTE: clipped(report.read_text(encoding="utf-8", errors="replace"))}
    except (Damaged, OSError):  # removed, or not ours to read
        return {}


def prefect_tags(flow_run: Mapping[str, str]) -> dict[str, str]:
    """The tags by which a run in MLflow leads back to its flow run in Prefect; none outside of one."""
    if not flow_run:
        return {}
    return {"llmill.prefect_flow_run_id": flow_run["id"], "llmill.prefect_url": flow_run["url"]}


def beginning(key: str, name: str, time: int | None = None) -> dict[str, Any]:
    """Return what a run is found by, and begun with where it is not found."""
    source = {"mlflow.source.name": "llmill", "mlflow.source.type": "LOCAL", "mlflow.user": user()}
    return {"run": key, "name": name, "source": source, "time": time or milliseconds()}


def description(key: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> list[dict[str, Any]]:
    """The operations that give a run its params and tags."""
    values = {name: text_of(value) for name, value in flatten(params).items()}
    return [{"op": "params", "run": key, "params": values}, {"op": "tags", "run": key, "tags": dict(tags)}]


def dataset(source: Mapping[str, Any]) -> dict[str, str]:
    """An upstream artifact as MLflow sees a dataset: its digest is our fingerprint."""
    return {
        "name": source["stage"],
        "digest": source["fingerprint"],
        "source_type": "local",
        "source": canonical_json({"uri": Path(source["path"]).resolve().as_uri()}),
        "profile": json.dumps(source["metrics"], sort_keys=True, allow_nan=False),
    }


def candidate(model: str, fingerprint: str, newest: bool) -> dict[str, Any]:
    """The operation that gives an export's version the alias; ``newest``: unless a later one has it."""
    return {"op": "candidate", "model": model, "fingerprint": fingerprint, "newest": newest}


def measured(key: str, points: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The operation that adds points to a run's metrics."""
    return {"op": "metrics", "run": key, "points": points}


def points_of(metrics: Mapping[str, float], stamp: int) -> list[Point]:
    """Metrics that have no step."""
    return [(name, float(value), stamp, 0) for name, value in metrics.items()]


def text_of(value: Any) -> str:
    """A param's value as MLflow takes it."""
    text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    return text if len(text) <= VALUE_LENGTH else text[: VALUE_LENGTH - 1] + "…"


def user() -> str:
    """The login name, where the system knows one."""
    return os.environ.get("USER") or os.environ.get("LOGNAME") or f"uid {os.getuid()}"
