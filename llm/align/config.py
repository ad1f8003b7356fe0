"""Settings of the stage ``align`` that a recipe may give."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from llm.finetune.config import FinetuneConfig
from llm.training.schedule import Schedule


class AlignConfig(FinetuneConfig):
    """Settings of a training on pairs of answers, of which people prefer one.

    The rows of ``data`` have ``chosen`` and ``rejected``, and ``prompt``, or ``instruction`` and ``input``: texts, or
    lists of messages; where these begin with the question, no other is needed.
    """

    stage: ClassVar[str] = "align"
    noun: ClassVar[str] = "pairs"
    loss: Literal["dpo", "ipo"] = "dpo"
    """Rafailov et al. 2023 (arXiv:2305.18290), or Azar et al. 2023 (arXiv:2310.12036): see `llm.training.objective`."""
    beta: float = Field(default=0.1, gt=0)
    """Weight of staying near the model that training starts from: the larger, the nearer."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs whose preference is taken to be the other way round; for dpo."""
    epochs: float = Field(default=1.0, gt=0)
    """Times that all is read."""
    lr: float = Field(default=5e-6, gt=0)
    """Peak learning rate."""
    schedule: Schedule = Schedule(warmup_share=0.1)
    answers: int = Field(default=16, ge=0)
    """Held-out questions that are answered before and after training, drawn at temperature 1: they show how long
    answers become, and how far the model has gone from where it started."""

    @model_validator(mode="after")
    def _smooths_dpo(self) -> Self:
        if self.label_smoothing and self.loss != "dpo":
            raise ValueError(f"label_smoothing goes with dpo, not with {self.loss}: leave it out")
        return self
