"""Stage ``clean``: normalise texts and drop those that break a rule.

Every drop has a named, counted reason; the report shows a few of each, and ``rejected/`` holds them all. The rules
see whole columns: what they need is counted by kernels over Arrow's buffers, and only texts that are dropped or
changed become Python strings.
"""

from __future__ import annotations

import json
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

from data_pipeline.c4 import LINE_REASONS, C4Rules
from data_pipeline.clean_report import Tally, summarise, values_of
from data_pipeline.context import Metrics, Runtime, StageConfig, StageContext, UserError
from data_pipeline.documents import (
    REJECTED,
    SCHEMA,
    ShardWriter,
    excerpt,
    once,
    read_shard,
    shard_paths,
    write_shard,
)
from data_pipeline.fineweb import FineWebRules
from data_pipeline.language import LanguageRules, identify_all
from data_pipeline.masking import Masking
from data_pipeline.normalise import Form, normalise_column
from data_pipeline.quality import GopherRules
from data_pipeline.text_columns import replace_rows
from data_pipeline.text_stats import TextStats, measure
from data_pipeline.verdicts import KEPT, Verdicts


class CleanConfig(StageConfig):
    """How texts are normalised, and which are dropped; the rules are asked in the order of the fields."""

    unicode: Form | None = "NFC"
    min_chars: int = Field(default=1, ge=1)
    """Length bounds of the normalised text."""
    max_chars: int | None = Field(default=None, ge=1)
    language: LanguageRules | None = None
    gopher: GopherRules | None = GopherRules()
    """Quality and repetition; None switches all of them off."""
    c4: C4Rules | None = None
    """The only rules that take something out of a text: lines."""
    fineweb: FineWebRules | None = None
    masking: Masking | None = None
    """Asked of the documents that are kept: it changes them."""
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
    metas: pa.Array
    verdicts: Verdicts
    stats: TextStats
    """Of the normalised texts, before any rule changed them."""
    counts: dict[str, int] = field(default_factory=dict)
    values: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    changed: bool = False
    """Whether `texts` are no longer those of which `stats` speak."""

    def replace(self, rows: NDArray[np.int64], texts: pa.Array | list[str]) -> None:
        """Put other texts into some rows (ascending)."""
        self.texts = replace_rows(self.texts, rows, texts)
        self.changed |= len(rows) > 0

    def alive(self) -> tuple[NDArray[np.int64], pa.Array]:
        """The rows not dropped so far, and their texts."""
        rows = self.verdicts.alive()
        return rows, self.texts if len(rows) == len(self.texts) else self.texts.take(pa.array(rows))


def clean_batch(config: CleanConfig, batch: pa.RecordBatch) -> Cleaned:
    """Normalise the texts of a batch and apply the rules, the cheap ones first."""
    texts = normalise_column(batch.column("text"), config.unicode)
    short = config.fineweb.short_line_characters if config.fineweb else 0
    stats = measure(texts, short)
    cleaned = Cleaned(texts, batch.column("meta"), Verdicts(len(texts)), stats, values=values_of(stats))
    verdicts = cleaned.verdicts
    verdicts.drop(stats.characters < config.min_chars, "min_chars")
    if config.max_chars is not None:
        verdicts.drop(stats.characters > config.max_chars, "max_chars")
    if config.language:
        apply_language(config.language, batch.column("meta"), cleaned)
    if config.gopher:
        apply_gopher(config.gopher, cleaned)
    if config.c4:
        apply_c4(config.c4, config.min_chars, cleaned)
    if config.fineweb:
        apply_fineweb(config.fineweb, cleaned)
    if config.masking:
        apply_masking(config.masking, cleaned)
    return cleaned


def apply_language(rules: LanguageRules, metas: pa.Array, cleaned: Cleaned) -> None:
    rows, texts = cleaned.alive()
    languages, scores = identify_all(pc.utf8_slice_codeunits(texts, 0, rules.max_chars).to_pylist())
    known = cleaned.values.setdefault("language score", np.full(len(metas), np.nan))
    known[rows] = scores
    found = list(zip(rows.tolist(), languages, scores.tolist(), strict=True))
    cleaned.verdicts.drop_found(
        (row, "language", f"{language} {score:.2f}")
        for row, language, score in found
        if rules.broken(language, score)
    )
    written = [
        json.dumps(json.loads(meta) | {"language": language, "language_score": score})
        for (_, language, score), meta in zip(found, metas.take(pa.array(rows)).to_pylist(), strict=True)
    ]
    cleaned.metas = replace_rows(metas, rows, written)


def apply_gopher(rules: GopherRules, cleaned: Cleaned) -> None:
    for reason, broken in rules.broken(cleaned.stats):
        cleaned.verdicts.drop(broken, reason)
    rows, texts = cleaned.alive()
    for reason, broken in rules.broken_by_ngrams(texts, cleaned.stats.take(rows)):
        cleaned.verdicts.drop(broken, reason, rows)


def apply_c4(rules: C4Rules, min_chars: int, cleaned: Cleaned) -> None:
    rows, texts = cleaned.alive()
    for reason, broken in rules.broken(texts):
        cleaned.verdicts.drop(broken, reason, rows)
    rows, texts = cleaned.alive()
    left, removed, sentences = rules.remove_lines(texts)
    too_short = pc.utf8_length(left).to_numpy(zero_copy_only=False) < min_chars
    cleaned.verdicts.drop(too_short, "min_chars", rows)
    if rules.min_sentences is not None:
        cleaned.verdicts.drop(sentences < rules.min_sentences, "c4_min_sentences", rows)
    changed = removed.any(axis=1) & (cleaned.verdicts.codes[rows] == 0)
    cleaned.replace(rows[changed], left.filter(pa.array(changed)))
    names = [*(f"lines_removed/{reason}" for reason in LINE_REASONS), "removed/citations"]
    amounts = removed[changed].sum(axis=0).tolist()
    cleaned.counts |= {name: amount for name, amount in zip(names, amounts, strict=True) if amount}


def apply_fineweb(rules: FineWebRules, cleaned: Cleaned) -> None:
    rows, texts = cleaned.alive()
    stats = cleaned.stats.take(rows) if not cleaned.changed else measure(texts, rules.short_line_characters)
    for reason, broken in rules.broken(stats):
        cleaned.verdicts.drop(broken, reason, rows)


def apply_masking(rules: Masking, cleaned: Cleaned) -> None:
    rows, texts = cleaned.alive()
    rows = rows[rules.candidates(texts)]
    changed: list[tuple[int, str]] = []
    for row, text in zip(rows.tolist(), cleaned.texts.take(pa.array(rows)).to_pylist(), strict=True):
        masked, counts = rules.mask(text)
        for kind, amount in counts.items():
            if amount:
                name = f"masked/{kind}"
                cleaned.counts[name] = cleaned.counts.get(name, 0) + amount
        if masked != text:
            changed.append((row, masked))
    cleaned.replace(np.array([row for row, _ in changed], np.int64), [text for _, text in changed])


def write_batch(
    batch: pa.RecordBatch, cleaned: Cleaned, kept: ShardWriter, rejected: ShardWriter, tally: Tally
) -> None:
    """Write a batch's documents to where they belong, and count them."""
    verdicts = cleaned.verdicts
    alive = verdicts.codes == 0
    columns = [batch.column("id"), cleaned.texts, batch.column("source"), cleaned.metas]
    whole = pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
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
