"""The pretrain stage: token shards to a trained model. Here is what a recipe may say (`PretrainConfig`), and the
body, which checks that it can be done, lays the tokens flat, has the ranks started (`llm.trainer` is what each of
them runs) and turns what they leave behind into the artifact. A body started again after a kill goes on from the
newest whole checkpoint and ends with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from data_pipeline.context import (
    Config,
    Metrics,
    Runtime,
    StageConfig,
    StageContext,
    UserError,
    atomic_path,
)
from data_pipeline.token_shards import TokenShards
from data_pipeline.tokenizer import end_of_text, load_tokenizer
from data_pipeline.tokenizer import sha256 as tokenizer_sha256
from llm import batches, checkpoint, compiled, presets
from llm.attention import BackEnd, choose
from llm.corpus import Corpus
from llm.environment import remark
from llm.hardware import device_kind, hardware_precision, precision_reason, require_ranks
from llm.layouts import content_sha256, require_start
from llm.matmul import Library, choose_matmul
from llm.mixture import Mixture
from llm.model import ModelConfig, ModelShape
from llm.optim import OptimizerConfig
from llm.recovery import Recovery
from llm.schedule import BatchPlan, Schedule, batch_plan
from llm.slurm import SlurmJob
from llm.summary import describe_reading, summarise

MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Most tokens a rank works on at once when the micro-batch is "auto": what fits caches, or fills a GPU."""


class PretrainRuntime(Runtime):
    """How training is executed."""

    launcher: Literal["local", "slurm"] = "local"
    """Who starts the ranks: this machine (and those that `llm.nodes` knows of), or a job that is submitted to Slurm."""
    slurm: SlurmJob = SlurmJob()
    ranks: int = Field(default=1, ge=1)
    """Processes that share each batch: one a GPU, or a few on a CPU."""
    zero_stage: int = Field(default=0, ge=0, le=3)
    """What DeepSpeed spreads over the ranks: 1 optimizer state, 2 also gradients, 3 also parameters."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Ranks that share each window, a part of its positions each, and exchange heads for positions around attention
    (Ulysses: Jacobs et al. 2023, arXiv:2309.14509): for contexts whose activations one GPU does not hold."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks that work on the same windows, each with a part of every layer's matrices (`llm.tensor_parallel`): for
    models of which one GPU does not hold a layer's work, on GPUs with a fast link."""
    offload: Literal["none", "cpu"] = "none"
    """Where ZeRO keeps the optimizer's state, and at stage 3 the parameters, while they are not worked on: with the
    device, or in the machine's memory (Ren et al. 2021, arXiv:2101.06840)."""
    micro_batch: int | Literal["auto"] = "auto"
    """Windows a rank works on at once; the rest of its share is accumulated."""
    log_every: int = Field(default=1, ge=1)
    """Steps between step events. The losses of all steps are kept in any case."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest that are kept."""
    keep_every: int | None = Field(default=None, ge=1)
    """Also keep the checkpoints of each so many steps, while training lasts."""
    collective_timeout_seconds: float = Field(default=600, gt=0)
    """How long a rank waits for the others before the run ends: longer than anything that one of them does alone."""
    grace_seconds: float = Field(default=30, gt=0)
    """What ranks that are told to stop get to end their step and save it, before they are killed: as long as a step
    and the writing of a checkpoint take. Slurm's KillWait and Kubernetes' grace period must be longer."""
    attention: BackEnd | Literal["auto"] = "auto"
    """Which kernels compute it: see `llm.attention`. "auto" takes the fastest that can run."""
    matmul: Library | Literal["auto"] = "auto"
    """Which library multiplies the layers' matrices in fp32 on a CPU: see `llm.matmul`. "auto" takes the faster."""
    activation_checkpointing: bool = False
    """Keep each layer's input only and compute the layer again for its gradients: a third more work, for memory that
    does not grow with what a layer holds."""
    compile: bool = False
    """Compile each layer (`llm.compiled`): about a minute at the start, for fewer passes over memory in each step."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name, size in (
            ("sequence_parallel", self.sequence_parallel),
            ("tensor_parallel", self.tensor_parallel),
        ):
            if self.ranks % size:
                raise ValueError(f"{name} {size} does not divide ranks {self.ranks}: change one of them")
        if self.tensor_parallel > 1:
            if self.zero_stage not in (1, 2):
                raise ValueError(f"tensor_parallel needs zero_stage 1 or 2, not {self.zero_stage}")
            if self.sequence_parallel > 1 or self.offload != "none":
                raise ValueError("tensor_parallel goes with neither sequence_parallel nor offload")
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(
                "offload moves what ZeRO spreads, and zero_stage is 0: set zero_stage to 1, 2 or 3"
            )
        if self.compile and (self.zero_stage == 3 or self.tensor_parallel > 1):
            raise ValueError(
                "compile needs layers whose parameters stay and that nothing is sent in: set zero_stage to 0, 1 or 2, "
                "and tensor_parallel to 1"
            )
        if self.launcher == "slurm" and self.ranks % self.slurm.nodes:
            raise ValueError(
                f"slurm.nodes {self.slurm.nodes} does not divide ranks {self.ranks}: change one of them"
            )
        return self

    @property
    def data_ranks(self) -> int:
        """Parts into which a batch is divided: a rank's, or one for each group of ranks that share windows."""
        return self.ranks // (self.sequence_parallel * self.tensor_parallel)


