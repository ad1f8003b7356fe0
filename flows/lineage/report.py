"""A trace as JSON for scripts, and as lines for a person."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from data_pipeline.core.text import human_bytes
from flows.engine.store import Store
from flows.headline import headline
from flows.lineage.documents import DocumentTrace, Place, Reading
from flows.lineage.graph import Graph, Node
from llm.training import checkpoint

if TYPE_CHECKING:
    from flows.listeners.mlflow.lineage import ModelVersion, SeenRun

MOST_STEPS = 12  # that a line names
MOST_RUNS = 20


class Known:
    """The answers of MLflow, or why it gives none."""

    def __init__(self, store: Store) -> None:
        from flows.listeners.mlflow.lineage import NotAsked, Records

        self.why_not = ""
        self._versions: list[ModelVersion] = []
        self._records: Records | None = None
        try:
            self._records = Records(store.home)
            self._versions = self._records.versions()
        except NotAsked as error:
            self.why_not = str(error)

    def runs(self, node: Node) -> list[SeenRun]:
        from flows.listeners.mlflow.lineage import NotAsked

        try:
            return self._records.runs_of(*node.key) if self._records and not self.why_not else []
        except NotAsked as error:
            self.why_not = str(error)
            return []

    def versions(self, nodes: Iterable[Node]) -> list[ModelVersion]:
        """The registered models that were made from some exports."""
        exports = {node.fingerprint for node in nodes if node.stage == "export"}
        return [version for version in self._versions if version.fingerprint in exports]


def artifact_json(graph: Graph, node: Node, known: Known) -> dict[str, Any]:
    """An artifact, what it was made from, and what it went into."""
    after = graph.descendants([node.key])
    return {
        "artifact": describe(node),
        "made_from": [describe(one) for one in graph.ancestors([node.key])],
        "went_into": [describe(one) for one in after],
        "models": [version.uri for version in known.versions([node, *after])],
        "runs": [run.as_json() for run in known.runs(node)],
        "mlflow": known.why_not or "asked",
    }


def describe(node: Node) -> dict[str, Any]:
    """Return what the manifest has of an artifact's making."""
    described: dict[str, Any] = {
        "stage": node.stage,
        "fingerprint": node.fingerprint,
        "state": node.state,
        "path": str(node.path),
        "inputs": [{"stage": stage, "fingerprint": name} for stage, name in node.inputs],
    }
    if node.artifact:
        manifest = node.artifact.manifest
        named = ("payload_sha256", "recipe", "code", "finished", "mlflow_run_id", "prefect_flow_run_id")
        described |= {name: manifest.get(name) for name in named}
        described |= {"host": manifest["host"]["name"], "metrics": manifest["metrics"]}
        if node.stage == "download":
            described["sources"] = manifest["config"]["sources"]
    elif node.stage == "pretrain":
        saved = checkpoint.complete(node.path / "scratch" / "checkpoints")
        described["checkpoints"] = [one.step for one in saved]
    return described


def artifact_lines(graph: Graph, node: Node, known: Known) -> list[str]:
    """The same for a person."""
    lines = [*node_lines(node), "", "made from"]
    before, after = graph.ancestors([node.key]), graph.descendants([node.key])
    lines += [line for one in before for line in node_lines(one)] or ["  nothing: it is a beginning"]
    lines += ["", "went into"]
    lines += [line for one in after for line in node_lines(one)] or ["  nothing that is here"]
    lines += [f"  model           {version}" for version in known.versions([node, *after])]
    runs = known.runs(node)
    lines += ["", f"seen by {len(runs)} MLflow runs" if not known.why_not else known.why_not]
    lines += [f"  {run.how:<16}{run.run_id}  {run.status:<9} {run.name}" for run in runs[:MOST_RUNS]]
    return lines + ([f"  and {len(runs) - MOST_RUNS} more"] if len(runs) > MOST_RUNS else [])


def node_lines(node: Node) -> list[str]:
    """An artifact, and how it was made."""
    facts = describe(node)
    first = f"  {node.stage:<16}{node.fingerprint}  "
    if not node.artifact:
        steps = facts.get("checkpoints")
        return [
            first + node.state + (f", checkpoints of steps {', '.join(map(str, steps))}" if steps else "")
        ]
    code, finished = facts["code"], facts["finished"][:16].replace("T", " ")
    version = f"llmill {code['version']}" + (f" ({code['commit']})" if code["commit"] else "")
    ids = f"MLflow {facts['mlflow_run_id'] or '-'}  Prefect {facts['prefect_flow_run_id']}"
    lines = [first + headline(node.stage, node.artifact.metrics)]
    lines += [f"    {source_line(one)}" for one in facts.get("sources", [])]
    lines.append(
        f"    payload {facts['payload_sha256'][:16]}…  {finished}  {version} on {facts['host']}  {ids}"
    )
    return lines


