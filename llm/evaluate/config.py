"""Settings of the stage ``evaluate`` that a recipe may give."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, PrivateAttr, field_validator

from data_pipeline.core.pinned_files import PinnedFile, pin
from data_pipeline.stage import Runtime, StageConfig
from llm.pretrain.config import LARGEST_SEED, Prompts
from llm.score.config import TaskConfig


class EvaluateConfig(StageConfig):
    """Settings of an evaluation: what is evaluated, and which texts are written."""

    max_documents: int | None = Field(default=1000, ge=1)
    """At most so many held-out documents, chosen by hash of their id: the same ones for every tokenizer."""
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
    tasks: tuple[TaskConfig, ...] = ()
    """Tasks that the model is scored on: see docs/evaluate.md."""
    runtime: Runtime = Runtime()

    _files: tuple[PinnedFile, ...] | None = PrivateAttr(default=None)

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
        names = [task.name for task in tasks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two tasks are called {', '.join(sorted(twice))}")
        return tasks

    @property
    def files(self) -> tuple[PinnedFile, ...]:
        """The tasks' files; only a resolved config has them."""
        assert self._files is not None, "resolve() the config first"
        return self._files

    def resolve(self) -> Self:
        if self._files is not None:
            return self
        pinned = self.model_copy()
        pinned._files = pin([task.path for task in self.tasks], "evaluate.tasks")
        return pinned

    def identity(self) -> dict[str, Any]:
        """Settings as they are, files by the hash of their content."""
        values = super().identity()
        if not self.tasks:  # as it was before there were tasks, so that what was sealed then is found
            del values["tasks"]
            return values
        for described, file in zip(values["tasks"], self.files, strict=True):
            described["path"] = file.sha256
        return values