class Validation(Config):
    """The check on held-out text while training."""

    every: int = Field(default=250, ge=1)
    """Steps between checks; there is always one after the last step."""
    tokens: int = Field(default=65_536, ge=1)
    """At most this many held-out tokens, the same ones each time."""


class PretrainConfig(StageConfig):
    """What is trained, on how much, and how."""

    depth: int | None = Field(default=None, ge=1)
    """One dial for what follows and is not set: see `llm.presets`. Its consequences are identity, it is not."""
    model: ModelShape = ModelShape()
    init_from: Path | None = None
    """A folder with a model in a layout of `transformers` (an exported one, say) whose weights training starts from;
    None: weights are drawn from `seed`. What the folder holds is identity, where it lies is not."""
    tokens: int = Field(ge=1)
    """Tokens to train on; more than the corpus has means to read it again, in another order."""
    batch_tokens: int = Field(default=524_288, ge=2)
    """Tokens a step, over all ranks: a multiple of the context."""
    mixture: dict[str, Annotated[float, Field(gt=0)]] | None = Field(default=None, min_length=1)
    """Weight of each source (by its name in download) in what is read; those not named are left out. None: each
    text as often as any other."""
    mask_documents: bool = False
    """Let no position see another document of its window. The end of a document still has the next one's first token
    for its target."""
    lr: float = Field(default=6e-4, gt=0)
    """Peak learning rate."""
    schedule: Schedule = Schedule()
    optimizer: OptimizerConfig = OptimizerConfig()
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; longer ones are scaled down to it."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight in the training loss of log(Z)^2, Z the sum of the exponentials of the logits; 1e-4 in PaLM."""
    seed: int = Field(default=0, ge=0)
    """Of the initial weights and of the order of windows."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    validation: Validation = Validation()
    recovery: Recovery = Recovery()
    runtime: PretrainRuntime = PretrainRuntime()

    _init_sha256: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_depth(cls, values: Any) -> Any:
        return presets.fill(values) if isinstance(values, dict) else values

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), not {betas}")
        return betas

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.batch_tokens % self.model.context:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is not a multiple of model.context {self.model.context}"
            )
        ranks, micro, smallest = self.runtime.data_ranks, self.runtime.micro_batch, self.plan.smallest
        if smallest % ranks:
            raise ValueError(f"a batch of {smallest} windows does not divide among {ranks} ranks")
        if micro != "auto" and (micro < 1 or smallest // ranks % micro):
            raise ValueError(
                f"runtime.micro_batch {micro} does not divide a rank's {smallest // ranks} windows a step"
            )
        self.schedule.require_room(self.steps)
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
        """A copy with ``precision`` pinned to what this machine computes in.

        Raises:
            UserError: more ranks than this machine has places for; attention that cannot run here; nothing to compile
                with; no model in ``init_from``.
        """
        here = self.runtime.launcher == "local"
        resolved = self.for_this_machine() if here else self.require_precision()
        return resolved if self.init_from is None else resolved.with_start(self.init_from)

    def for_this_machine(self) -> Self:
        """`resolve`, for ranks that start here."""
        require_ranks(self.runtime.ranks)
        precision = hardware_precision()[0] if self.precision == "auto" else self.precision
        resolved = self.model_copy(update={"precision": precision})
        resolved.attention()
        resolved.matmul()
        if self.runtime.compile and (why_not := compiled.missing(device_kind())):
            raise UserError(
                f"pretrain.runtime.compile is true, but {why_not}:\ninstall it, or set it to false"
            )
        return resolved

    def require_precision(self) -> Self:
        """`resolve`, for ranks that start on machines which this one knows nothing of."""
        if self.precision == "auto":
            raise UserError(
                "pretrain.precision is auto, which this machine cannot tell for those of Slurm:\n"
                "set pretrain.precision to bf16 or fp32"
            )
        return self

    def with_start(self, folder: Path) -> Self:
        """A copy that knows what ``folder`` holds, to start from."""
        folder = folder.expanduser().absolute()
        now = content_sha256(folder)
        if self._init_sha256 not in (None, now):
            raise UserError(f"{folder} changed since the run was planned: run again")
        pinned = self.model_copy(update={"init_from": folder})
        pinned._init_sha256 = now
        return pinned

    def identity(self) -> dict[str, Any]:
        """As for any stage, with the hash of what ``init_from`` holds in place of where it lies, and without `depth`,
        from which nothing follows any more."""
        identity = super().identity()
        del identity["depth"]
        if identity.pop("init_from") is not None:
            assert self._init_sha256 is not None, "resolve() the config first"
            identity["init_sha256"] = self._init_sha256
        return identity

    def predict(self, metrics: Mapping[str, float], workers: int) -> list[str]:
        """What follows from `depth`."""
        return presets.describe(self)

    def attention(self) -> tuple[BackEnd, str]:
        """How attention is computed on this machine, and why.

        Raises:
            UserError: what ``runtime.attention`` asks for cannot run here.
        """
        return choose(
            self.runtime.attention,
            device=device_kind(),
            precision=self.precision,
            head_width=self.model.head_width,
            context=self.model.context,
            documents=self.mask_documents,
        )

    def matmul(self) -> tuple[Library, str]:
        """Which library multiplies matrices on this machine, and why.

        Raises:
            UserError: what ``runtime.matmul`` asks for cannot be had.
        """
        return choose_matmul(self.runtime.matmul, device=device_kind(), precision=self.precision)

    @property
    def plan(self) -> BatchPlan:
        """How many windows each step reads, over all ranks."""
        return batch_plan(self.tokens, self.batch_tokens, self.model.context, self.schedule.batch_warmup)

    @property
    def steps(self) -> int:
        """Optimizer steps: tokens / batch_tokens, rounded down, at least one; more with a batch warm-up."""
        return self.plan.steps

    @property
    def mix(self) -> Mixture | None:
        """How slots are shared among the sources of `mixture`."""
        return Mixture.of(self.mixture, self.batch_tokens // self.model.context) if self.mixture else None

    def step_slots(self, step: int) -> tuple[int, int]:
        """The first slot that ``step`` (from 0) reads a window from, and how many there are for it."""
        return self.plan.windows_before(step), self.plan.windows_at(step)

    @property
    def micro_batch(self) -> int:
        """Windows a rank works on at once: as given, or the largest divisor of its share that fits the device.

        With a batch warm-up, of its share of the smallest batch.
        """
        if self.runtime.micro_batch != "auto":
            return self.runtime.micro_batch
        most = max(
            1, MICRO_BATCH_TOKENS[device_kind()] * self.runtime.sequence_parallel // self.model.context
        )
        share = self.plan.smallest // self.runtime.data_ranks
        return max(size for size in range(1, min(most, share) + 1) if share % size == 0)

    def accumulation(self, step: int) -> int:
        """Micro-batches a rank works through in ``step``."""
        return self.plan.windows_at(step) // (self.runtime.data_ranks * self.micro_batch)

    def tokens_after(self, done: int) -> int:
        """Tokens that the first ``done`` steps read."""
        return self.plan.windows_before(done) * self.model.context


class Job(Config):
    """What a rank is told: the folders it works in, and what to train."""

    config: PretrainConfig
    model: ModelConfig
    tokenizer: Path
    out: Path

    @property
    def scratch(self) -> Path:
        """What is needed while training lasts; whoever seals the artifact drops it."""
        return self.out / "scratch"

    @property
    def checkpoints(self) -> Path:
        return self.scratch / "checkpoints"

    @property
    def events(self) -> Path:
        return self.out / "logs" / "events.jsonl"

    @property
    def corpus(self) -> Corpus:
        """The text, as it lies in `scratch`."""
        end = end_of_text(load_tokenizer(self.tokenizer))
        shape, config = self.model, self.config
        return Corpus(
            self.scratch,
            shape.vocab_size,
            shape.context,
            end,
            config.seed,
            config.mix,
            config.mask_documents,
        )

    @property
    def setup(self) -> checkpoint.Setup:
        """What a checkpoint of this job must have been made with, to be gone on from to the same bits."""
        runtime = self.config.runtime
        return checkpoint.Setup(
            ranks=runtime.ranks,
            zero_stage=runtime.zero_stage,
            micro_batch=self.config.micro_batch,
            precision=self.config.precision,
            device=device_kind(),
            attention=self.config.attention()[0],
            matmul=self.config.matmul()[0],
            sequence_parallel=runtime.sequence_parallel,
            tensor_parallel=runtime.tensor_parallel,
            offload=runtime.offload,
            compile=runtime.compile,
        )


def pretrain(config: PretrainConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Train the model on the shards of ``inputs["tokenize"]``; see the module's docstring.

    Leaves ``model.safetensors``, ``model.json``, ``losses.parquet``, ``validation.parquet``, ``sources.json`` (what was
    read of each source) and ``report.md``; and ``skipped.parquet`` where steps or batches were skipped (see
    `llm.recovery`).

    Raises:
        UserError: the corpus is smaller than one batch; more ranks than places; a checkpoint of another precision.
    """
    config = config.resolve()
    for line in presets.describe(config):
        context.note(line)
    if config.model.logit_softcap is not None:
        context.note("no layout of transformers has model.logit_softcap: export will refuse it", warning=True)
    here = config.runtime.launcher == "local"
    if here:
        config = choose_kernels(config, context)
    if not (out / "model.safetensors").exists():  # the last file that the ranks write
        job = prepare(config, inputs, out, context)
        path = job.scratch / "job.json"
        path.write_text(job.model_dump_json(indent=1), encoding="utf-8")
        if here and device_kind() == "cpu":
            context.note(remark())
        context.launch(
            "llm.trainer",
            path,
            config.runtime.ranks,
            events=job.events,
            logs=out / "logs",
            grace_seconds=config.runtime.grace_seconds,
            batch=None if here else config.runtime.slurm,
        )
    return summarise(config, out)


