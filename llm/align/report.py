"""Report of a finished training on preferences, in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.core.text import table
from data_pipeline.stage import Metrics
from llm.align.config import AlignConfig
from llm.finetune.report import quoted

SHOWN = 5
"""Answers that are shown."""


def report(
    config: AlignConfig,
    metrics: Metrics,
    checks: Sequence[Mapping[str, Any]],
    answered: Sequence[Mapping[str, Any]],
    example: str,
) -> str:
    """Write what was trained on, how often the chosen answer is preferred, and what the model answers."""
    course = [
        (f"{check['step']:,}", f"{check['loss']:.4f}", f"{check['accuracy']:.1%}", f"{check['margin']:.3f}")
        for check in checks
    ]
    lines = [
        "# Preferences",
        "",
        f"{metrics['steps']:,.0f} steps of {config.batch_rows} rows in {config.precision}, {config.loss} with beta "
        f"{config.beta:g}; {metrics['pairs']:,.0f} pairs in {metrics['rows']:,.0f} rows ({metrics['padding']:.1%} "
        f"padding). Of {metrics['held_out_pairs']:,.0f} held-out pairs the chosen answer gained on the rejected one in "
        f"{metrics['accuracy']:.1%} ({metrics['accuracy_low']:.1%} to {metrics['accuracy_high']:.1%}, Wilson); reward "
        f"of the chosen {metrics['chosen_reward']:+.3f}, of the rejected {metrics['rejected_reward']:+.3f}.",
        "",
        table(("step", "held-out loss", "accuracy", "margin"), course, ["---:"] * 4),
    ]
    if answered:
        error = f" ± {metrics['divergence_error']:.2f}" if "divergence_error" in metrics else ""
        lines += [
            "",
            f"{len(answered)} answers to held-out questions, drawn at temperature 1: "
            f"{metrics['answer_tokens_before']:.1f} tokens before, {metrics['answer_tokens_after']:.1f} after (at most "
            f"{config.answer_tokens}). Divergence from the model that training started from: "
            f"{metrics['divergence']:.2f}{error} nats an answer (mean log ratio of the answers after, one standard "
            "error).",
        ]
    lines += [
        "",
        "## A pair as it is trained on",
        "",
        "What counts in the loss stands between ⟦ and ⟧.",
        "",
        quoted(example),
    ]
    for number, row in enumerate(answered[:SHOWN], 1):
        lines += ["", f"## Held-out question {number}", ""]
        lines += [f"**{one['role']}**\n\n{quoted(one['content'])}\n" for one in json.loads(row["messages"])]
        for name, title in (("before", "Before"), ("after", "After")):
            lines += [f"{title}:", "", quoted(row[name]), ""]
    return "\n".join(lines)
