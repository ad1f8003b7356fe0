"""How the rules of stage ``clean`` are asked of a batch of documents: each of what those before it left."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.clean.c4 import LINE_REASONS, C4Rules
from data_pipeline.clean.fineweb import FineWebRules
from data_pipeline.clean.language import LanguageRules, identify_all
from data_pipeline.clean.masking import Masking
from data_pipeline.clean.normalise import Form, normalise_column
from data_pipeline.clean.quality import GopherRules
from data_pipeline.clean.report import values_of
from data_pipeline.clean.text_columns import replace_rows
from data_pipeline.clean.text_stats import TextStats, measure
from data_pipeline.clean.verdicts import Verdicts
from data_pipeline.core.text import finite


@dataclass
class Cleaned:
    """A batch of documents after the rules."""

    texts: pa.Array
    metas: pa.Array
    verdicts: Verdicts
    stats: TextStats
    """Counts of the normalised texts, before any rule changed them."""
    counts: dict[str, int] = field(default_factory=dict)
    values: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    changed: bool = False
    """Whether `texts` are no longer those of which `stats` speak."""

    def replace(self, rows: NDArray[np.int64], texts: pa.Array | list[str]) -> None:
        """Put other texts into some rows (ascending)."""
        self.texts = replace_rows(self.texts, rows, texts)
        self.changed |= len(rows) > 0

    def alive(self) -> tuple[NDArray[np.int64], pa.Array]:
        """Return the rows not dropped so far, and their texts."""
        rows = self.verdicts.alive()
        return rows, self.texts if len(rows) == len(self.texts) else self.texts.take(pa.array(rows))


def measured(batch: pa.RecordBatch, form: Form | None, short: int) -> Cleaned:
    """Return a batch with its texts normalised and counted (see `measure`), before any rule."""
    texts = normalise_column(batch.column("text"), form)
    stats = measure(texts, short)
    return Cleaned(
        texts=texts,
        metas=batch.column("meta"),
        verdicts=Verdicts(len(texts)),
        stats=stats,
        values=values_of(stats),
    )


def apply_language(rules: LanguageRules, cleaned: Cleaned) -> None:
    metas = cleaned.metas
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
        json.dumps(
            finite(json.loads(meta) | {"language": language, "language_score": score}), allow_nan=False
        )
        for (_, language, score), meta in zip(found, metas.take(pa.array(rows)).to_pylist(), strict=True)
    ]
    cleaned.metas = replace_rows(metas, rows, written)


def apply_gopher(rules: GopherRules, cleaned: Cleaned) -> None:
    for reason, broken in rules.broken(cleaned.texts, cleaned.stats):
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
    most = removed.argmax(axis=1)
    for rule, reason in enumerate((*LINE_REASONS, "citations")):
        cleaned.verdicts.drop(too_short & (most == rule), f"c4_{reason}", rows)
    if rules.min_sentences is not None:
        cleaned.verdicts.drop(sentences < rules.min_sentences, "c4_min_sentences", rows)
    changed = removed.any(axis=1) & (cleaned.verdicts.codes[rows] == 0)
    cleaned.replace(rows[changed], left.filter(pa.array(changed)))
    names = [*(f"lines_removed/{reason}" for reason in LINE_REASONS), "cut/citations"]
    amounts = removed[changed].sum(axis=0).tolist()
    cleaned.counts |= {name: amount for name, amount in zip(names, amounts, strict=True) if amount}


def apply_fineweb(rules: FineWebRules, cleaned: Cleaned) -> None:
    rows, texts = cleaned.alive()
    stats = cleaned.stats.take(rows) if not cleaned.changed else measure(texts, rules.short_line_characters)
    for reason, broken in rules.broken(stats):
        cleaned.verdicts.drop(broken, reason, rows)


def apply_masking(rules: Masking, cleaned: Cleaned) -> None:
    for kind in rules.kinds():
        rows, texts = cleaned.alive()
        rows = rows[rules.candidates(kind, texts)]
        found = [rules.mask(kind, text) for text in cleaned.texts.take(pa.array(rows)).to_pylist()]
        masked = np.array([amount > 0 for _, amount in found], np.bool_)
        cleaned.replace(rows[masked], [text for text, amount in found if amount])
        if amount := sum(amount for _, amount in found):
            cleaned.counts[f"masked/{kind}"] = amount


def apply_search(find: Callable[[pa.Array], Iterator[tuple[int, str, str]]], cleaned: Cleaned) -> None:
    """Drop the texts in which ``find`` finds something: (position in the column, reason, what it found)."""
    rows, texts = cleaned.alive()
    cleaned.verdicts.drop_found((int(rows[at]), reason, found) for at, reason, found in find(texts))