def choose_kernels(config: PretrainConfig, context: StageContext) -> PretrainConfig:
    """A copy with what this machine computes with pinned, and told."""
    context.note(f"precision {config.precision}: {precision_reason(config.precision)}")
    attention, reason = config.attention()
    context.note(f"attention {attention}: {reason}")
    matmul, reason = config.matmul()
    if device_kind() == "cpu":
        context.note(f"matrix products by {matmul}: {reason}")
    runtime = config.runtime.model_copy(update={"attention": attention, "matmul": matmul})
    return config.model_copy(update={"runtime": runtime})


def prepare(config: PretrainConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Job:
    """Check what can be checked before a rank starts, and lay the tokens flat."""
    train, held_out = TokenShards(inputs["tokenize"], "train"), TokenShards(inputs["tokenize"], "val")
    expected = tokenizer_sha256(inputs["train_tokenizer"])
    assert train.tokenizer_sha256 == expected, (
        f"the token shards were made with tokenizer {train.tokenizer_sha256}"
    )
    model = ModelConfig(**config.model.model_dump(), vocab_size=train.vocab_size)
    if config.init_from is not None:
        require_start(model, inputs["train_tokenizer"], config.init_from)
    job = Job(config=config, model=model, tokenizer=inputs["train_tokenizer"], out=out)
    job = as_begun(job)
    batches.require_batch(train.tokens, model.context, config.batch_tokens)
    if held_out.tokens <= model.context:
        raise UserError(
            f"the held-out split has {held_out.tokens:,} tokens, less than one window of {model.context:,}:\n"
            "lower pretrain.model.context, or raise tokenize.val_fraction"
        )
    tokens = job.corpus.lay(train, held_out)
    reading = job.corpus.reading(config.plan.windows_before(config.steps))
    with atomic_path(out / "sources.json") as path:
        path.write_text(json.dumps(reading, indent=1) + "\n", encoding="utf-8")
    for line in describe_reading(config, reading):
        context.note(line)
    if left_out := [
        f"{name} ({tokens[name]:,} tokens)" for name in sorted(tokens.keys() - (config.mixture or {}).keys())
    ]:
        context.note(f"pretrain.mixture leaves out {', '.join(left_out)}", warning=True)
    return job


def as_begun(job: Job) -> Job:
    """``job`` with an automatic micro-batch pinned to that of its newest checkpoint, where it fits: then the bits that
    follow are those of an undisturbed run.

    Raises:
        UserError: that checkpoint was made in another precision.
    """
    newest = next(iter(checkpoint.complete(job.checkpoints)), None)
    if newest is None:
        return job
    made, now = newest.setup, job.config.runtime
    alike = (made.ranks, made.sequence_parallel) == (now.ranks, now.sequence_parallel)
    if now.micro_batch == "auto" and alike:
        runtime = now.model_copy(update={"micro_batch": made.micro_batch})
        job = job.model_copy(update={"config": job.config.model_copy(update={"runtime": runtime})})
    if now.launcher == "local":  # else its ranks see for themselves: what they compute with is not known here
        checkpoint.require_same_training(newest, job.setup)
    return job
