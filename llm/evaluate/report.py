"""The report of an evaluation, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.core.text import table
from data_pipeline.stage import Metrics


def report(
    metrics: Metrics,
    sources: Mapping[str, Mapping[str, float]],
    rows: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, str]],
) -> str:
    """Return the stage's report in Markdown."""
    by_source = [
        (
            name,
            *(f"{scores[key]:,.0f}" for key in ("documents", "tokens", "bytes")),
            f"{scores['loss']:.4f}",
            f"{scores['perplexity']:.2f}",
            f"{scores['bits_per_byte']:.4f}",
        )
        for name, scores in [*sources.items(), ("**all**", metrics)]
    ]
    numbers = ["---", *["---:"] * 6]
    header = ("source", "documents", "tokens", "bytes", "loss (nats)", "perplexity", "bits per byte")
    ranked = sorted((row for row in rows if row["bytes"]), key=lambda row: (row["bits_per_byte"], row["id"]))
    extremes = ranked if len(ranked) <= 10 else [*ranked[:5], *ranked[-5:]]
    by_document = [(row["id"], f"{row['bytes']:,}", f"{row['bits_per_byte']:.4f}") for row in extremes]
    lines = [
        "# Evaluation on held-out documents\n",
        table(header, by_source, numbers),
        table(
            ("easiest and hardest documents", "bytes", "bits per byte"), by_document, ["---", "---:", "---:"]
        ).rstrip(),
    ]
    for sample in samples:
        lines += ["", f"## Sample: {sample['prompt']!r}", "", *quoted(sample["prompt"] + sample["text"])]
    return "\n".join(lines) + "\n"


def quoted(text: str) -> list[str]:
    """Return ``text`` as an indented Markdown block, which nothing inside it can end."""
    return [f"    {line}" for line in text.splitlines()] or ["    (nothing)"]
