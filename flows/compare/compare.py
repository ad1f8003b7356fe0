"""A comparison as a whole, and its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.core.text import finite
from flows.compare.claims import ANY, Least
from flows.compare.curves import Curves, read_curves, trained
from flows.compare.find_where import find_where
from flows.compare.rows import Row, data_rows, held_out, metric_rows, setting_rows
from flows.compare.subjects import Subject
from flows.compare.verdict import Verdict, judge
from flows.compare.where import OnSet, OnTask

SCHEMA = 1
"""Version of the JSON; raised when something in it changes its meaning or goes."""


@dataclass(frozen=True)
class Comparison:
    """Some runs, side by side."""

    subjects: Sequence[Subject]
    settings: list[Row]
    metrics: list[Row]
    data: list[Row]
    curves: list[Curves]
    """The curves of each run; empty where a model was not trained here."""
    verdict: Verdict
    warnings: list[str]
    """Why some metrics can't be compared."""
    where: list[OnSet | OnTask]
    """Where the second of two models differs from the first; empty of more than two."""
    budget: str = ""
    """The budget of false findings that it is paid from, in words."""

    @property
    def title(self) -> str:
        """``A “small 2026-11-26 19:11:59” vs B ...``."""
        return " vs ".join(f"{one.label} “{one.name}”" for one in self.subjects)

    @property
    def for_mlflow(self) -> Comparison:
        """The same as it may be uploaded: without texts where a recipe withholds them."""
        recipes = [one.evaluation.manifest.get("recipe_runtime", {}) for one in self.subjects]
        if all(one.get("upload_texts", True) for one in recipes):
            return self
        return replace(self, where=[one.without_texts() for one in self.where])

    @property
    def is_where_left_out(self) -> bool:
        """Whether there are scores that only a comparison of two runs is taken apart by."""
        return len(self.subjects) > 2 and any(one.compared for one in self.verdict.fixed)

    def as_json(self) -> dict[str, Any]:
        """As docs/compare.md describes it."""
        return {
            "schema": SCHEMA,
            "runs": [described(one) for one in self.subjects],
            "settings": [row.as_json() for row in self.settings],
            "metrics": [row.as_json() for row in self.metrics],
            "data": [row.as_json() for row in self.data],
            "warnings": self.warnings,
            "verdict": self.verdict.as_json(),
            "budget": self.budget,
            "where": {
                "sets": [finite(one.as_json()) for one in self.where if isinstance(one, OnSet)],
                "tasks": [one.as_json() for one in self.where if isinstance(one, OnTask)],
            },
            "curves": {
                one.label: curves.as_json() for one, curves in zip(self.subjects, self.curves, strict=False)
            },
        }


def compare(subjects: Sequence[Subject], least: Least = ANY) -> Comparison:
    """Put runs side by side.

    Args:
        least: smaller differences don't matter, and are called so.
    """
    verdict, metrics = judge(subjects, least), metric_rows(subjects)
    if verdict.refused:
        metrics = [replace(row, comparable=row.comparable and not held_out(row)) for row in metrics]
    return Comparison(
        subjects=subjects,
        settings=setting_rows(subjects),
        metrics=metrics,
        data=data_rows(subjects),
        curves=[read_curves(one.made) for one in subjects] if of_one_kind(subjects) else [],
        verdict=verdict,
        warnings=other_tokenizers(subjects),
        where=find_where(subjects),
    )


def of_one_kind(subjects: Sequence[Subject]) -> bool:
    """Return whether all models were made by trainings of one stage: the losses of others are of other things."""
    return all(map(trained, subjects)) and len({one.made.stage for one in subjects}) == 1


def other_tokenizers(subjects: Sequence[Subject]) -> list[str]:
    """A warning where metrics are means over tokens that stand for other pieces of text."""
    first, *rest = subjects
    others = [one.label for one in rest if one.tokenizer != first.tokenizer]
    if not others:
        return []
    return [
        f"{first.label} and {', '.join(others)} have different tokenizers: loss and perplexity count by tokens, which "
        "stand for other pieces of text, and can't be compared; bits per byte can"
    ]


def described(subject: Subject) -> dict[str, Any]:
    run = subject.run
    return {
        "label": subject.label,
        "name": subject.name,
        "recipe": subject.recipe,
        "run_id": run.run_id if run else None,
        "url": run.url if run else "",
        "stages": {stage: artifact.fingerprint for stage, artifact in subject.artifacts.items()},
    }
