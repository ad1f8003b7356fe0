"""Settings of the stage ``pretrain`` that a recipe may give. Its body, and torch, are imported elsewhere: a plan needs
neither, but where a setting names kernels or a folder that must be looked at.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data_pipeline.core.config import Config
from data_pipeline.core.errors import UserError
from data_pipeline.stage import StageConfig
from data_pipeline.train_tokenizer.stage import TokenizerConfig
from data_pipeline.train_tokenizer.tokenizer import load_tokenizer, special_tokens, vocab_size
from llm.data.mixture import Mixture
from llm.machine.hardware import require_ranks
from llm.model.config import ModelConfig, ModelShape
from llm.pretrain import branches, decay, presets, scoring
from llm.training.config import TrainingConfig
from llm.training.resolved import Wanted
from llm.training.schedule import BatchPlan, batch_plan

MOST_SAMPLINGS = 20
"""Times that samples are written, about, where it is not said how often."""
MOVED = {
    "validation": "runtime.validation",
    "recovery.max_nonfinite": "runtime.max_nonfinite",
    "recovery.max_rollbacks": "runtime.max_rollbacks",
}
"""Settings that were identity until they were found to move no bit of the weights, and where they are now."""


Point = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]
"""A number of steps, or a share of them all."""


class StartConfig(Config):
    """A training's start, within that of the model that it begins with."""

    at: Point | None = None
    """The branch point, by its step or share (it is one of the other's `keep`); None: the end."""
    optimizer: Literal["keep", "fresh"] = "fresh"
    """keep: with what the optimizer kept of the steps before, which a branch point has."""

    @property
    def needs_branch(self) -> bool:
        """Return whether it is more than the other's model."""
        return self.at is not None or self.optimizer == "keep"


