"""Tables of what a model scored, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_pipeline.core.text import table
from llm.score.task import RULES


def sets_table(sets: Mapping[str, Mapping[str, float]]) -> str:
    """Return the sets' section of the report, in Markdown; nothing where there are none."""
    rows = [
        (
            name,
            f"{scores['documents']:,.0f}",
            f"{scores['bytes']:,.0f}",
            f"{scores['bits_per_byte']:.4f}",
            f"{scores['sliding_bits_per_byte']:.4f}" if "sliding_bits_per_byte" in scores else "",
        )
        for name, scores in sets.items()
    ]
    header = ("set", "documents", "bytes", "bits per byte", "by overlapping windows")
    return section("Fixed sets", header, rows)


def tasks_table(tasks: Mapping[str, Mapping[str, float]]) -> str:
    """Return the tasks' section of the report, in Markdown; nothing where there are none."""
    rows = [
        (
            name,
            f"{scores['items']:,.0f}",
            f"{scores['accuracy']:.1%} ({scores['accuracy_low']:.1%} to {scores['accuracy_high']:.1%})",
            *(
                f"{scores[key]:.1%}" if key in scores else ""
                for key in (f"accuracy_by_{rule}" for rule in RULES)
            ),
            f"{scores['centred']:.3f}",
            f"{scores['gold_bits_per_byte']:.4f}",
        )
        for name, scores in tasks.items()
    ]
    header = (
        "task",
        "items",
        "right (95% interval)",
        *(f"by {rule}" for rule in RULES),
        "centred",
        "bits per byte of the answer",
    )
    return section("Tasks", header, rows)


def section(heading: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of numbers under a heading; nothing where it has no rows."""
    return f"## {heading}\n\n{table(header, rows, ['---', *['---:'] * (len(header) - 1)])}" if rows else ""
