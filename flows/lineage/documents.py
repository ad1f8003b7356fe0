"""A document's way through the pipeline: in which shard and row of each step's output it stands, or why it does not;
and when each training reads it, which is worked out (`llm.data.reads`) and not looked up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from data_pipeline.tokenize.lookup import (
    Row,
    TokenPlace,
    alike,
    find_document,
    find_rejected,
    find_removed,
    find_row,
    find_tokens,
    start_in_source,
)
from data_pipeline.tokenize.stage import TokenizeConfig
from flows.lineage.graph import Graph, Key, Node, read_json
from llm.data.reads import Read, Training
from llm.pretrain.config import PretrainConfig, read_sealed
from llm.pretrain.start import samples_before
from llm.training import checkpoint
from llm.training.events import read_events


@dataclass(frozen=True)
class Place:
    """The fate of a document in an artifact."""

    node: Node
    what: str
    """``kept``, ``rejected``, ``removed``, ``sampled``, ``train``, ``val``, ``scored``, or ``unknown``."""
    facts: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {"stage": self.node.stage, "fingerprint": self.node.fingerprint, "is": self.what, **self.facts}


@dataclass(frozen=True)
class Reading:
    """When a training reads a document."""

    node: Node
    training: Training
    reads: list[Read]
    validated: bool
    """Whether validation takes losses of it: then it is held out, and no step reads it."""

    def as_json(self) -> dict[str, Any]:
        return {
            "stage": self.node.stage,
            "fingerprint": self.node.fingerprint,
            "state": self.node.state,
            "steps": self.training.config.steps,
            "done": self.training.done,
            "validated": self.validated,
            "reads": [read._asdict() for read in self.reads],
        }

    @property
    def shaped(self) -> bool:
        """Whether it moved the weights that came out, or will."""
        return any(read.fate in ("trained", "not yet") for read in self.reads)


class DocumentTrace:
    """Where a document went, in all that a store holds."""

    def __init__(self, graph: Graph, id: str) -> None:
        self.graph, self.id = graph, id
        self.places: dict[Key, Place] = {}
        self.readings: list[Reading] = []
        self._tokens: dict[Key, TokenPlace] = {}
        for node in graph.in_order(graph.nodes):
            look = {
                "adopt": self._in_documents,
                "download": self._in_documents,
                "clean": self._in_documents,
                "dedup": self._in_dedup,
                "train_tokenizer": self._in_sample,
                "tokenize": self._in_tokens,
                "pretrain": self._in_training,
                "evaluate": self._in_evaluation,
            }.get(node.stage)
            if look and (node.artifact or node.state == "unfinished"):
                look(node)

    def __bool__(self) -> bool:
        return bool(self.places)

    def _kept_before(self, node: Node, stage: str) -> tuple[bool, str | None]:
        """Whether the document may be in an artifact made from that stage's, and in which shard it was there."""
        inputs = [one for one in self.graph.inputs_of(node, stage) if one.artifact]
        places = [self.places[one.key] for one in inputs if one.key in self.places]
        kept = [place for place in places if place.what == "kept"]
        return bool(kept) or not inputs, kept[0].facts["shard"] if kept else None

    def _in_documents(self, node: Node) -> None:
        begins = node.stage in ("adopt", "download")
        may, shard = (True, None) if begins else self._kept_before(node, "download")
        if may and node.artifact and not self._note(node, "kept", find_document(node.path, self.id, shard)):
            self._note(node, "rejected", find_rejected(node.path, self.id, shard))

    def _in_dedup(self, node: Node) -> None:
        may, shard = self._kept_before(node, "clean")
        if not may or not node.artifact:
            return
        cut = node.path / "cut.parquet"
        spans = kept_in(cut, self.id)
        if row := find_document(node.path, self.id, shard):
            repeated_by = duplicates_of(node.path / "removed.parquet", self.id)
            self._note(node, "kept", row, {"repeated_by": repeated_by, "spans_in": spans})
        elif row := find_removed(node.path, self.id):
            self._note(node, "removed", row)
        elif cut.exists():
            self._note(node, "removed", find_row([cut], self.id, ("words",)), {"spans_in": spans})

    def _note(self, node: Node, what: str, row: Row | None, more: Mapping[str, Any] | None = None) -> bool:
        if row:
            place = {"shard": row.shard, "row_group": row.row_group, "row": row.row}
            self.places[node.key] = Place(node, what, {**place, **row.values, **(more or {})})
        return row is not None

    def _in_sample(self, node: Node) -> None:
        """A tokenizer is learnt from the documents with the smallest hashes; how far they went is not written down."""
        before = next(iter(self.graph.inputs_of(node, "dedup")), None)
        place = self.places.get(before.key) if before else None
        if node.artifact and before and before.artifact and place and place.what == "kept":
            sample, documents = (
                int(node.artifact.metrics["sample_documents"]),
                int(before.artifact.metrics["kept"]),
            )
            self.places[node.key] = Place(node, "sampled", {"sample": sample, "documents": documents})

    def _in_tokens(self, node: Node) -> None:
        may, _ = self._kept_before(node, "dedup")
        if not may or not node.artifact:
            return
        config = TokenizeConfig.model_validate(node.artifact.manifest["config"])
        if place := find_tokens(config, node.path, self.id):
            facts = asdict(place)
            self.places[node.key] = Place(node, facts.pop("split"), facts)
            self._tokens[node.key] = place

    def _in_training(self, node: Node) -> None:
        for source in self.graph.inputs_of(node, "tokenize"):
            place = self._tokens.get(source.key)
            if place is None:
                continue
            try:
                training = training_of(node)
            except (OSError, KeyError, ValidationError) as error:
                why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                self.places[node.key] = Place(node, "unknown", {"why": why})
                continue
            config, context = training.config, training.config.model.context
            if place.split == "val":
                checked = max(1, config.runtime.validation.tokens // context) * context + 1
                self.readings.append(
                    Reading(node=node, training=training, reads=[], validated=place.start < checked)
                )
                continue
            name = self.id.partition("/")[0] if config.mix else None
            start = start_in_source(source.path, place, self.id) if name else place.start
            sequences = {one["source"]: one["windows"] for one in json.loads(read_sources(node.path))}
            reads = training.reads(start, start + place.tokens, sequences.get(name, 0), name)
            self.readings.append(Reading(node=node, training=training, reads=reads, validated=False))

    def _in_evaluation(self, node: Node) -> None:
        row = find_row(
            [path for path in [node.path / "documents.parquet"] if path.exists()], self.id, ("bits_per_byte",)
        )
        if row and node.artifact:
            self.places[node.key] = Place(node, "scored", row.values)

    def models(self) -> list[Node]:
        """The exported models that it shaped: those of trainings that read it, and of those that began from them."""
        shaped = [reading.node.key for reading in self.readings if reading.shaped]
        return [node for node in self.graph.descendants(shaped) if node.stage == "export"]

    def others(self) -> list[str]:
        """Documents that have the same text, nearly the same, or a span of it, of which dedup kept one."""
        found: dict[str, None] = {}
        for place in self.places.values():
            if place.node.stage == "dedup":
                for name in ("repeated_by", "spans_in"):
                    found |= dict.fromkeys(place.facts.get(name, []))
                if winner := place.facts.get("duplicate_of"):
                    found[winner] = None
        return list(found)


def training_of(node: Node) -> Training:
    """A training as far as its artifact or its unfinished folder describes it.

    Raises:
        OSError, KeyError, ValidationError: what would describe it is not there, or of another version of llmill.
    """
    if node.artifact:
        manifest, path = node.artifact.manifest, node.path / "skipped.parquet"
        config = read_sealed(manifest["config"], manifest["runtime"])
        passed = pq.read_table(path).to_pylist() if path.exists() else []
        return Training(config=config, done=config.steps, skipped=passed, before=samples_before(node.path))
    scratch = node.path / "scratch"
    config = PretrainConfig.model_validate(read_json(scratch / "job.json")["config"])
    checkpoints = scratch / "checkpoints"
    newest = next(iter(checkpoint.complete(checkpoints)), None)
    skipped = checkpoint.read_history(checkpoints, newest)["skipped"] if newest else []
    done = saved = newest.step if newest else 0
    for event in read_events(node.path / "logs" / "events.jsonl"):
        if event["event"] in ("step", "skip"):
            done = max(saved, event["step"])
            if event["event"] == "skip" and event["step"] > saved:
                skipped.append({"step": event["step"], "reason": "nonfinite", "windows": 0})
        elif event["event"] == "rollback":
            done = max(saved, event["to"])
    return Training(config=config, done=done, skipped=skipped, before=samples_before(node.path))


def read_sources(folder: Path) -> str:
    """Read what a training wrote of the sequences that there are."""
    return (folder / "sources.json").read_text(encoding="utf-8")


def duplicates_of(path: Path, id: str) -> list[str]:
    """The documents that dedup removed because this one has their text."""
    if not path.exists():
        return []
    ids = pq.read_table(path, columns=["id"], filters=[("duplicate_of", "=", id)]).column("id")
    return [str(one) for one in ids.to_pylist()]


def kept_in(path: Path, id: str) -> list[str]:
    """The documents that share spans with this one which dedup cut out of one of the two."""
    if not path.exists():
        return []
    cut = pq.read_table(path, columns=["id", "kept_in"])
    shared = [one for row in cut.filter(pc.equal(cut["id"], id))["kept_in"].to_pylist() for one in row or []]
    parents, keepers = pc.list_parent_indices(cut["kept_in"]), pc.list_flatten(cut["kept_in"])
    shared += cut["id"].take(parents.filter(pc.equal(keepers, id))).to_pylist()
    return list(dict.fromkeys(shared))


def ids_alike(graph: Graph, id: str) -> list[str]:
    """Ids that one given wrong may have meant: of the newest download, or of what there is in its place."""
    for stage in ("download", "adopt", "clean", "dedup"):
        sealed = [
            node
            for node in graph.nodes.values()
            if node.stage == stage
            and node.artifact
            and (stage != "adopt" or any(node.path.glob("documents-*")))
        ]
        newest = sorted(sealed, key=lambda node: node.artifact.manifest["finished"] if node.artifact else "")
        if newest:
            return alike(newest[-1].path, id)
    return []