class PretrainConfig(TrainingConfig):
    """Settings of a training: what is trained, on how much, and how."""

    moved: ClassVar[Mapping[str, str]] = MOVED
    depth: int | None = Field(default=None, ge=1)
    """One dial for what follows and is not set: see `llm.pretrain.presets`. Its consequences are identity, it is
    not."""
    model: ModelShape = ModelShape()
    init_from: Path | None = None
    """A folder with a model in a layout of `transformers` (an exported one, say) whose weights training starts from;
    None: weights are drawn from `seed`. What the folder holds is identity, where it lies is not."""
    tokens: int = Field(ge=1)
    """Tokens to train on; more than the corpus has means to read it again, in another order."""
    batch_tokens: int = Field(default=decay.BATCH_TOKENS, ge=2)
    """Tokens a step, over all ranks: a multiple of the context."""
    decay_at: int | None = Field(default=None, ge=1)
    """Tokens after which the rate of a wsd schedule falls: `tokens` then follow from it and `schedule.decay_share`,
    whatever is set, and a branch point is kept there, from which a training that decays later goes on."""
    mixture: dict[str, Annotated[float, Field(gt=0)]] | None = Field(default=None, min_length=1)
    """Weight of each source (by its name in download) in what is read; those not named are left out. None: each
    text as often as any other."""
    keep: tuple[Point, ...] = ()
    """Steps, or shares of them, whose checkpoints are sealed with the model: branch points, from which a training that
    would take the same steps up to there goes on by itself (see `llm.pretrain.branches`)."""
    start: StartConfig = StartConfig()
    """Where training begins if the step is given a model (``inputs: {model: STEP}``): see `llm.pretrain.start`."""
    mask_documents: bool = False
    """Let no position see another document of its sequence. The end of a document still has the next one's first token
    for its target."""
    _init_sha256: str | None = None
    _scored_tokens: int = 0
    """Tokens that are scored at once, about."""

    @model_validator(mode="before")
    @classmethod
    def _follows(cls, values: Any) -> Any:
        return decay.fill(presets.fill(values)) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.batch_tokens % self.model.context:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is not a multiple of model.context {self.model.context}"
            )
        ranks, micro, smallest = self.runtime.data_parallel_size, self.runtime.micro_batch, self.plan.smallest
        if smallest % ranks:
            raise ValueError(f"a batch of {smallest} sequences does not divide among {ranks} ranks")
        if micro != "auto" and (micro < 1 or smallest // ranks % micro):
            raise ValueError(
                f"runtime.micro_batch {micro} does not divide a rank's {smallest // ranks} sequences a step"
            )
        self.schedule.require_room(self.steps)
        if late := [step for step in self.kept_steps if step > self.steps]:
            raise ValueError(f"keep names step {late[0]}, but the run has {self.steps} steps")
        assert self.mixture is None or self.mix  # raises ValueError where it can't be shared out
        return self

    @model_validator(mode="after")
    def _shares_divide(self) -> Self:
        shape = self.model
        heads = {"heads": shape.heads, "kv_heads": shape.kv_head_count}
        for name, divided in (
            ("sequence_parallel", {"context": shape.context, **heads}),
            ("tensor_parallel", {"hidden": shape.hidden_width, **heads}),
        ):
            size = getattr(self.runtime, name)
            for what, number in divided.items():
                if number % size:
                    raise ValueError(
                        f"runtime.{name} {size} does not divide model.{what} {number}: change one of them"
                    )
        if self.runtime.tensor_parallel > 1 and self.optimizer.kind == "muon":
            raise ValueError(
                "Muon needs whole matrices, and runtime.tensor_parallel splits them: set optimizer.kind to adamw, "
                "or use zero_stage 3 in its place"
            )
        return self

    def resolve(self) -> Self:
        """Return a copy with ``precision`` pinned to what this machine computes in.

        Raises:
            UserError: more ranks than this machine has room for; attention that cannot run here; nothing to compile
                with; no model in ``init_from``; a file of ``runtime.validate_on`` that can't be scored.
        """
        here = self.runtime.launcher == "local"
        resolved = self.for_this_machine() if here else self.require_precision()
        if self.runtime.validate_on.paths:
            resolved = resolved.with_read_sets()
        return resolved if self.init_from is None else resolved.with_start(self.init_from)

    def for_this_machine(self) -> Self:
        """`resolve`, for ranks that start here."""
        require_ranks(self.runtime.ranks)
        wanted = self.wanted
        wanted.require()
        return self.model_copy(update={"precision": wanted.pin_precision()})

    def require_precision(self) -> Self:
        """`resolve`, for ranks that start on machines which this one knows nothing of."""
        if self.precision == "auto":
            raise UserError(
                "pretrain.precision is auto, which this machine cannot resolve for those of Slurm:\n"
                "set pretrain.precision to bf16 or fp32"
            )
        return self

    def with_read_sets(self) -> Self:
        """Return a copy that names the files of `runtime.validate_on` wherever it is read, after a look into each, and
        says how often they are scored."""
        from llm.training.scores import checked

        found, tokens = checked(self.runtime.validate_on)
        pinned = self.model_copy()
        pinned._scored_tokens = tokens
        checks = self.runtime.validation.every
        every = found.every or scoring.affordable(self.steps, checks, pinned.scoring_cost)
        runtime = {"validate_on": found.model_copy(update={"every": every})}
        return pinned.model_copy(update={"runtime": self.runtime.model_copy(update=runtime)})

    def with_start(self, folder: Path) -> Self:
        """Return a copy that knows what ``folder`` holds, to start from."""
        from llm.model.layouts import content_sha256

        folder = folder.expanduser().absolute()
        now = content_sha256(folder)
        if self._init_sha256 not in (None, now):
            raise UserError(f"{folder} changed since the run was planned: run again")
        pinned = self.model_copy(update={"init_from": folder})
        pinned._init_sha256 = now
        return pinned

    def identity(self) -> dict[str, Any]:
        """As for any stage, with the hash of what ``init_from`` holds in place of where it lies, without `depth` and
        `decay_at`, from which nothing follows any more, and without what does not count beside other settings."""
        identity = super().identity()
        for name in ("depth", "decay_at", "keep", *(() if self.start != StartConfig() else ("start",))):
            del identity[name]
        if self.kept_steps:  # without, as it was before there were any, so that what was sealed then is found
            identity["keep"] = self.kept_steps
        for section, name in self.idle():
            del identity[section][name]
        if identity.pop("init_from") is not None:
            assert self._init_sha256 is not None, "resolve() the config first"
            identity["init_sha256"] = self._init_sha256
        return identity

    def idle(self) -> Iterator[tuple[str, str]]:
        """Yield settings (section and name) that move no bit of the weights as the others are."""
        if self.schedule.kind == "cosine":
            yield from (("schedule", name) for name in ("decay_share", "decay_shape"))
        if self.schedule.warmup_steps is not None:
            yield "schedule", "warmup_share"
        if self.optimizer.kind == "adamw":
            yield from (("optimizer", name) for name in ("muon_lr", "momentum", "cautious_decay"))
        if self.recovery.spike_z is None:
            yield from (("recovery", name) for name in ("spike_window", "rollback_every"))

    def check_inputs(self, configs: Mapping[str, StageConfig], made: Mapping[str, Path]) -> None:
        """Refuse an `init_from` of another shape, vocabulary or tokenizer, as far as that is known, and a branch point
        that the model which training begins with will not have."""
        if "model" in configs:
            self.require_branch(configs["model"])
            self.require_shape(configs["model"])
        known = vocabulary(configs.get("tokenizer"), made.get("tokenizer"))
        if self.init_from is None or known is None:
            return
        from llm.model.layouts import require_start

        size, specials = known
        model = ModelConfig(**self.model.model_dump(), vocab_size=size)
        require_start(model, self.init_from, specials, made.get("tokenizer"))

    def check_wired(self, inputs: Collection[str]) -> None:
        """Refuse `start` without a model, and two models to begin with."""
        if "model" not in inputs and self.start != StartConfig():
            raise UserError(
                "start says where in a model's training to begin: name its step with inputs: {model: STEP}"
            )
        if self.start.needs_branch and self.runtime.tensor_parallel > 1:
            raise UserError(
                "start names a branch point, which tensor_parallel can't be begun from: set it to 1"
            )
        if "model" in inputs and self.init_from is not None:
            raise UserError("inputs.model and init_from both name a model to begin with: leave one out")

    def require_shape(self, of: StageConfig) -> None:
        """Refuse to begin with a model of another shape, as far as its training says it.

        Raises:
            UserError: it has one.
        """
        if not isinstance(of, PretrainConfig):
            return
        from llm.model.layouts import settings_to_begin

        shapes = (ModelConfig(**one.model.model_dump(), vocab_size=2) for one in (self, of))
        if settings := settings_to_begin(*shapes):
            raise UserError(
                f"the model that training begins with has another shape: of this step, set {settings}"
            )

    def require_branch(self, of: StageConfig) -> None:
        """Refuse to begin at a branch point that a training with such a config does not keep.

        Raises:
            UserError: it keeps others, or is no pretraining, or moves parameters by another optimizer.
        """
        if not self.start.needs_branch:
            return
        if not isinstance(of, PretrainConfig):
            raise UserError(
                "pretrain.start: only another pretrain step has branch points: leave start out to begin with the model"
            )
        step = of.step_at(self.start.at)
        if step not in of.kept_steps:
            kept = f"steps {', '.join(f'{one:,}' for one in of.kept_steps)}" if of.kept_steps else "none"
            raise UserError(
                f"pretrain.start: step {step:,} of the other training is no branch point, it keeps {kept}: add it to "
                "its keep"
            )
        if self.start.optimizer == "keep" and of.optimizer.kind != self.optimizer.kind:
            raise UserError(
                f"pretrain.start.optimizer: keep takes what {of.optimizer.kind} kept, and optimizer.kind is "
                f"{self.optimizer.kind}: set one of them otherwise"
            )

    def predict(self, metrics: Mapping[str, float], workers: int) -> list[str]:
        """Return what follows from `depth`, and what scoring in the loop will cost."""
        lines = presets.describe(self.model_dump())
        lines += decay.describe(self.decay_at, self.decays_after, self.tokens)
        if self._scored_tokens:
            every, cost = self.scores_every, self.scoring_cost
            lines.append(scoring.describe(self.steps, every, self._scored_tokens, cost))
        return lines

    def continued(self, made: Path, inputs: Mapping[str, str]) -> list[str]:
        """Name the branch point of an earlier training that this one goes on from."""
        found = branches.find(made, self.course, inputs)
        step = branches.newest(found, self.course)
        return [] if step is None else [self.describe_start(step, found[step])]

    @property
    def course(self) -> branches.Course:
        """All that the steps follow from, of a resolved config."""

        def described(step: int) -> str:
            return f"{self.step_samples(step)} {self.schedule.lr_multiplier(step, self.steps)!r}"

        return branches.Course(
            identity=self.identity(), steps=self.steps, described=described, kept=self.kept_steps
        )

    def describe_start(self, step: int, folder: Path) -> str:
        """Describe in a line where a training goes on from."""
        spared, all_tokens = self.tokens_after(step), self.tokens_after(self.steps)
        return (
            f"goes on from step {step:,} of pretrain {folder.parents[1].name}, which is the same up to there: "
            f"{spared:,} of {all_tokens:,} tokens are not trained on again"
        )

    @property
    def wanted(self) -> Wanted:
        """Settings that the ranks are to compute with, before it is known what their machine has."""
        runtime = self.runtime
        return Wanted(
            ranks=runtime.ranks,
            zero_stage=runtime.zero_stage,
            sequence_parallel=runtime.sequence_parallel,
            tensor_parallel=runtime.tensor_parallel,
            offload=runtime.offload,
            compile=runtime.compile,
            activation_checkpointing=runtime.activation_checkpointing,
            batches=self.plan,
            context=self.model.context,
            head_width=self.model.head_width,
            documents=self.mask_documents,
            optimizer=self.optimizer_settings,
            precision=self.precision,
            attention=runtime.attention,
            matmul=runtime.matmul,
            micro_batch=runtime.micro_batch,
        )

    @property
    def plan(self) -> BatchPlan:
        """Number of sequences that each step reads, over all ranks."""
        return batch_plan(self.tokens, self.batch_tokens, self.model.context, self.schedule.batch_warmup)

    @property
    def steps(self) -> int:
        """Optimizer steps: tokens / batch_tokens, rounded down, at least one; more with a batch warm-up."""
        return self.plan.steps

    @property
    def kept_steps(self) -> list[int]:
        """Steps after which a branch point is kept."""
        steps = {self.step_at(one) for one in self.keep}
        return sorted(steps | ({self.decays_after} if self.decay_at else set()))

    def step_at(self, point: Point | None) -> int:
        """Return a number of steps, given as that or as a share; None: all."""
        if point is None:
            return self.steps
        return point if isinstance(point, int) else max(1, round(point * self.steps))

    @property
    def decays_after(self) -> int:
        """Steps before the rate of a wsd schedule falls."""
        return self.steps - self.schedule.decay_of(self.steps)

    @property
    def samples_every(self) -> int:
        """Steps between samples; 0: none."""
        every, checks = self.runtime.samples.every, self.runtime.validation.every
        return checks * math.ceil(self.steps / checks / MOST_SAMPLINGS) if every is None else every

    @property
    def scores_every(self) -> int:
        """Steps between scores on `runtime.validate_on`, of a resolved config; 0: none."""
        chosen = self.runtime.validate_on
        if not chosen.paths:
            return 0
        assert chosen.every is not None, "resolve() the config first"
        return chosen.every

    @property
    def scoring_cost(self) -> float:
        """Tokens scored at once, on all ranks, as a share of those that are trained on."""
        return self._scored_tokens * self.runtime.ranks / self.tokens_after(self.steps)

    @property
    def mix(self) -> Mixture | None:
        """Fractions of samples among the sources of `mixture`."""
        return Mixture.of(self.mixture, self.batch_tokens // self.model.context) if self.mixture else None

    def step_samples(self, step: int) -> tuple[int, int]:
        """Return the first sample that ``step`` (from 0) reads a sequence from, and how many there are for it."""
        return self.plan.sequences_before(step), self.plan.sequences_at(step)

    def tokens_after(self, done: int) -> int:
        """Count the tokens that the first ``done`` steps read."""
        return self.plan.sequences_before(done) * self.model.context


def vocabulary(config: StageConfig | None, folder: Path | None) -> tuple[int, list[str]] | None:
    """Size and special tokens of a tokenizer that is to be learnt, or is made; None where it is to be adopted."""
    if isinstance(config, TokenizerConfig):
        return config.vocab_size, config.special_tokens
    return (vocab_size(load_tokenizer(folder)), special_tokens(folder)) if folder else None


def tokens_at(manifest: Mapping[str, Any], steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count the tokens that a sealed training had read at each step, whether that moved the weights or was skipped."""
    if "batch_tokens" in manifest["metrics"]:  # of a finetuning, whose batches are all alike
        return steps.astype(np.int64) * int(manifest["metrics"]["batch_tokens"])
    config = read_sealed(manifest["config"], manifest["runtime"])
    return np.array([config.tokens_after(step) for step in steps.tolist()], np.int64)


def read_sealed(identity: Mapping[str, Any], runtime: Mapping[str, Any]) -> PretrainConfig:
    """Return the config of a sealed training, from its manifest; of one that is older than `MOVED`, too.

    Raises:
        ValidationError: it is of another version of llmill.
    """
    config = {**identity, "runtime": {**runtime}}
    config.pop("init_sha256", None)
    for before, now in MOVED.items():
        *within, name = before.split(".")
        holder = config
        for section in within:
            holder[section] = {**holder.get(section, {})}
            holder = holder[section]
        if name in holder:
            config["runtime"][now.removeprefix("runtime.")] = holder.pop(name)
    return PretrainConfig.model_validate(config)
