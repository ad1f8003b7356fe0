"""Stage ``clean``: normalise texts and drop those that break a rule.

Every drop has a named, counted reason; the report shows a few of each, and ``rejected/`` holds them all. The rules
see whole columns: what they need is counted by kernels over Arrow's buffers, and only texts that are dropped or
changed become Python strings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data_pipeline.clean_report import Tally, summarise, values_of
from data_pipeline.context import Metrics, Runtime, StageConfig, StageContext, UserError
from data_pipeline.documents import REJECTED, ShardWriter, excerpt, once, read_shard, shard_paths, write_shard
from data_pipeline.fineweb import FineWebRules
from data_pipeline.normalise import Form, normalise_column
from data_pipeline.quality import GopherRules
from data_pipeline.text_stats import TextStats, measure
from data_pipeline.verdicts import KEPT, Verdicts


class CleanConfig(StageConfig):
    """How texts are normalised, and which are dropped; the rules are asked in the order of the fields."""

    unicode: Form | None = "NFC"
    min_chars: int = Field(default=1, ge=1)
    """Length bounds of the normalised text."""
    max_chars: int | None = Field(default=None, ge=1)
    gopher: GopherRules | None = GopherRules()
    """Quality and repetition; None switches all of them off."""
    fineweb: FineWebRules | None = None
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
    metrics = summarise(tallies, out)
    if not metrics["kept"]:
        found = ", ".join(
            f"{name} {count:.0f}" for name, count in metrics.items() if name.startswith("dropped/")
        )
        raise UserError(f"clean dropped every document ({found}); loosen the rules under `clean`")
    return metrics


def clean_shard(config: CleanConfig, out: Path, shard: Path) -> dict[str, Any]:
    """Clean one shard; returns its `Tally` as JSON."""
    return once(out / "scratch" / f"{shard.stem}.json", partial(write_cleaned, config, out, shard))


def write_cleaned(config: CleanConfig, out: Path, shard: Path) -> dict[str, Any]:
    tally = Tally()
    rejected_path = out / "rejected" / shard.name.replace("documents", "rejected")
    with write_shard(out / shard.name) as kept, write_shard(rejected_path, REJECTED) as rejected:
        for batch in read_shard(shard):
            cleaned = clean_batch(config, batch)
            write_batch(batch, cleaned, kept, rejected, tally)
    return tally.as_json()


@dataclass
class Cleaned:
    """A batch of documents after the rules."""

    texts: pa.Array
    verdicts: Verdicts
    stats: TextStats
    """Of the normalised texts, before any rule changed them."""
    counts: dict[str, int] = field(default_factory=dict)
    values: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def alive(self) -> tuple[NDArray[np.int64], pa.Array]:
        """The rows not dropped so far, and their texts."""
        rows = self.verdicts.alive()
        return rows, self.texts if len(rows) == len(self.texts) else self.texts.take(pa.array(rows))


def clean_batch(config: CleanConfig, batch: pa.RecordBatch) -> Cleaned:
    """Normalise the texts of a batch and apply the rules, the cheap ones first."""
    texts = normalise_column(batch.column("text"), config.unicode)
    short = config.fineweb.short_line_characters if config.fineweb else 0
    stats = measure(texts, short)
    cleaned = Cleaned(texts, Verdicts(len(texts)), stats, values=values_of(stats))
    verdicts = cleaned.verdicts
    verdicts.drop(stats.characters < config.min_chars, "min_chars")
    if config.max_chars is not None:
        verdicts.drop(stats.characters > config.max_chars, "max_chars")
    if config.gopher:
        apply_gopher(config.gopher, cleaned)
    if config.fineweb:
        for reason, broken in config.fineweb.broken(stats):
            verdicts.drop(broken, reason)
    return cleaned


def apply_gopher(rules: GopherRules, cleaned: Cleaned) -> None:
    for reason, broken in rules.broken(cleaned.stats):
        cleaned.verdicts.drop(broken, reason)
    rows, texts = cleaned.alive()
    for reason, broken in rules.broken_by_ngrams(texts, cleaned.stats.take(rows)):
        cleaned.verdicts.drop(broken, reason, rows)


def write_batch(
    batch: pa.RecordBatch, cleaned: Cleaned, kept: ShardWriter, rejected: ShardWriter, tally: Tally
) -> None:
    """Write a batch's documents to where they belong, and count them."""
    verdicts = cleaned.verdicts
    alive = verdicts.codes == 0
    whole = batch.set_column(batch.schema.get_field_index("text"), "text", cleaned.texts)
    kept.add_batch(whole if alive.all() else whole.filter(pa.array(alive)))
    tally.add_groups(
        batch.column("source"),
        verdicts,
        pc.binary_length(batch.column("text")),
        pc.binary_length(cleaned.texts),
    )
    tally.add_values(cleaned.values, alive)
    for name, amount in cleaned.counts.items():
        tally.count(name, amount)
    for row in np.flatnonzero(alive)[:3].tolist():
        tally.add_example(KEPT, batch.column("id")[row].as_py(), cleaned.texts[row].as_py())
    dropped = np.flatnonzero(~alive)
    ids = batch.column("id").take(pa.array(dropped)).to_pylist()
    beginnings = pc.utf8_slice_codeunits(cleaned.texts.take(pa.array(dropped)), 0, 320).to_pylist()
    for row, id, beginning in zip(dropped.tolist(), ids, beginnings, strict=True):
        evidence = verdicts.evidence.get(row)
        shown = f"[{evidence}] {beginning}" if evidence else beginning
        rejected.add(id, verdicts.reason(row), excerpt(shown))
        tally.add_example(verdicts.reason(row), id, shown)
