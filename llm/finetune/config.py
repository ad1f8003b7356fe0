"""Settings of the stage ``finetune`` that a recipe may give, and those of any training on packed rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from data_pipeline.core.config import Config
from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import PinnedFile, pin
from llm.data.mixture import Mixture
from llm.machine.hardware import require_ranks
from llm.model.config import Lora, ModelConfig, ModelShape
from llm.pretrain.config import PretrainConfig
from llm.training.config import OptimizerConfig, Samples, TrainingConfig, TrainingRuntime, Validation
from llm.training.resolved import pin_precision
from llm.training.schedule import Schedule

SHARED = [*TrainingConfig.model_fields.keys() - {"runtime"}]
"""Settings that any training has."""


class DataFile(Config):
    """A file that is read."""

    path: Path
    """JSON lines, a JSON array or Parquet (``.gz`` at the end of JSON that is compressed; on the hub
    ``hf://datasets/OWNER/NAME@REVISION/FILE``)."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]+$")
    """Name in reports; None: the file's."""
    license: str | None = None
    """Licence under which it may be used, for the model card."""
    origin: str | None = None
    """Where it comes from, in words, for the model card."""
    weight: float | None = Field(default=None, gt=0)
    """Weight of its rows in what is read, where each file has one; None: each row as often as any other."""

    @property
    def called(self) -> str:
        """Its name."""
        return self.name or self.path.name.partition(".")[0]


class FinetuneRuntime(TrainingRuntime):
    """How training is executed."""

    validation: Validation = Validation(every=25)
    samples: Samples = Samples(every=0)
    norms_every: int = Field(default=0, ge=0)
    """Steps between measurements of gradient and update norms by layer, with one in the last step; 0: none."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints."""


class RowsConfig(TrainingConfig):
    """Settings of a training on texts that are packed into rows, from a model that is there."""

    stage: ClassVar[str]
    """Its stage, as recipes name it."""
    noun: ClassVar[str]
    """A word for the texts."""
    longest: ClassVar[int] = 1024
    """Tokens of a row, at most, where it is not said."""
    data: tuple[DataFile, ...] = Field(min_length=1)
    """Files of the texts; one may be given by itself."""
    context: int | None = Field(default=None, ge=16)
    """Tokens of a row, into which whole texts are packed; None: as many as the model reads, at most 1,024."""
    longer: Literal["cut", "drop"] = "cut"
    """Whether what is longer than a row loses its end, or is dropped."""
    packing: bool = True
    """Whether a row holds several texts, none of which sees another; else each has a row of its own."""
    held_out: float = Field(default=0.05, gt=0, lt=1)
    """Share that is held out, by a hash of what was asked, so that a question is never in both."""
    epochs: float = Field(default=2.0, gt=0)
    """Times that all is read."""
    batch_rows: int = Field(default=4, ge=1)
    """Rows a step, over all ranks; with packing each holds many texts."""
    lora: Lora | None = None
    """Train low-rank adapters only; None: all of the model. They take a higher rate: 2e-4, say."""
    lr: float = Field(default=5e-5, gt=0)
    """Peak learning rate."""
    schedule: Schedule = Schedule(warmup_share=0.05)
    optimizer: OptimizerConfig = OptimizerConfig(kind="adamw")
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moments."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled; of hidden matrices and the head."""
    runtime: FinetuneRuntime = FinetuneRuntime()

    _files: tuple[PinnedFile, ...] | None = PrivateAttr(default=None)

    @field_validator("data", mode="before")
    @classmethod
    def _one_by_itself(cls, data: Any) -> Any:
        return [data] if isinstance(data, Mapping | DataFile) else data

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = [one.called for one in self.data]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two files of data are called {', '.join(sorted(twice))}: give them names")
        if len({one.weight is None for one in self.data}) > 1:
            raise ValueError("weights are given of all files of data, or of none")
        if self.runtime.sequence_parallel > 1 or self.runtime.tensor_parallel > 1:
            raise ValueError(
                "packed rows are not shared among ranks: set runtime.sequence_parallel and tensor_parallel to 1"
            )
        if self.schedule.batch_warmup is not None:
            raise ValueError("schedule.batch_warmup is for pretraining: leave it out")
        if self.batch_rows % self.runtime.ranks:
            raise ValueError(f"batch_rows {self.batch_rows} does not divide among {self.runtime.ranks} ranks")
        assert self.mixture is None or Mixture.of(self.mixture, self.batch_rows)  # raises ValueError
        return self

    @property
    def mixture(self) -> dict[str, float] | None:
        """Weight of each file, where they have some."""
        found = {one.called: one.weight for one in self.data if one.weight is not None}
        return found or None

    @property
    def files(self) -> tuple[PinnedFile, ...]:
        """The files; only a resolved config has them."""
        assert self._files is not None, "resolve() the config first"
        return self._files

    def resolve(self) -> Self:
        """Return a copy that knows the content of its files, and the precision of this machine.

        Raises:
            UserError: a file can't be read; more ranks than this machine has room for; a file of
            ``runtime.validate_on`` that can't be scored.
        """
        require_ranks(self.runtime.ranks)
        resolved = self.model_copy()
        if resolved._files is None:
            resolved.pin_files()
        if self.runtime.validate_on.paths:
            from llm.training.scores import checked  # torch

            checked(self.runtime.validate_on)
        if self.runtime.launcher != "local":
            if self.precision == "auto":
                raise UserError(
                    f"{self.stage}.precision is auto, which this machine cannot resolve for those of Slurm:\n"
                    f"set {self.stage}.precision to bf16 or fp32"
                )
            return resolved
        return resolved.model_copy(update={"precision": pin_precision(self.precision)})

    def pin_files(self) -> None:
        """Look at the files that it names.

        Raises:
            UserError: one can't be read.
        """
        self._files = pin([one.path for one in self.data], f"{self.stage}.data")

    def identity(self) -> dict[str, Any]:
        """Settings as they are, files by the hash of their content."""
        values = super().identity()
        for described, file in zip(values["data"], self.files, strict=True):
            described["path"] = file.sha256
            described["name"] = described["name"] or file.path.name.partition(".")[0]
        return values

    def row_length(self, model: ModelConfig) -> int:
        """Return the tokens of a row.

        Raises:
            UserError: the model reads fewer.
        """
        if self.context is not None and self.context > model.context:
            raise UserError(
                f"{self.stage}.context is {self.context:,}, and the model reads {model.context:,} tokens at once: "
                "lower it"
            )
        return self.context or min(self.longest, model.context)

    def training(self, model: ModelConfig, rows: int) -> PretrainConfig:
        """Return the settings of the training on so many rows, as the ranks read them."""
        length = self.row_length(model)
        steps = max(1, round(self.epochs * rows / self.batch_rows))
        shape = model.model_dump(include=set(ModelShape.model_fields)) | {"context": length}
        return PretrainConfig.model_validate(
            {
                **{name: getattr(self, name) for name in SHARED},
                "model": ModelShape.model_validate(shape),
                "tokens": steps * self.batch_rows * length,
                "batch_tokens": self.batch_rows * length,
                "mask_documents": True,
                "mixture": self.mixture,
                "runtime": TrainingRuntime.model_validate(self.runtime.model_dump()),
            }
        )


class FinetuneConfig(RowsConfig):
    """Settings of a training on conversations.

    The rows of ``data`` have ``messages``, ``conversations``, ``prompt`` and ``completion``, or ``instruction``,
    ``input`` and ``output``.
    """

    stage: ClassVar[str] = "finetune"
    noun: ClassVar[str] = "conversations"
    template: Path | None = None
    """A chat template in Jinja; None: the tokenizer's own, or one like ChatML on the tokens that it reserves."""
    answers: int = Field(default=4, ge=0)
    """Held-out questions that are answered before and after training."""
    answer_tokens: int = Field(default=64, ge=1)
    """Tokens of such an answer, at most."""

    _template: PinnedFile | None = PrivateAttr(default=None)

    @property
    def own_template(self) -> str | None:
        """The chat template that `template` names."""
        return self._template.text() if self._template else None

    def pin_files(self) -> None:
        """Look at the files that it names.

        Raises:
            UserError: one can't be read.
        """
        super().pin_files()
        self._template = pin([self.template], f"{self.stage}.template")[0] if self.template else None

    def identity(self) -> dict[str, Any]:
        """Settings as they are, files by the hash of their content."""
        values = super().identity()
        if self._template:
            values["template"] = self._template.sha256
        return values
