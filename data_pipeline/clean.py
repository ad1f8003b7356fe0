"""Stage ``clean``: normalise texts and drop those that break a rule.

Every drop has a named, counted reason; the report shows a few of each, and ``rejected/`` holds them all.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from data_pipeline.context import (
    Metrics,
    Runtime,
    StageConfig,
    StageContext,
    UserError,
    atomic_path,
    human_bytes,
)
from data_pipeline.documents import (
    REJECTED,
    add_up,
    excerpt,
    once,
    read_shard,
    shard_paths,
    table,
    write_shard,
)
from data_pipeline.quality import GopherRules

EXAMPLES = 3
"""Dropped documents that the report shows for each reason."""

BREAKS = re.compile(r"\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
"""What ends a line (those of `str.splitlines`) other than a line feed: form feed, next line, separators, ..."""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters (C0, DEL, C1) but line feed and tab."""


class CleanConfig(StageConfig):
    """How texts are normalised, and which are dropped."""

    unicode: Literal["NFC", "NFKC", "NFD", "NFKD"] | None = "NFC"
    min_chars: int = Field(default=1, ge=1)
    """Length bounds of the normalised text."""
    max_chars: int | None = Field(default=None, ge=1)
    gopher: GopherRules | None = GopherRules()
    """Quality rules; None switches all of them off."""
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars {self.max_chars} is below min_chars {self.min_chars}")
        return self


def clean(config: CleanConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Clean each shard of ``inputs["download"]`` into one shard; dropped documents into ``rejected/``.

    Raises:
        UserError: no document is left.
    """
    shards = shard_paths(inputs["download"])
    context.progress(0, len(shards), "shards")
    work = partial(clean_shard, config.model_copy(update={"runtime": Runtime()}), out)
    tallies = context.map(work, shards, names=[path.stem for path in shards])
    context.progress(len(shards), len(shards), "shards")
    metrics = summarise(tallies, out / "report.md")
    if not metrics["kept"]:
        found = ", ".join(
            f"{name} {count:.0f}" for name, count in metrics.items() if name.startswith("dropped/")
        )
        raise UserError(f"clean dropped every document ({found}); loosen the rules under `clean`")
    return metrics


def clean_shard(config: CleanConfig, out: Path, shard: Path) -> dict[str, Any]:
    """Clean one shard; returns its tally (documents, bytes in and out, dropped by reason, examples)."""
    return once(out / "scratch" / f"{shard.stem}.json", partial(write_cleaned, config, out, shard))


def write_cleaned(config: CleanConfig, out: Path, shard: Path) -> dict[str, Any]:
    counts = {"documents": 0, "kept": 0, "bytes_in": 0, "bytes_out": 0}
    dropped: dict[str, int] = {}
    examples: dict[str, list[tuple[str, str]]] = {}
    rejected_path = out / "rejected" / shard.name.replace("documents", "rejected")
    with write_shard(out / shard.name) as kept, write_shard(rejected_path, REJECTED) as rejected:
        for batch in read_shard(shard):
            for id, text, source, meta in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                counts["documents"] += 1
                counts["bytes_in"] += len(text.encode())
                cleaned = normalise(text, config.unicode)
                reason = reason_to_drop(cleaned, config)
                if reason is None:
                    kept.add(id, cleaned, source, meta)
                    counts["kept"] += 1
                    counts["bytes_out"] += len(cleaned.encode())
                    continue
                rejected.add(id, reason, excerpt(cleaned))
                dropped[reason] = dropped.get(reason, 0) + 1
                shown = examples.setdefault(reason, [])
                if len(shown) < EXAMPLES:
                    shown.append((id, excerpt(cleaned, 100)))
    return {"counts": counts, "dropped": dropped, "examples": examples}


def normalise(text: str, form: Literal["NFC", "NFKC", "NFD", "NFKD"] | None) -> str:
    """``text`` in a Unicode form, with line feeds alone as line ends, without control characters, stripped."""
    text = BREAKS.sub("\n", text)
    text = CONTROLS.sub("", text)  # before composing, which a control character in between would hinder
    if form and not text.isascii():
        text = unicodedata.normalize(form, text)
    return text.strip()


def reason_to_drop(text: str, config: CleanConfig) -> str | None:
    """Why a normalised text is dropped: ``min_chars``, ``max_chars`` or a Gopher rule; None where it is kept."""
    if len(text) < config.min_chars:
        return "min_chars"
    if config.max_chars is not None and len(text) > config.max_chars:
        return "max_chars"
    return config.gopher.reason_to_drop(text) if config.gopher else None


def summarise(tallies: Sequence[Mapping[str, Any]], report: Path) -> Metrics:
    """Write the report and return the metrics."""
    counts = add_up(tally["counts"] for tally in tallies)
    dropped = add_up(tally["dropped"] for tally in tallies)
    text = (
        f"# Clean\n\nKept {counts['kept']} of {counts['documents']} documents, "
        f"{human_bytes(counts['bytes_out'])} of {human_bytes(counts['bytes_in'])} of text.\n"
    )
    if dropped:
        text += "\n" + table(("reason", "dropped"), dropped.items())
    for reason in dropped:
        shown = [one for tally in tallies for one in tally["examples"].get(reason, [])][:EXAMPLES]
        text += f"\n## {reason}\n\n" + table(("document", "begins"), shown)
    with atomic_path(report) as temporary:
        temporary.write_text(text, encoding="utf-8")
    figures = counts | {f"dropped/{reason}": count for reason, count in dropped.items()}
    return {name: float(value) for name, value in figures.items()}
