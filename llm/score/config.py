"""Settings of texts and tasks that a model is scored on."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from data_pipeline.core.config import Config
from llm.score.prompts import Kind

NAME = r"^[A-Za-z0-9_.-]+$"


class SetConfig(Config):
    """A fixed set of texts that are no part of a corpus, by which models of any corpora and tokenizers are compared."""

    name: str = Field(pattern=NAME)
    """Name in tables and metrics."""
    path: Path
    """JSON lines or Parquet with a text a row, or a text file that is one document; ``.gz`` at the end where it is
    compressed."""
    text: str = "text"
    """The field, or column, that holds a document's text."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Checksum that the file must have; None: whatever it has."""
    max_documents: int | None = Field(default=None, ge=1)
    """At most so many documents, the first ones."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens between windows of a second score, in which a token has more of its document before it; None: no second
    score."""


class TaskConfig(Config):
    """A task: a file of items, each with its right answer."""

    name: str = Field(pattern=NAME)
    """Name in tables and metrics."""
    path: Path
    """JSON lines, with ``.gz`` at the end where they are compressed; the fields of an item go by its kind."""
    kind: Kind
    """``choice``: query, choices, gold. ``schema``: context_options, continuation, gold. ``continuation``: context,
    continuation. ``pairs``: sentence_good, sentence_bad."""
    shots: int = Field(default=0, ge=0)
    """Solved items that stand before each, drawn from the others."""
    delimiter: str = " "
    """Stands between question and answer."""
    max_items: int | None = Field(default=None, ge=1)
    """At most so many items, the first ones of the file."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the shots: item n draws its own with seed + n."""

    @model_validator(mode="after")
    def _pairs_have_no_shots(self) -> TaskConfig:
        if self.kind == "pairs" and self.shots:
            raise ValueError("pairs are sentences, which nothing stands before: leave shots out")
        return self
