"""Stage ``clean``: normalise texts and drop those that break a rule.

Every drop has a named, counted reason; the report shows a few of each, and ``rejected/`` holds them all. The rules
see whole columns: what they need is counted by kernels over Arrow's buffers, and only texts that are dropped or
changed become Python strings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, PrivateAttr, model_validator

from data_pipeline.clean.apply_rules import (
    Cleaned,
    apply_c4,
    apply_fineweb,
    apply_gopher,
    apply_language,
    apply_masking,
    apply_search,
    measured,
)
from data_pipeline.clean.blocklists import (
    BLOCKED_ID,
    Blocklists,
    id_blocklist,
    phrase_blocklist,
    url_blocklist,
)
from data_pipeline.clean.c4 import C4Rules
from data_pipeline.clean.decontaminate import Decontamination, contamination
from data_pipeline.clean.fineweb import FineWebRules
from data_pipeline.clean.language import LanguageRules
from data_pipeline.clean.masking import Masking
from data_pipeline.clean.matchless import empty_lists, foreign_ids, short_items, without_addresses
from data_pipeline.clean.normalise import Form
from data_pipeline.clean.quality import GopherRules
from data_pipeline.clean.report import EXAMPLES, Tally, summarise
from data_pipeline.clean.verdicts import KEPT
from data_pipeline.core.errors import UserError
from data_pipeline.core.files import once
from data_pipeline.core.pinned_files import PinnedFile, pin
from data_pipeline.core.text import excerpt, table
from data_pipeline.documents import REJECTED, SCHEMA, ShardWriter, read_shard, shard_paths, write_shard
from data_pipeline.stage import Metrics, Runtime, StageConfig, StageContext


@dataclass(frozen=True)
class Files:
    """The files that a config names, as they were when the run was planned."""

    urls: tuple[PinnedFile, ...] = ()
    phrases: tuple[PinnedFile, ...] = ()
    ids: tuple[PinnedFile, ...] = ()
    sets: tuple[PinnedFile, ...] = ()


class CleanConfig(StageConfig):
    """How texts are normalised, and which are dropped or changed.

    The rules are asked in the order of FineWeb's pipeline: blocked ids, bounds of length, blocked addresses,
    language, Gopher, C4,
    FineWeb, blocked phrases, decontamination. Masking comes last.
    """

    unicode: Form | None = "NFC"
    """Normal form that texts are brought to; None leaves them as they are."""
    min_chars: int = Field(default=1, ge=1)
    """Length bounds of the normalised text."""
    max_chars: int | None = Field(default=None, ge=1)
    """Longer texts are dropped; None: of no length."""
    blocklists: Blocklists | None = None
    """Documents to drop by address, phrase or id."""
    language: LanguageRules | None = None
    """Languages to keep, by a classifier."""
    gopher: GopherRules | None = GopherRules()
    """Quality and repetition; None switches all of them off."""
    c4: C4Rules | None = None
    """The only rules that take something out of a text: lines."""
    fineweb: FineWebRules | None = None
    """FineWeb's rules of lines."""
    decontamination: Decontamination | None = None
    """Evaluation sets whose items no document may hold."""
    masking: Masking | None = None
    """Asked of the documents that are kept: it changes them."""
    runtime: Runtime = Runtime()

    _files: Files | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars {self.max_chars} is below min_chars {self.min_chars}")
        return self

    @property
    def files(self) -> Files:
        """The files that the config names; only a resolved config has them."""
        assert self._files is not None, "resolve() the config first"
        return self._files

    def resolve(self) -> Self:
        if self._files is not None:
            return self
        lists = self.blocklists or Blocklists()
        sets = self.decontamination.sets if self.decontamination else {}
        pinned = self.model_copy()
        pinned._files = Files(
            urls=pin(lists.urls, "clean.blocklists.urls"),
            phrases=pin(lists.phrases, "clean.blocklists.phrases"),
            ids=pin(lists.ids, "clean.blocklists.ids"),
            sets=pin([one.path for one in sets.values()], "clean.decontamination.sets"),
        )
        return pinned

    def kept_out(self) -> frozenset[str]:
        return frozenset(file.sha256 for file in self.files.sets)

    def identity(self) -> dict[str, Any]:
        """Thresholds as they are, files by the hash of their content."""
        values = super().identity()
        if self.blocklists:
            for kind in values["blocklists"]:
                values["blocklists"][kind] = [file.sha256 for file in getattr(self.files, kind)]
        if self.decontamination:
            for described, file in zip(
                values["decontamination"]["sets"].values(), self.files.sets, strict=True
            ):
                kind = file.path.name.removesuffix(".gz").rsplit(".", 1)[-1]  # the content's format
                described["path"] = f"{kind} {file.sha256}"
        return values