def source_line(source: dict[str, Any]) -> str:
    """A source as it was resolved: its kind, its size, and what pins it."""
    parts = [f"{source['name']}: {source['kind']}"]
    if "files" in source:
        parts.append(f"{source['files']:,} files")
    if source.get("bytes") is not None:
        parts.append(human_bytes(source["bytes"]))
    pins = ("repo", "dataset", "revision", "url", "urls", "etag", "license", "listing_sha256", "sha256")
    parts += [f"{name} {source[name]}" for name in pins if source.get(name)]
    return " · ".join(parts)


def document_json(trace: DocumentTrace, known: Known) -> dict[str, Any]:
    """Where a document is, which steps read it, and which models it shaped."""
    models = trace.models()
    return {
        "document": trace.id,
        "places": [place.as_json() for place in trace.places.values()],
        "trainings": [reading.as_json() for reading in trace.readings],
        "models": [{"export": one.fingerprint, "path": str(one.path)} for one in models],
        "registered": [version.uri for version in known.versions(models)],
        "same_text": trace.others(),
        "mlflow": known.why_not or "asked",
    }


def document_lines(trace: DocumentTrace, known: Known) -> list[str]:
    """The same for a person."""
    lines = [trace.id]
    facts: dict[Any, str] = {key: place_line(place) for key, place in trace.places.items()}
    facts |= {reading.node.key: reading_line(reading) for reading in trace.readings}
    lines += [
        f"  {node.stage:<16}{node.fingerprint}  {facts[node.key]}" for node in trace.graph.in_order(facts)
    ]
    models = trace.models()
    lines += ["", "shaped" if models else "shaped no exported model that is here"]
    lines += [f"  export          {one.fingerprint}  {one.path}" for one in models]
    lines += [f"  model           {version}" for version in known.versions(models)]
    if known.why_not:
        lines.append(f"  registered models are not known: {known.why_not}")
    if others := trace.others():
        lines += [
            "",
            "has the same text, nearly the same, or a span of it, in common with",
            *(f"  {one}" for one in others),
        ]
    return lines


def place_line(place: Place) -> str:
    """Say what an artifact has of a document, in a few words."""
    facts = place.facts
    at = f"{facts.get('shard')}, row group {facts.get('row_group')}, row {facts.get('row')}"
    if place.what in ("train", "val"):
        split = "held out" if place.what == "val" else "trained on"
        return f"{at}: {facts['tokens']:,} tokens, {split}, after {facts['start']:,} others of the split"
    if place.what == "rejected":
        return f"dropped: {facts['reason']} ({at} of rejected/)"
    if place.what == "removed" and "duplicate_of" in facts:
        how = "the same text as" if facts["kind"] == "exact" else f"{facts['jaccard']:.2f} alike to"
        return f"removed: {how} {facts['duplicate_of']}, which was kept"
    if place.what == "removed":
        return f"removed: its text is in {', '.join(facts['spans_in'])}"
    if place.what == "scored":
        return f"evaluated on it: {facts['bits_per_byte'] or 0:.4f} bits per byte"
    if place.what == "sampled":
        sample, documents = facts["sample"], facts["documents"]
        return (
            "learnt from all documents" if sample == documents else f"learnt from {sample:,} of {documents:,}"
        )
    if place.what == "unknown":
        return f"can't tell what it read: {facts['why']}"
    shared = len(facts.get("spans_in", []))
    return at + (
        f"; shared spans with {shared} documents, which dedup cut out of one of each two" if shared else ""
    )


def reading_line(reading: Reading) -> str:
    """When a training reads a document, in a few words."""
    config, reads = reading.training.config, reading.reads
    going = "" if reading.node.artifact else f" (unfinished, {reading.training.done:,} done)"
    if not reads:
        held_out = "validation takes losses of it" if reading.validated else ""
        return f"no step of {config.steps:,} reads it{going}" + (f"; {held_out}" if held_out else "")
    steps: dict[str, list[int]] = {}
    for read in reads:
        steps.setdefault(read.fate, []).append(read.step)
    sequences = len({read.sequence for read in reads})
    read_by = "; ".join(
        f"{'' if fate == 'trained' else fate + ': '}{step_ranges(some)}" for fate, some in steps.items()
    )
    count = len({read.step for read in reads})
    return f"{count:,} of {config.steps:,} steps{going} read {sequences:,} sequences of it: step {read_by}"


def step_ranges(steps: Sequence[int]) -> str:
    """``1-3 7 9``, the first few."""
    ranges: list[list[int]] = []
    for step in sorted(set(steps)):
        if ranges and ranges[-1][1] == step - 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    shown = [f"{first}" if first == last else f"{first}-{last}" for first, last in ranges[:MOST_STEPS]]
    more = f" and {len(ranges) - MOST_STEPS} more (--json has all)" if len(ranges) > MOST_STEPS else ""
    return " ".join(shown) + more
