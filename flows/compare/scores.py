"""The bits that each model of some runs needs for each held-out document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from flows.compare.subjects import Subject
from llm.score.statistics import MIN_DOCUMENTS, Floats


class NotComparable(Exception):
    """Models that can't be compared; the message says why."""


@dataclass(frozen=True)
class Scores:
    """The bits that each model needs for each held-out document."""

    ids: list[str]
    bytes: Floats
    """Shape (documents,)."""
    bits: Floats
    """Shape (runs, documents)."""

    @property
    def bits_per_byte(self) -> Floats:
        """Bits per byte of each run, over all documents."""
        totals: Floats = self.bits.sum(axis=1) / self.bytes.sum()
        return totals


def read_scores(subjects: Sequence[Subject]) -> Scores:
    """The held-out documents of all runs.

    Raises:
        NotComparable: they are not the same ones, or too few.
    """
    if only := [one.label for one in subjects if one.evaluation.stage != "evaluate"]:
        are = "is" if len(only) == 1 else "are"
        raise NotComparable(f"{' and '.join(only)} {are} scored on sets and tasks only")
    tables = [read_documents(subject) for subject in subjects]
    first, ids = tables[0], sorted(tables[0])
    for subject, other in zip(subjects, tables, strict=True):
        if why := different(first, other):
            raise NotComparable(
                f"{subjects[0].label} and {subject.label} were evaluated on other documents ({why}); same download, "
                "clean, dedup, tokenize and evaluate.max_documents give the same ones"
            )
    if len(ids) < MIN_DOCUMENTS:
        raise NotComparable(
            f"{len(ids)} held-out documents are too few to compare, {MIN_DOCUMENTS} are needed: raise "
            "tokenize.val_fraction"
        )
    sizes = np.array([first[id][0] for id in ids], np.float64)
    return Scores(ids, sizes, np.array([[one[id][1] for id in ids] for one in tables]))


def read_documents(subject: Subject) -> dict[str, tuple[int, float]]:
    """Id -> bytes and bits of each held-out document that has text."""
    path = subject.evaluation.path / "documents.parquet"
    table = pq.read_table(path, columns=["id", "bytes", "text_nats"])
    rows = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
    return {id: (size, nats / math.log(2)) for id, size, nats in rows if size}


def different(first: Mapping[str, tuple[int, float]], other: Mapping[str, tuple[int, float]]) -> str:
    """How two sets of documents differ; empty where they do not."""
    gone, new = len(first.keys() - other.keys()), len(other.keys() - first.keys())
    if gone or new:
        return f"{gone} of {len(first)} are not among the other's {len(other)}, {new} of those are new"
    changed = sum(first[id][0] != other[id][0] for id in first)
    return f"{changed} of {len(first)} have another text" if changed else ""
