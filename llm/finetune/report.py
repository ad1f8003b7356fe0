"""Report of a finished finetuning, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.core.text import table
from data_pipeline.stage import Metrics
from llm.finetune.config import FinetuneConfig

LONGEST = 1500
"""Characters of a text that is shown."""


def report(
    config: FinetuneConfig,
    metrics: Metrics,
    checks: Sequence[Mapping[str, Any]],
    answered: Sequence[Mapping[str, Any]],
    example: str,
) -> str:
    """Write what was trained on, how the held-out loss went, and what the model answers."""
    held_out = [
        (f"{check['step']:,}", f"{check['loss']:.4f}", f"{check['bits_per_byte']:.4f}") for check in checks
    ]
    lines = [
        "# Finetuning",
        "",
        f"{metrics['steps']:,.0f} steps of {config.batch_rows} rows in {config.precision}; "
        f"{metrics['conversations']:,.0f} conversations in {metrics['rows']:,.0f} rows ({metrics['padding']:.1%} "
        f"padding), {metrics['counted_tokens']:,.0f} tokens of answers an epoch. Held-out loss "
        f"{metrics['val_loss_before']:.4f} before, {metrics['val_loss']:.4f} after, in nats a token of an answer.",
        "",
        table(("step", "held-out loss (nats)", "bits per byte"), held_out, ["---:"] * 3),
        "",
        "## A conversation as it is trained on",
        "",
        "What counts in the loss stands between ⟦ and ⟧.",
        "",
        quoted(example),
    ]
    for number, row in enumerate(answered, 1):
        lines += ["", f"## Held-out question {number}", ""]
        lines += [f"**{one['role']}**\n\n{quoted(one['content'])}\n" for one in row["messages"]]
        for name, title in (("before", "Before"), ("after", "After"), ("held_out", "Held out")):
            lines += [f"{title}:", "", quoted(row[name]), ""]
    return "\n".join(lines)


def quoted(text: str) -> str:
    """Return a text as a block in which nothing is Markdown."""
    shown = text if len(text) <= LONGEST else text[:LONGEST] + " …"
    return "\n".join(f"    {line}" for line in shown.splitlines()) or "    (nothing)"
