"""Settings of the stage ``evaluate`` that a recipe may give."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, PrivateAttr, model_validator

from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import PinnedFile, pin
from data_pipeline.stage import Runtime, StageConfig
from llm.pretrain.config import LARGEST_SEED, Prompts
from llm.score.config import SetConfig, TaskConfig


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
    sets: tuple[SetConfig, ...] = ()
    """Fixed sets of texts that the model is scored on: see docs/evaluate.md."""
    tasks: tuple[TaskConfig, ...] = ()
    """Tasks that the model is scored on: see docs/evaluate.md."""
    runtime: Runtime = Runtime()

    _files: tuple[PinnedFile, ...] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [*(one.name for one in self.sets), *(one.name for one in self.tasks)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two of evaluate.sets and tasks are called {', '.join(sorted(twice))}")
        return self

    @property
    def set_files(self) -> tuple[PinnedFile, ...]:
        """The sets' files; only a resolved config has them."""
        assert self._files is not None, "resolve() the config first"
        return self._files[: len(self.sets)]

    @property
    def task_files(self) -> tuple[PinnedFile, ...]:
        """The tasks' files; only a resolved config has them."""
        assert self._files is not None, "resolve() the config first"
        return self._files[len(self.sets) :]

    def resolve(self) -> Self:
        if self._files is not None:
            return self
        pinned = self.model_copy()
        sets = pin([one.path for one in self.sets], "evaluate.sets")
        for one, file in zip(self.sets, sets, strict=True):
            if one.sha256 not in (None, file.sha256):
                raise UserError(f"evaluate.sets: {one.path} has the sha256 {file.sha256}, not {one.sha256}")
        pinned._files = (*sets, *pin([task.path for task in self.tasks], "evaluate.tasks"))
        return pinned

    def identity(self) -> dict[str, Any]:
        """Settings as they are, files by the hash of their content."""
        values = super().identity()
        for kind, files in (("sets", self.set_files), ("tasks", self.task_files)):
            for described, file in zip(values[kind], files, strict=True):
                described["path"] = file.sha256
                described.pop("sha256", None)
            if not files:  # as it was before there were any, so that what was sealed then is found
                del values[kind]
        return values
