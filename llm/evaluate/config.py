"""Settings of the stage ``evaluate`` that a recipe may give."""

from __future__ import annotations

from pydantic import Field

from llm.score.config import FixedConfig
from llm.training.config import LARGEST_SEED, Prompts


class EvaluateConfig(FixedConfig):
    """Settings of an evaluation: what is evaluated, and which texts are written."""

    stage = "evaluate"

    max_documents: int | None = Field(default=1000, ge=1)
    """At most so many held-out documents, chosen by hash of their id: the same ones for every tokenizer."""
    contamination: bool = True
    """Look in the training documents for what `sets` and `tasks` hold, and score also without what is found."""
    prompts: Prompts = ("", "The ", "In the beginning")
    """A sample is written for each; "" lets the model begin."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Length of a sample, at most."""
    temperature: float = Field(default=0.8, ge=0)
    """0 takes the likeliest token."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Tokens are drawn from the likeliest that together have this probability."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of the samples."""
