"""Settings of texts and tasks that a model is scored on, and of the stage ``score``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, PrivateAttr, model_validator

from data_pipeline.core.config import Config
from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import PinnedFile, content_sha256, pin
from data_pipeline.core.shipped import is_shipped
from data_pipeline.stage import Runtime, StageConfig
from llm.score.prompts import Kind

NAME = r"^[A-Za-z0-9_.-]+$"


class SetConfig(Config):
    """A fixed set of texts that are no part of a corpus, by which models of any corpora and tokenizers are compared."""

    name: str = Field(pattern=NAME)
    """Name in tables and metrics."""
    path: Path
    """JSON lines or Parquet with a text a row, or a text file that is one document; ``.gz`` at the end where it is
    compressed; on the hub ``hf://datasets/OWNER/NAME@REVISION/FILE``."""
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
    """JSON lines, with ``.gz`` at the end where they are compressed, here or on the hub; an item's fields go by its
    kind."""
    kind: Kind
    """``choice``: query, choices, gold. ``schema``: context_options, continuation, gold. ``continuation``: context,
    continuation. ``pairs``: sentence_good, sentence_bad. ``generation``: question, answers."""
    shots: int = Field(default=0, ge=0)
    """Solved items that stand before each, drawn from the others."""
    delimiter: str = " "
    """Stands between question and answer."""
    max_items: int | None = Field(default=None, ge=1)
    """At most so many items, the first ones of the file."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the shots: item n draws its own with seed + n."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Tokens of an answer that is generated, at most; None: 32. Other kinds generate none."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    """Texts that such an answer ends before; None: a line break."""

    @model_validator(mode="after")
    def _pairs_have_no_shots(self) -> TaskConfig:
        if self.kind == "pairs" and self.shots:
            raise ValueError("pairs are sentences, which nothing stands before: leave shots out")
        return self

    @model_validator(mode="after")
    def _only_answers_are_generated(self) -> TaskConfig:
        if self.kind != "generation" and not (self.max_new_tokens is None and self.stop is None):
            raise ValueError("max_new_tokens and stop are for tasks of kind generation: leave them out")
        return self


def refuse_same_names(sets: Iterable[SetConfig], tasks: Iterable[TaskConfig], key: str) -> None:
    """See that each set and task has a name of its own; ``key`` is the setting that lists them.

    Raises:
        ValueError: two have the same.
    """
    names = [*(one.name for one in sets), *(one.name for one in tasks)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two of {key}.sets and tasks are called {', '.join(sorted(twice))}")


class FixedConfig(StageConfig):
    """Sets and tasks of a stage that scores a model on some."""

    stage: ClassVar[str]
    """The stage's name, for messages."""

    sets: tuple[SetConfig, ...] = ()
    """Fixed sets of texts that the model is scored on: see docs/evaluate.md."""
    tasks: tuple[TaskConfig, ...] = ()
    """Tasks that the model is scored on: see docs/evaluate.md."""
    runtime: Runtime = Runtime()

    _files: tuple[PinnedFile, ...] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        refuse_same_names(self.sets, self.tasks, self.stage)
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
        sets = pin([one.path for one in self.sets], f"{self.stage}.sets")
        for one, file in zip(self.sets, sets, strict=True):
            if one.sha256 not in (None, file.sha256):
                raise UserError(
                    f"{self.stage}.sets: {one.path} has the sha256 {file.sha256}, not {one.sha256}"
                )
        pinned._files = (*sets, *pin([task.path for task in self.tasks], f"{self.stage}.tasks"))
        return pinned

    def foresee(self, lineage: Mapping[str, Sequence[StageConfig]]) -> list[str]:
        """Warn of sets and tasks that no step keeps out of the documents that the model is trained on.

        Those that llmill ships were written for it: a corpus has their texts by chance only.
        """
        known = [one for config in lineage["model"] if (one := config.kept_out()) is not None]
        kept_out = frozenset().union(*known)
        scored: list[SetConfig | TaskConfig] = [*self.sets, *self.tasks]
        files = zip(scored, [*self.set_files, *self.task_files], strict=True)
        names = [one.name for one, file in files if file.sha256 not in kept_out and not is_shipped(one.path)]
        if not (known and names):
            return []
        return [
            f"{', '.join(names)}: not among clean.decontamination.sets, so training documents may hold "
            f"{'it' if len(names) == 1 else 'them'}"
        ]

    def identity(self) -> dict[str, Any]:
        """Settings as they are, files by the hash of their content."""
        values = super().identity()
        for kind, files in (("sets", self.set_files), ("tasks", self.task_files)):
            for described, file in zip(values[kind], files, strict=True):
                described["path"] = file.sha256
                described.pop("sha256", None)
                if described.get("kind") != "generation":  # nor had other kinds these
                    described.pop("max_new_tokens", None)
                    described.pop("stop", None)
            if not files:  # as it was before there were any, so that what was sealed then is found
                del values[kind]
        return values