def clean(config: CleanConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Clean each shard of ``inputs["documents"]`` into one shard; dropped documents into ``rejected/``.

    Raises:
        UserError: a file of the config is broken or was changed, or no document is left.
    """
    config = config.resolve()
    notes = read_files(config, context)
    shards = shard_paths(inputs["documents"])
    context.progress(0, len(shards), "shards")
    work = partial(clean_shard, config.model_copy(update={"runtime": Runtime()}), out)
    tallies = context.map(work, shards, names=[path.stem for path in shards])
    context.progress(len(shards), len(shards), "shards")
    metrics = summarise(tallies, out, notes)
    warn_of_matchless(config, tallies, metrics, shards, context)
    if not metrics["kept"]:
        found = ", ".join(
            f"{name} {count:.0f}" for name, count in metrics.items() if name.startswith("dropped/")
        )
        raise UserError(f"clean dropped every document ({found}); loosen the rules under `clean`")
    return metrics


def warn_of_matchless(
    config: CleanConfig,
    tallies: Sequence[Mapping[str, Any]],
    metrics: Metrics,
    shards: Sequence[Path],
    context: StageContext,
) -> None:
    """Warn of lists that matched nothing because they could not."""
    found: list[str] = []
    if config.files.urls and "dropped/blocked_url" not in metrics:
        found += without_addresses(shards, context)
    if config.files.ids and f"dropped/{BLOCKED_ID}" not in metrics:
        found += foreign_ids(config.files.ids, {source for tally in tallies for source in tally["groups"]})
    for warning in found:
        context.note(warning, warning=True)


def read_files(config: CleanConfig, context: StageContext) -> list[str]:
    """Read the files that the config names, so that a mistake in one shows before any work; notes for the report."""
    kinds = {"urls": config.files.urls, "phrases": config.files.phrases, "ids": config.files.ids}
    for warning in empty_lists(kinds):
        context.note(warning, warning=True)
    if config.files.ids:
        id_blocklist(config.files.ids)
    if config.files.urls:
        url_blocklist(config.files.urls)
    if config.files.phrases:
        phrase_blocklist(config.files.phrases, config.unicode)
    if not config.decontamination:
        return []
    sets = contamination(config.decontamination, config.files.sets, config.unicode).describe()
    n = config.decontamination.ngram
    for warning in short_items(sets, n):
        context.note(warning, warning=True)
    header = ("evaluation set", "items", f"of fewer than {n} words, not looked for", f"{n}-grams")
    return [table(header, sets).rstrip("\n")]


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


def clean_batch(config: CleanConfig, batch: pa.RecordBatch) -> Cleaned:
    """Normalise the texts of a batch and apply the rules, the cheap ones first. ``config`` is resolved."""
    cleaned = measured(batch, config.unicode, config.fineweb.short_line_characters if config.fineweb else 0)
    characters = cleaned.stats.characters
    files = config.files
    if files.ids:
        cleaned.verdicts.drop_found(id_blocklist(files.ids).find(batch.column("id")))
    cleaned.verdicts.drop(characters < config.min_chars, "min_chars")
    if config.max_chars is not None:
        cleaned.verdicts.drop(characters > config.max_chars, "max_chars")
    if files.urls:
        cleaned.verdicts.drop_found(url_blocklist(files.urls).find(batch.column("meta")))
    if config.language:
        apply_language(config.language, cleaned)
    if config.gopher:
        apply_gopher(config.gopher, cleaned)
    if config.c4:
        apply_c4(config.c4, config.min_chars, cleaned)
    if config.fineweb:
        apply_fineweb(config.fineweb, cleaned)
    if files.phrases:
        apply_search(phrase_blocklist(files.phrases, config.unicode).find, cleaned)
    if config.decontamination:
        apply_search(contamination(config.decontamination, files.sets, config.unicode).find, cleaned)
    if config.masking:
        apply_masking(config.masking, cleaned)
    return cleaned


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
    for row in np.flatnonzero(alive)[:EXAMPLES].tolist():
        tally.add_example(KEPT, batch.column("id")[row].as_py(), cleaned.texts[row].as_py())
    dropped = np.flatnonzero(~alive)
    ids = batch.column("id").take(pa.array(dropped)).to_pylist()
    beginnings = pc.utf8_slice_codeunits(cleaned.texts.take(pa.array(dropped)), 0, 320).to_pylist()
    for row, id, beginning in zip(dropped.tolist(), ids, beginnings, strict=True):
        evidence = verdicts.evidence.get(row)
        reason = verdicts.reason(row)
        shown = f"[{evidence}] {beginning}" if evidence else beginning
        if reason == BLOCKED_ID:
            shown = "(nothing is kept)"
        rejected.add(id, reason, excerpt(shown))
        tally.add_example(reason, id, shown)
