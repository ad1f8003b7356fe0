"""From candidate to champion, when the gates hold: each looks for itself, and reports what it saw."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from flows.compare.claims import Claim
from flows.compare.fixed import RIGHT, scorings
from flows.compare.subjects import Finder, Subject
from flows.compare.verdict import Verdict, judge
from flows.engine.store import Artifact, Store, now
from flows.lineage.graph import Graph
from flows.listeners.markdown import plain
from flows.listeners.mlflow.findings import Finding
from flows.listeners.mlflow.lineage import ModelVersion, NotAsked
from flows.listeners.mlflow.registry import CANDIDATE, Registry
from llm.export.stage import TOLERANCE

EVIDENCE = "decision.json"
MARGIN = 0.002
"""Bits per byte by which a candidate may be worse, at the unfavourable end of the interval."""
MARGIN_RIGHT = 0.02
"""The same of a task's items, as a share."""


@dataclass(frozen=True)
class Gate:
    """One condition."""

    name: str
    holds: bool
    says: str
    evidence: Mapping[str, Any]


@dataclass(frozen=True)
class Decision:
    """The decision on a version, and why it was made."""

    version: ModelVersion
    champion: ModelVersion | None
    gates: list[Gate]
    recipe: str
    decided: str

    @property
    def failed(self) -> list[str]:
        return [gate.name for gate in self.gates if not gate.holds]

    @property
    def outcome(self) -> str:
        return "refused" if self.failed else "promoted"

    @property
    def note(self) -> str:
        """For the run's page."""
        gates = [f"- {'✓' if gate.holds else '✗'} **{gate.name}**: {plain(gate.says)}" for gate in self.gates]
        return "\n".join(
            [f"{plain(self.version.uri)} was {self.outcome}; the evidence is in `{EVIDENCE}`.", "", *gates]
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.version.name,
            "version": self.version.version,
            "export": self.version.fingerprint,
            "champion": self.champion.version if self.champion else None,
            "outcome": self.outcome,
            "failed": self.failed,
            "gates": [asdict(gate) for gate in self.gates],
            "decided": self.decided,
        }


def find_version(registry: Registry, name: str | None, number: str | None) -> ModelVersion:
    """The version that is to be promoted: the one named, or the candidate.

    Raises:
        UserError: there is none, there are several, or it is the champion already.
    """
    known = registry.versions()
    wanted = number or CANDIDATE
    found = [one for one in known if name in (None, one.name) and wanted in (one.version, *one.aliases)]
    what = f"version {number}" if number else f"version with the alias {CANDIDATE}"
    of = f"models:/{name}" if name else "any registered model"
    if not found:
        there = ", ".join(map(str, known)) or "no registered model"
        raise UserError(f"there is no {what} of {of}; MLflow has {there}")
    if len(found) > 1:
        raise UserError(f"several have a {what}: {', '.join(map(str, found))}; name the model")
    if (champion := registry.champion(found[0].name)) and champion.version == found[0].version:
        raise UserError(f"{found[0].uri} is the champion already")
    if not found[0].fingerprint:
        raise UserError(f"{found[0].uri} has no tag llmill.fingerprint: it was not exported by llmill")
    return found[0]


def decide(
    store: Store, version: ModelVersion, champion: ModelVersion | None, on: Sequence[str] = ()
) -> Decision:
    """Look at every gate, whether an earlier one holds or not.

    Args:
        on: names of sets and tasks that decide; without any, the held-out documents do.

    Raises:
        UserError: the candidate's artifacts are not in the store.
    """
    finder = Finder(store)
    candidate = finder.of_export(version.fingerprint, "candidate", version.uri)
    export = candidate.artifacts["export"]
    gates = [
        *quality(finder, candidate, champion, on),
        parity(export),
        checksums(store, export),
        decontamination(Graph(store), export),
    ]
    return Decision(
        version=version, champion=champion, gates=gates, recipe=export.manifest["recipe"], decided=now()
    )


def quality(
    finder: Finder, candidate: Subject, champion: ModelVersion | None, on: Sequence[str] = ()
) -> list[Gate]:
    """No worse than the champion, on each set and task named, or on held-out documents."""
    names = [*on] or ["bits per byte"]
    if champion is None:
        scored = {name for _, name in scorings(candidate)}
        return [without_champion(name, name not in scored and name in on) for name in names]
    try:
        if not champion.fingerprint:
            raise UserError(f"{champion.uri} has no tag llmill.fingerprint: what it is can't be known")
        other = finder.of_export(champion.fingerprint, "champion", champion.uri)
    except UserError as error:
        return [untested(name, str(error)) for name in names]
    verdict = judge([other, candidate])
    found = [by_name(verdict, name) for name in on] if on else [held_out(verdict)]
    return [
        replace(gate, evidence={**gate.evidence, "champion": champion.fingerprint}) if gate.evidence else gate
        for gate in found
    ]


def without_champion(name: str, unscored: bool) -> Gate:
    says = "it was not scored on it" if unscored else "there is no champion yet to be worse than"
    return Gate(name=name, holds=not unscored, says=says, evidence={})


def untested(name: str, why: str) -> Gate:
    return Gate(name=name, holds=False, says=f"can't be compared with the champion: {why}", evidence={})


def held_out(verdict: Verdict) -> Gate:
    """The whole 95% interval of the difference in bits per byte lies below `MARGIN`."""
    if verdict.refused:
        return untested("bits per byte", f"{verdict.refused}; --on NAME goes by a set or task")
    return no_worse("bits per byte", verdict.models[0], accuracy=False)


