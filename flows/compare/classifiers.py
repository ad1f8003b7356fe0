"""Models that give texts labels: which one a person means, and which of two is more often right on the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from scipy.stats import binomtest

from data_pipeline.core.errors import UserError
from flows.compare.claims import Claim, outcome
from flows.compare.subjects import SCORES, Finder, label, sealed
from flows.engine.store import Artifact, Store
from llm.score.mcnemar import mcnemar
from llm.score.statistics import holm

if TYPE_CHECKING:
    from rich.console import Console

    from llm.classify.predict import Classifier

STAGE = "classify"


def load_classifier(text: str | None, store: Store) -> Classifier:
    """Load what a person names, or the newest classifier of a home.

    Raises:
        UserError: it names nothing, or several things, or no classifier.
    """
    from llm.classify.predict import Classifier

    if text and Path(text).is_dir():
        return Classifier.of(Path(text), Path(text))
    artifact = newest(store) if text is None else find_classifier(text, store)
    if artifact is None:
        raise UserError(f"{text} is no model that gives labels")
    return Classifier.of(artifact.path, sealed(store, *artifact.inputs["tokenizer"].key, artifact.stage).path)


def newest(store: Store) -> Artifact:
    """Return the newest classifier of a home.

    Raises:
        UserError: there is none.
    """
    made = store.artifacts(STAGE)
    if not made:
        raise UserError(f"no classifier in {store.root}; make one with: llmill run RECIPE")
    return max(made, key=lambda one: str(one.manifest["finished"]))


def find_classifier(text: str, store: Store, *, only: bool = False) -> Artifact | None:
    """Find what a person names: a run, RUN/STEP, a fingerprint (of the export, too), models:/NAME@ALIAS; None where
    that is something else, or, with ``only``, a run that evaluated a model too.

    Raises:
        UserError: a run has several classifiers.
    """
    run, _, step = text.partition("/")
    finder = Finder(store)
    keys = {
        key
        for one in finder.called(run)
        if step or not (only and any(stage in SCORES for stage, _ in one.artifacts.values()))
        for name, key in one.artifacts.items()
        if step in ("", name)
    }
    if len(text) >= 6:
        keys |= {
            (stage, one.fingerprint)
            for stage in (STAGE, "export")
            for one in store.artifacts(stage)
            if one.fingerprint.startswith(text)
        }
    if text.startswith("models:/"):
        keys.add(("export", finder.registered(text)))
    found: dict[str, Artifact] = {}
    for stage, fingerprint in keys:
        artifact = store.get(stage, fingerprint)
        if artifact and stage == "export":
            artifact = store.get(*artifact.inputs["model"].key)
        if artifact and artifact.stage == STAGE:
            found[artifact.fingerprint] = artifact
    if len(found) > 1:
        raise UserError(f"{text} may be any of {', '.join(sorted(found))}: name one, or RUN/STEP")
    return next(iter(found.values()), None)


@dataclass(frozen=True)
class Side:
    """A classifier among those compared."""

    label: str
    name: str
    artifact: Artifact

    def right(self) -> dict[tuple[str, tuple[str, ...]], bool]:
        """Held-out text (its hash) with its labels -> whether the model gives these."""
        table = pq.read_table(
            self.artifact.path / "predictions.parquet", columns=["text_sha256", "labels", "right"]
        )
        return {(row["text_sha256"], tuple(row["labels"])): row["right"] for row in table.to_pylist()}


@dataclass(frozen=True)
class Comparison:
    """Classifiers on the held-out texts that all of them have."""

    sides: Sequence[Side]
    accuracies: Sequence[tuple[float, float, float]]
    """Share that is right, and the ends of its 95% interval (Wilson 1927)."""
    texts: int
    left_out: int
    """Texts that only some of them held out."""
    claims: Sequence[Claim]
    """McNemar's test of each pair, with Holm's correction over the pairs."""

    def as_json(self) -> dict[str, Any]:
        """As docs/finetune.md describes it."""
        return {
            "texts": self.texts,
            "left_out": self.left_out,
            "classifiers": [
                {"label": one.label, "name": one.name, "fingerprint": one.artifact.fingerprint}
                | {"accuracy": value, "low": low, "high": high}
                for one, (value, low, high) in zip(self.sides, self.accuracies, strict=True)
            ],
            "claims": [one.as_json() for one in self.claims],
        }

    def show(self, console: Console) -> None:
        """Print it."""
        console.print(f"{self.texts:,} held-out texts that all have")
        if self.left_out:
            console.print(f"{self.left_out:,} texts are left out: only some of them held these out")
        for side, (value, low, high) in zip(self.sides, self.accuracies, strict=True):
            console.print(f"{side.label}  {value:.1%} right ({low:.1%} to {high:.1%})  {side.name}")
        for claim in self.claims:
            found = claim.estimate
            assert found is not None
            points = ", ".join(f"{100 * one:+.1f}" for one in (found.difference, found.low, found.high))
            middle, low_end, high_end = points.split(", ")
            missed = claim.missed
            unseen = "" if missed is None else f"; one of up to {100 * missed:.1f} points may be missed"
            console.print(
                f"{claim.heading}: {claim.second} − {claim.first} = {middle} points ({low_end} to {high_end}; "
                f"p {claim.adjusted:.3g}){unseen}"
            )


def classifiers_of(texts: Sequence[str], store: Store) -> list[Side]:
    """Return the classifiers that a person names; nothing where not all names are of such.

    Raises:
        UserError: only some are.
    """
    found = {text: find_classifier(text, store, only=True) for text in dict.fromkeys(texts)}
    if not all(found.values()):
        if any(found.values()):
            others = ", ".join(text for text, one in found.items() if one is None)
            raise UserError(f"{others} gives no labels, and the others do: they can't be compared")
        return []
    return [
        Side(label(place), text, one) for place, text in enumerate(texts) if (one := found[text]) is not None
    ]


def compare(sides: Sequence[Side]) -> Comparison:
    """Compare classifiers on the held-out texts that all of them have.

    Raises:
        UserError: there are none.
    """
    tables = [side.right() for side in sides]
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    if not shared:
        raise UserError(
            "the classifiers held out no texts in common: the same files, seed and classify.held_out give the same"
        )
    right = [[table[one] for one in shared] for table in tables]
    accuracies = []
    for answers in right:
        low, high = binomtest(sum(answers), len(shared)).proportion_ci(method="wilson")
        accuracies.append((sum(answers) / len(shared), float(low), float(high)))
    pairs, estimates = list(combinations(range(len(sides)), 2)), []
    for first, second in pairs:
        both = list(zip(right[first], right[second], strict=True))
        only_first, only_second = sum(a and not b for a, b in both), sum(b and not a for a, b in both)
        estimates.append(mcnemar(only_first, only_second, len(shared)))
    claims = [
        Claim(
            first=sides[first].label,
            second=sides[second].label,
            outcome=outcome(estimate, adjusted, more_is_better=True),
            estimate=estimate,
            adjusted=adjusted,
        )
        for (first, second), estimate, adjusted in zip(
            pairs, estimates, holm([one.p_value for one in estimates]), strict=True
        )
    ]
    everything = set.union(*(set(table) for table in tables))
    return Comparison(
        sides=sides,
        accuracies=accuracies,
        texts=len(shared),
        left_out=len(everything) - len(shared),
        claims=claims,
    )