class HarnessConfig(Config):
    """Tasks of EleutherAI's lm-evaluation-harness, which `pip install 'llmill[harness]'` brings."""

    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    """Names of its tasks, groups or tags, as ``lm_eval ls tasks`` lists them, and of those in `include`."""
    include: Path | None = None
    """A folder of more tasks, in the harness's YAML; data that they read from files lie in it too."""
    max_items: int | None = Field(default=None, ge=1)
    """At most so many items of each task, the first ones; ``--limit`` of the harness."""

    def pinned(self) -> dict[str, str | None]:
        """Return what is installed and what `include` holds, which are identity.

        Raises:
            UserError: the harness is not installed, or the folder can't be read.
        """
        try:
            installed = version("lm_eval")
        except PackageNotFoundError:
            raise UserError(
                "score.harness needs lm-evaluation-harness, which is not installed: pip install 'llmill[harness]'"
            ) from None
        if self.include is None:
            return {"version": installed, "include": None}
        if not self.include.is_dir():
            raise UserError(f"score.harness.include: {self.include} is no folder")
        paths = [
            path for path in self.include.rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        files = {path.relative_to(self.include).as_posix(): path for path in paths}
        return {"version": installed, "include": content_sha256(files)}


class ScoreConfig(FixedConfig):
    """Settings of scoring any model on sets and tasks."""

    stage = "score"

    harness: HarnessConfig | None = None
    """Tasks that lm-evaluation-harness scores the model on, beside `tasks`: see docs/evaluate.md."""

    _harness: dict[str, str | None] | None = PrivateAttr(default=None)

    def resolve(self) -> Self:
        if not (self.sets or self.tasks or self.harness):
            raise UserError(
                "there is nothing to score: name a set or a task at least (score.sets, score.tasks)"
            )
        pinned = super().resolve()
        if self.harness and pinned._harness is None:
            pinned._harness = self.harness.pinned()
        return pinned

    def identity(self) -> dict[str, Any]:
        """As of sets and tasks; the harness by its version, and its folder by what is in it."""
        values = super().identity()
        if self.harness is None:  # as it was before there was one
            del values["harness"]
        else:
            assert self._harness is not None, "resolve() the config first"
            values["harness"] |= self._harness
        return values


class ValidateOn(Config):
    """Sets and tasks that a model is scored on while it is trained."""

    sets: tuple[SetConfig, ...] = ()
    """Fixed sets of texts, as `evaluate.sets` has them, without a stride."""
    tasks: tuple[TaskConfig, ...] = ()
    """Tasks, as `evaluate.tasks` has them."""
    every: int | None = Field(default=None, ge=1)
    """Steps between scores, with some after the last one; None: as `validation.every`, or the multiple of it by which
    all of them together read at most 2% as many tokens as are trained on, on each rank."""
    items: int = Field(default=200, ge=1)
    """At most so many documents of each set and items of each task, the first ones."""

    @model_validator(mode="after")
    def _can_be_logged(self) -> ValidateOn:
        refuse_same_names(self.sets, self.tasks, "validate_on")
        if generated := [task.name for task in self.tasks if task.kind == "generation"]:
            raise ValueError(
                f"answers are generated by evaluate and score only: leave {', '.join(generated)} out"
            )
        if strides := [one.name for one in self.sets if one.stride]:
            raise ValueError(
                f"a stride is for a second score, which only evaluate makes: leave it out of {', '.join(strides)}"
            )
        return self

    @property
    def paths(self) -> list[Path]:
        """Files of the sets, then of the tasks."""
        return [*(one.path for one in self.sets), *(task.path for task in self.tasks)]

    def most(self, own: int | None) -> int:
        """Return the smaller one of `items` and a limit of a set's or task's ``own``."""
        return min(self.items, own or self.items)