def by_name(verdict: Verdict, name: str) -> Gate:
    """The same on a set; on a task, the whole interval of the share that is right lies above minus `MARGIN_RIGHT`."""
    found = next((one for one in verdict.fixed if one.name == name), None)
    if found is None:
        return untested(name, "neither was scored on it")
    if not found.compared:
        return untested(name, found.why)
    return no_worse(name, found.claim, accuracy=found.metric == RIGHT)


def no_worse(name: str, claim: Claim, *, accuracy: bool) -> Gate:
    margin = -MARGIN_RIGHT if accuracy else MARGIN
    evidence = {**claim.as_json(), "margin": margin}
    if claim.estimate is None:
        says = "it is the champion's own model, exported once more"
        return Gate(name=name, holds=True, says=says, evidence=evidence)
    difference, low, high = claim.estimate.difference, claim.estimate.low, claim.estimate.high
    if accuracy:
        says = (
            f"{100 * difference:+.1f} points right against the champion, at worst {100 * low:+.1f} (95% interval); "
            f"{100 * margin:+.1f} is allowed"
        )
        return Gate(name=name, holds=low > margin, says=says, evidence=evidence)
    says = f"{difference:+.4f} against the champion, at worst {high:+.4f} (95% interval); {margin:+.4f} is allowed"
    return Gate(name=name, holds=high < margin, says=says, evidence=evidence)


def parity(export: Artifact) -> Gate:
    """The exported folder computes what the trained model did."""
    difference = export.metrics.get("logits_max_abs_difference")
    evidence = {"logits_max_abs_difference": difference, "tolerance": TOLERANCE}
    if difference is None:
        return Gate(
            name="logits parity",
            holds=False,
            says="the export does not record how far its logits are off",
            evidence=evidence,
        )
    says = f"logits differ by {difference:.1e}, {TOLERANCE:.0e} is allowed"
    return Gate(name="logits parity", holds=difference <= TOLERANCE, says=says, evidence=evidence)


def checksums(store: Store, export: Artifact) -> Gate:
    """Every file of the export is what was sealed, read anew."""
    problems = store.verify(export)
    evidence = {"payload_sha256": export.payload_sha256, "problems": problems}
    says = "; ".join(problems) or f"all {len(export.manifest['files'])} files are as sealed"
    return Gate(name="checksums", holds=not problems, says=says, evidence=evidence)


def decontamination(graph: Graph, export: Artifact) -> Gate:
    """All text that the model, or one that it began from, was trained on had evaluation sets taken out."""
    name = "decontamination"
    before = graph.ancestors([(export.stage, export.fingerprint)])
    cleaned = [node for node in before if node.stage == "clean"]
    looked = [looked_for(node.artifact) for node in cleaned if node.artifact]
    evidence = {"clean": [node.fingerprint for node in cleaned], "sets": looked}
    missing = [node.name for node in before if not node.artifact]
    if missing:
        return Gate(
            name=name,
            holds=False,
            says=f"not known: {', '.join(missing)} is not in the store",
            evidence=evidence,
        )
    without = [node.name for node, sets in zip(cleaned, looked, strict=True) if not sets]
    if without:
        says = (
            f"nothing was looked for in {', '.join(without)}: name evaluation sets in clean.decontamination"
        )
        return Gate(name=name, holds=False, says=says, evidence=evidence)
    dropped = sum(one["dropped"] for sets in looked for one in sets)
    names = ", ".join(sorted({one["set"] for sets in looked for one in sets}))
    return Gate(
        name=name,
        holds=True,
        says=f"{dropped} documents that hold parts of {names} were dropped",
        evidence=evidence,
    )


def looked_for(clean: Artifact) -> list[dict[str, Any]]:
    """The evaluation sets whose text a cleaning dropped documents for."""
    rules = clean.manifest["config"].get("decontamination")
    if not rules:
        return []
    shared = {key: rules[key] for key in ("ngram", "min_matches", "min_fraction")}
    return [
        {"set": name, "file": one["path"], "dropped": int(clean.metrics.get(f"dropped/contaminated/{name}", 0)),
         **shared}
        for name, one in rules["sets"].items()
    ]  # fmt: skip


def carry_out(registry: Registry, home: Path, decision: Decision) -> str:
    """Write a decision down and, if all gates hold, move the alias; returns where the evidence is.

    Raises:
        UserError: another champion was made meanwhile.
        NotAsked: MLflow does not answer; nothing is changed without evidence.
    """
    version = decision.version
    if registry.champion(version.name) != decision.champion:
        raise UserError(f"the champion of {version.name} was changed meanwhile: run this again")
    name = f"{decision.outcome} {version.name} {version.version}"
    finding = Finding(home, decision.recipe, "promote", name)
    tags = {"llmill.promote.model": version.uri, "llmill.promote.outcome": decision.outcome}
    files = {EVIDENCE: json.dumps(decision.as_json(), indent=1, allow_nan=False)}
    if why_not := finding.report(tags, files, decision.note, "FINISHED"):
        raise NotAsked(why_not)
    of_version = {
        "outcome": decision.outcome,
        "failed": ", ".join(decision.failed) or "none",
        "evidence": finding.link,
        "decided": decision.decided,
    }
    registry.describe(version, f"{decision.decided}: {decision.note}")
    registry.tag(version, {f"llmill.promote.{key}": value for key, value in of_version.items()})
    if not decision.failed:
        registry.promote(version)
    return finding.link
