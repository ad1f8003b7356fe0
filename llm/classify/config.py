"""Settings of the stage ``classify`` that a recipe may give."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from llm.finetune.config import DataFile, RowsConfig
from llm.training.schedule import Schedule

MOST_OF_SEVERAL = 31
"""Labels, where a text may have several: they are bits of an int32."""


class LabelledFile(DataFile):
    """A file of texts with labels: CSV, TSV (in which no quotes count), JSON lines, a JSON array or Parquet, whose
    columns have names."""

    text: str | None = None
    """Column of the text; None: the one called so (or the like), or the one beside the labels where there are two."""
    label: str | None = None
    """Column of the label or labels; None: the one called so (or the like)."""


class ClassifyConfig(RowsConfig):
    """Settings of a training on texts with labels."""

    stage: ClassVar[str] = "classify"
    noun: ClassVar[str] = "texts"
    longest: ClassVar[int] = 512
    data: tuple[LabelledFile, ...] = Field(min_length=1)
    """Files of texts; one may be given by itself."""
    labels: tuple[str, ...] | None = Field(default=None, min_length=2)
    """Names of the labels, in the order of the model's outputs; None: those in the files, sorted."""
    several: bool = False
    """Whether a text may have several labels, or none: a list, or names with commas between them."""
    balance: Literal["none", "weights", "equal"] = "none"
    """"weights": each label counts alike in the loss, however many texts have it; "equal": of each label only as many
    texts are taken, and held out, as the rarest has."""
    last_blocks: int | None = Field(default=None, ge=0)
    """Train so many of the last blocks only, with the norm and the head behind them; None: all, or `lora`."""
    context: int | None = Field(default=None, ge=16)
    """Tokens of a row, into which whole texts are packed; None: as many as the model reads, at most 512."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share of the texts that is held out, by a hash of the text."""
    epochs: float = Field(default=3.0, gt=0)
    """Times that all is read."""
    batch_rows: int = Field(default=2, ge=1)
    """Rows a step, over all ranks; with packing each holds many texts."""
    schedule: Schedule = Schedule(warmup_share=0.1)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.lora is not None and self.last_blocks is not None:
            raise ValueError("lora and last_blocks are two ways to train a part: leave one of them out")
        if self.several and self.balance != "none":
            raise ValueError(f"balance: {self.balance} goes with one label a text: leave it out, or several")
        if self.labels and len(set(self.labels)) < len(self.labels):
            raise ValueError("labels names one twice")
        if self.several and self.labels and len(self.labels) > MOST_OF_SEVERAL:
            raise ValueError(
                f"a text may have several of {MOST_OF_SEVERAL} labels, not of {len(self.labels)}"
            )
        return self
