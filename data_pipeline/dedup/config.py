"""Settings of the stage ``dedup`` that a recipe may give."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Literal, Self

from pydantic import Field, model_validator

from data_pipeline.core.words import Signs
from data_pipeline.dedup.candidates import (
    Search,
)
from data_pipeline.dedup.forecast import forecast
from data_pipeline.dedup.spans import SpanRules
from data_pipeline.dedup.verify import (
    VerifyRules,
    margin,
)
from data_pipeline.stage import Runtime, StageConfig

MATCHES = 32
"""Likely edges that a document gets from one bucket in a first search, at most. If it stays though they are many, it is
searched for again."""


class DedupRuntime(Runtime):
    """How much a worker may hold."""

    memory_mb: int = Field(default=512, ge=1)
    """Memory of each worker, besides what Python and its libraries take (about 250 MB) and the shard it reads."""


class DedupConfig(StageConfig):
    """Definition of a duplicate. `chance` is the probability that LSH finds a pair."""

    ngram: int = Field(default=5, ge=1, le=256)
    """Words in a shingle."""
    signs: Signs = "symbols"
    """Signs beside letters and digits that distinguish words, as part of the word before them: ``none``; ``symbols``:
    operators (``!$%&*+-/<=>?@^|~``) and all that Unicode calls a symbol, so that ``a < b`` is not ``a > b``, nor a
    thumb up one down; ``all``: brackets, quotes and other punctuation, too."""
    bands: int = Field(default=18, ge=1)
    """Groups of `rows` entries; documents that share a whole group are compared."""
    rows: int = Field(default=7, ge=1)
    """Entries of the signature in a band: more rows find fewer pairs, more bands find more."""
    threshold: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity from which on two documents are near-duplicates."""
    prefer: Literal["longest", "first", "best"] = "longest"
    """Which duplicate is kept: the longest in bytes, the first by id, or that of the best quality; then the first."""
    quality_field: str | None = None
    """For ``best``: the field of the documents' meta with a number, higher is better; those without come last."""
    max_comparisons: int = Field(default=10_000, ge=1)
    """Documents of a bucket that each is compared with, the most preferred of those that differ: bounds the work."""
    spans: SpanRules | None = None
    """Cut long spans that several documents have; None leaves texts whole."""
    seed: int = Field(default=0, ge=0, lt=1 << 64)
    """Seed of the hash functions."""
    runtime: DedupRuntime = DedupRuntime()

    @model_validator(mode="after")
    def _quality_where_needed(self) -> Self:
        if (self.prefer == "best") != (self.quality_field is not None):
            raise ValueError("prefer: best and quality_field (a field of the documents' meta) go together")
        return self

    @property
    def permutations(self) -> int:
        """Entries of a signature: bands * rows."""
        return self.bands * self.rows

    def chance(self, similarity: float) -> float:
        """Probability that LSH finds a pair of this similarity: 1 - (1 - s^rows)^bands."""
        return 1 - (1 - similarity**self.rows) ** self.bands

    def near_search(self) -> Search:
        """Return how candidates for near-duplicates are searched."""
        least = ceil((self.threshold - margin(self.threshold, self.permutations)) * self.permutations)
        memory = self.runtime.memory_mb * 10**6
        likely = ceil(self.threshold * self.permutations)
        return Search(
            kind="near",
            bands=self.bands,
            rows=self.rows,
            least=least,
            likely=likely,
            leaders=self.max_comparisons,
            most=MATCHES,
            memory=memory,
        )

    def verify_rules(self) -> VerifyRules:
        """Return how the edges that are found are checked."""
        return VerifyRules(
            ngram=self.ngram,
            signs=self.signs,
            seed=self.seed,
            threshold=self.threshold,
            certain=self.threshold + margin(self.threshold, self.permutations),
            memory=self.runtime.memory_mb * 10**6,
        )

    def predict(self, metrics: Mapping[str, float], workers: int) -> list[str]:
        found = f"pairs at the threshold of {self.threshold} are found with probability"
        lines = [f"{found} {self.chance(self.threshold):.3f} ({self.bands} bands of {self.rows} rows)"]
        if "kept" in metrics and "bytes_out" in metrics:
            lines += forecast(self.near_search(), metrics["kept"], metrics["bytes_out"], workers).lines()
        return lines
