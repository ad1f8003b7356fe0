"""Held-out texts as a classifier labels them, and what that comes to beside the baselines."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.stage import Metrics
from llm.classify import measures
from llm.classify.baselines import commonest, regression
from llm.classify.config import ClassifyConfig
from llm.classify.labels import LabelSet, Texts
from llm.classify.measures import Floats, Given, Measure
from llm.classify.predict import Classifier, chosen
from llm.finetune.rows import is_held_out
from llm.score.mcnemar import mcnemar
from llm.score.statistics import Estimate


@dataclass(frozen=True)
class Found:
    """Held-out texts with their labels and those that are given. Shape suffixes: N texts, L labels."""

    texts: Sequence[str]
    truth: Given
    probabilities_NL: Floats
    given: Given
    commonest: Given
    regression: Given

    @cached_property
    def accuracies(self) -> dict[str, Measure]:
        """Way of labelling -> share of the texts whose labels are all right."""
        ways = {"model": self.given, "commonest": self.commonest, "regression": self.regression}
        return {name: measures.accuracy(given, self.truth) for name, given in ways.items()}

    @cached_property
    def f1(self) -> tuple[list[Measure], Measure]:
        """F1 of each label, and their mean."""
        return measures.f1(self.given, self.truth)

    @cached_property
    def calibration(self) -> Measure:
        """Expected calibration error; where a text may have several labels, over texts and labels."""
        if self.truth.sum() != len(self.truth) or (self.given.sum(axis=1) != 1).any():
            likely = np.maximum(self.probabilities_NL, 1 - self.probabilities_NL)
            return measures.calibration(likely.ravel(), (self.given == self.truth).ravel())
        return measures.calibration(self.probabilities_NL.max(axis=1), (self.given == self.truth).all(axis=1))

    @cached_property
    def against_regression(self) -> Estimate:
        """Difference of accuracy from the regression's to the model's, on the same texts."""
        ours, theirs = ((given == self.truth).all(axis=1) for given in (self.given, self.regression))
        return mcnemar(int((theirs & ~ours).sum()), int((ours & ~theirs).sum()), len(ours))

    @property
    def confusion(self) -> list[list[int]]:
        """Texts by their label and the one that is given."""
        counts = self.truth.T.astype(np.int64) @ self.given.astype(np.int64)
        found: list[list[int]] = counts.tolist()
        return found

    def metrics(self, labels: LabelSet) -> Metrics:
        """Return them as metrics."""
        each, mean = self.f1
        difference = self.against_regression
        named = {
            "accuracy": self.accuracies["model"],
            "accuracy_commonest": self.accuracies["commonest"],
            "accuracy_regression": self.accuracies["regression"],
            "f1": mean,
            "calibration_error": self.calibration,
        } | {f"f1/{name}": one for name, one in zip(labels.names, each, strict=True)}
        found = {
            f"{name}{end}": value
            for name, one in named.items()
            for end, value in (("", one.value), ("_low", one.low), ("_high", one.high))
        }
        return found | {
            "over_regression": difference.difference,
            "over_regression_low": difference.low,
            "over_regression_high": difference.high,
            "over_regression_p": difference.p_value,
        }

    def rows(self, labels: LabelSet) -> list[dict[str, Any]]:
        """Return them as rows of a table."""

        def named(given_L: Any) -> list[str]:
            return [name for name, has in zip(labels.names, given_L, strict=True) if has]

        return [
            {
                "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
                "text": text,
                "labels": named(self.truth[number]),
                "given": named(self.given[number]),
                "right": bool((self.truth[number] == self.given[number]).all()),
                "probabilities": self.probabilities_NL[number].tolist(),
                "by_regression": named(self.regression[number]),
            }
            for number, text in enumerate(self.texts)
        ]


def find(
    config: ClassifyConfig, reader: Texts, held_out: Sequence[Any], room: int, *, out: Path, tokenizer: Path
) -> Found:
    """Label the held-out texts by the model in ``out``, and by the baselines, which learn from the others."""
    classifier = Classifier.of(out, tokenizer)
    train = [
        item.whole
        for one, file in zip(config.data, config.files, strict=True)
        for item in reader.items(one, file)
        if not item.rejected and not item.dropped and not is_held_out(item.asked, config)
    ]
    numbers = reader.labels.numbers

    def given(items: Sequence[Any]) -> Given:
        rows = np.zeros((len(items), len(numbers)), bool)
        for row, item in zip(rows, items, strict=True):
            row[[numbers[label] for label in item["labels"]]] = True
        return rows

    texts = [item["text"] for item in held_out]
    logits_NL = classifier.logits([classifier.tokens(text, room) for text in texts])
    probabilities_NL = classifier.probabilities(logits_NL)
    return Found(
        texts=texts,
        truth=given(held_out),
        probabilities_NL=probabilities_NL,
        given=chosen(probabilities_NL, several=config.several),
        commonest=commonest(given(train), len(texts)),
        regression=regression(
            [item["text"] for item in train], given(train), texts, balanced=config.balance == "weights"
        ),
    )
