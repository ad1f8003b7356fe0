"""Settings that every training has: how parameters move (`OptimizerConfig`), and how it is executed
(`TrainingRuntime`)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from data_pipeline.core.config import Config
from data_pipeline.stage import Runtime, StageConfig
from llm.kernels.names import BackEnd, Library
from llm.machine.slurm import SlurmJob
from llm.score.config import ValidateOn
from llm.training.recovery import Recovery
from llm.training.resolved import OptimizerSettings
from llm.training.schedule import Schedule

LARGEST_SEED = 2**63 - 1
"""Torch's generators take twice as large ones; what is counted on from a seed must fit, too."""


class OptimizerConfig(Config):
    """How parameters move. What AdamW needs (lr, betas, eps) and the weight decay stand in `PretrainConfig`."""

    kind: Literal["adamw", "muon"] = "muon"
    """Optimizer of hidden matrices; all else is AdamW's. docs/log.md has what Muon saves."""
    muon_lr: float | None = Field(default=None, gt=0)
    """Peak rate of Muon's matrices; None: pretrain.lr, for its steps are scaled to the size of AdamW's."""
    embedding_lr: float | None = Field(default=None, gt=0)
    """Peak rate of embeddings; None: pretrain.lr."""
    head_lr: float | None = Field(default=None, gt=0)
    """Peak rate of an untied head; None: pretrain.lr."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Momentum of Muon, Nesterov's."""
    cautious_decay: bool = False
    """Let Muon's matrices decay only where the step goes towards zero anyway (Chen et al. 2025, arXiv:2510.12402)."""


class Validation(Config):
    """The check on held-out text while training."""

    every: int = Field(default=250, ge=1)
    """Steps between checks; there is always one after the last step."""
    tokens: int = Field(default=65_536, ge=1)
    """At most this many held-out tokens, the same ones each time."""


def require_text(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """Return prompts that a tokenizer can read.

    Raises:
        ValueError: one holds half of a surrogate pair.
    """
    for prompt in prompts:
        if not prompt.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ValueError(f"prompt {prompt!r} holds half of a surrogate pair, which is no text")
    return prompts


Prompts = Annotated[tuple[str, ...], AfterValidator(require_text)]


class Samples(Config):
    """Texts that the model writes while training, by which one sees what it learns."""

    every: int | None = Field(default=None, ge=0)
    """Steps between them, with some after the last one; None: as `validation.every`, or the multiple of it by which
    there are about twenty; 0: none."""
    prompts: Prompts = Field(default=("", "The "), min_length=1)
    """Beginnings, each of which is continued; "" lets the model begin."""
    tokens: int = Field(default=24, ge=1)
    """Length of a sample, at most."""
    temperature: float = Field(default=0.8, ge=0)
    """0 takes the likeliest token."""


class TrainingRuntime(Runtime):
    """How training is executed."""

    launcher: Literal["local", "slurm"] = "local"
    """Who starts the ranks: this machine (and those that `llm.machine.nodes` knows of), or a job that is submitted to
    Slurm."""
    slurm: SlurmJob = SlurmJob()
    ranks: int = Field(default=1, ge=1)
    """Processes that share each batch: one a GPU, or a few on a CPU."""
    zero_stage: int = Field(default=0, ge=0, le=3)
    """Stage of ZeRO; DeepSpeed spreads over the ranks: 1 optimizer state, 2 also gradients, 3 also parameters."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Ranks that share each sequence, a slice of its positions each, and exchange heads for positions around attention
    (Ulysses: Jacobs et al. 2023, arXiv:2309.14509): for contexts whose activations one GPU does not hold."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks that work on the same sequences, each with a shard of every layer's matrices
    (`llm.training.tensor_parallel`): for models of which one GPU does not hold a layer's work, on GPUs with a fast
    link."""
    offload: Literal["none", "cpu"] = "none"
    """Where ZeRO keeps the optimizer's state, and at stage 3 the parameters, while they are not worked on: with the
    device, or in the machine's memory (Ren et al. 2021, arXiv:2101.06840)."""
    micro_batch: int | Literal["auto"] = "auto"
    """Sequences a rank works on at once; the rest of its slice of the batch is accumulated."""
    log_every: int = Field(default=1, ge=1)
    """Steps between step events. The losses of all steps are kept in any case."""
    norms_every: int = Field(default=100, ge=0)
    """Steps between measurements of gradient and update norms by layer, with one in the last step; 0: none."""
    validation: Validation = Validation()
    samples: Samples = Samples()
    validate_on: ValidateOn = ValidateOn()
    max_nonfinite: int = Field(default=5, ge=0)
    """Steps in a row that may be skipped because loss or gradient was not finite; one more ends the run."""
    max_rollbacks: int = Field(default=3, ge=1)
    """Times that a run goes back because of a spike (`recovery.spike_z`); one more spike ends it."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest that are kept."""
    keep_every: int | None = Field(default=None, ge=1)
    """Also keep the checkpoints of each so many steps, while training lasts."""
    collective_timeout_seconds: float = Field(default=600, gt=0)
    """How long a rank waits for the others before the run ends: longer than anything that one of them does alone."""
    grace_seconds: float = Field(default=30, gt=0)
    """Seconds in which ranks that are asked to stop end their step and save it, before they are killed: as long as a
    step and the writing of a checkpoint take. Slurm's KillWait and Kubernetes' grace period must be longer."""
    attention: BackEnd | Literal["auto"] = "auto"
    """Which kernels compute it: see `llm.kernels.attention`. "auto" takes the fastest that can run."""
    matmul: Library | Literal["auto"] = "auto"
    """Which library multiplies the layers' matrices in fp32 on a CPU: see `llm.kernels.matmul`. "auto" takes the
    faster."""
    activation_checkpointing: bool = False
    """Keep each layer's input only and compute the layer again for its gradients: a third more work, for memory that
    does not grow with what a layer holds."""
    compile: bool = False
    """Compile each layer (`llm.training.compiled`): about a minute at the start, for fewer passes over memory in each
    step."""

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
    def data_parallel_size(self) -> int:
        """Return the number of slices of a batch: one a rank, or one for each group of ranks that share sequences."""
        return self.ranks // (self.sequence_parallel * self.tensor_parallel)


class TrainingConfig(StageConfig):
    """Settings that every training has: how parameters move, and how it is executed."""

    lr: float = Field(default=6e-4, gt=0)
    """Peak learning rate."""
    schedule: Schedule = Schedule()
    optimizer: OptimizerConfig = OptimizerConfig()
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""
    eps: float = Field(default=1e-8, gt=0)
    """In the denominator of AdamW's step."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled; of hidden matrices and the head."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; longer ones are scaled down to it."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight in the training loss of log(Z)^2, Z the sum of the exponentials of the logits; 1e-4 in PaLM."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of the initial weights and of the order of sequences."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products; "auto": bf16 where the machine is fast in it, else fp32."""
    recovery: Recovery = Recovery()
    runtime: TrainingRuntime = TrainingRuntime()

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), not {betas}")
        return betas

    @property
    def optimizer_settings(self) -> OptimizerSettings:
        """Settings of how parameters move, from here and from `optimizer`."""
        return OptimizerSettings(
            **self.optimizer.model_dump(),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            grad_clip=self.grad_clip,
        )
