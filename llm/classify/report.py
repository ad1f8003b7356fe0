"""Report of a finished training on labels, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.core.text import table
from data_pipeline.stage import Metrics
from llm.classify.baselines import MOST_TEXTS
from llm.classify.config import ClassifyConfig
from llm.classify.found import Found
from llm.classify.labels import LabelSet
from llm.finetune.report import quoted

SHOWN = 5
"""Texts with wrong labels that are shown."""
MOST_LABELS = 20
"""Labels of which the table of confusions is shown."""


def report(
    config: ClassifyConfig,
    metrics: Metrics,
    checks: Sequence[Mapping[str, Any]],
    found: Found,
    labels: LabelSet,
) -> str:
    """Write how often the model is right beside what costs nothing, by label, and where it errs."""
    course = [(f"{check['step']:,}", f"{check['loss']:.4f}", f"{check['accuracy']:.1%}") for check in checks]
    each, mean = found.f1
    ways = {
        "model": "the model",
        "regression": "logistic regression on n-grams of characters",
        "commonest": "the commonest label",
    }
    test = found.against_regression
    lines = [
        "# Classification",
        "",
        f"{metrics['texts']:,.0f} texts trained on in {metrics['steps']:,.0f} steps, {len(found.texts):,} held out "
        f"(balance: {config.balance}).",
        "",
        table(
            ("held-out texts", "accuracy (95%, Wilson)"),
            [(said, found.accuracies[name].text()) for name, said in ways.items()],
        ),
        "",
        f"The model's accuracy is {100 * test.difference:+.1f} points above the regression's "
        f"({100 * test.low:+.1f} to {100 * test.high:+.1f}; McNemar's mid-p {test.p_value:.2g}), which learnt from "
        f"{min(MOST_TEXTS, int(metrics['texts'])):,} texts.",
        "",
        table(
            ("label", "texts", "held out", "F1 (95%, bootstrap)"),
            [
                (name, f"{labels.counts[name]:,}", f"{int(has.sum()):,}", one.text())
                for name, has, one in zip(labels.names, found.truth.T, each, strict=True)
            ]
            + [("mean", "", "", mean.text())],
        ),
        "",
        f"Expected calibration error {found.calibration.text()}.",
        "",
        table(("step", "held-out loss", "right"), course, ["---:"] * 3),
    ]
    if len(labels.names) <= MOST_LABELS and not labels.several:
        rows = [(name, *map(str, row)) for name, row in zip(labels.names, found.confusion, strict=True)]
        lines += ["", "Texts by their label (rows) and the label that is given (columns):", ""]
        lines += [table(("", *labels.names), rows)]
    wrong = [row for row in found.rows(labels) if not row["right"]][:SHOWN]
    for row in wrong:
        given = ", ".join(row["given"]) or "no label"
        lines += ["", f"Given {given}, is {', '.join(row['labels']) or 'no label'}:", "", quoted(row["text"])]
    return "\n".join(lines)
