"""Settings that a training computes with, worked out once: the device, the precision, kernels and the micro-batch
follow from what a recipe asks for and from the machine of the ranks. Nothing else asks the machine: whoever needs to
know reads `Resolved`, which stands in ``job.json``. Torch is imported where kernels are to be chosen; a plan needs it
only where a setting names some.
"""

from __future__ import annotations

from typing import Literal

from data_pipeline.core.config import Config
from data_pipeline.core.errors import UserError
from llm.kernels.names import BackEnd, Library
from llm.machine.hardware import device_kind, hardware_precision
from llm.training.schedule import BatchPlan

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16"]
MICRO_BATCH_TOKENS: dict[Device, int] = {"cpu": 4096, "cuda": 32768}
"""Most tokens a rank works on at once when the micro-batch is "auto": what fits caches, or fills a GPU."""


class OptimizerSettings(Config):
    """How parameters move."""

    kind: Literal["adamw", "muon"]
    """Optimizer of hidden matrices; all else is AdamW's."""
    lr: float
    """Peak rate where no other is given."""
    muon_lr: float | None
    embedding_lr: float | None
    head_lr: float | None
    """Peak rates of Muon's matrices, of embeddings, of an untied head; None: `lr`."""
    betas: tuple[float, float]
    eps: float
    """Decay of AdamW's moments, and what is added to the denominator."""
    momentum: float
    """Momentum of Muon, Nesterov's."""
    weight_decay: float
    """Decoupled; of hidden matrices and the head."""
    cautious_decay: bool
    """Whether Muon's matrices decay only where the step goes towards zero anyway."""
    grad_clip: float
    """Largest norm of the gradient."""

    def peak_lr(self, kind: str) -> float:
        """Peak rate of a kind of parameter (`llm.training.optimizer.KINDS`)."""
        peaks = {
            "matrices": self.muon_lr if self.kind == "muon" else None,
            "embeddings": self.embedding_lr,
            "head": self.head_lr,
        }
        return peaks.get(kind) or self.lr


class Given(Config):
    """Settings that follow from the recipe alone."""

    ranks: int
    zero_stage: int
    sequence_parallel: int
    tensor_parallel: int
    offload: Literal["none", "cpu"]
    compile: bool
    activation_checkpointing: bool
    batches: BatchPlan
    """Sequences that each step reads, over all ranks."""
    context: int
    """Tokens a sequence."""
    head_width: int
    documents: bool
    """Whether attention stays within documents."""
    optimizer: OptimizerSettings

    @property
    def data_parallel_size(self) -> int:
        """Return the number of slices of a batch: one a rank, or one for each group of ranks that share sequences."""
        return self.ranks // (self.sequence_parallel * self.tensor_parallel)


class Wanted(Given):
    """Settings that a recipe asks for."""

    precision: Precision | Literal["auto"]
    attention: BackEnd | Literal["auto"]
    matmul: Library | Literal["auto"]
    micro_batch: int | Literal["auto"]

    def pin_precision(self) -> Precision:
        """Return the precision, "auto" being what this machine is fast in."""
        return pin_precision(self.precision)

    def require(self) -> None:
        """Refuse what cannot run on this machine, of what is named.

        Raises:
            UserError: kernels that cannot run here; nothing to compile with.
        """
        if self.attention != "auto":  # which always finds one that can run
            self.choose_attention()
        if self.matmul != "auto":
            self.choose_matmul()
        if self.compile:
            from llm.training.compiled import missing

            if why_not := missing(device_kind()):
                raise UserError(
                    f"pretrain.runtime.compile is true, but {why_not}:\ninstall it, or set it to false"
                )

    def choose_attention(self) -> tuple[BackEnd, str]:
        """Choose how attention is computed on this machine, and why."""
        from llm.kernels.attention import choose

        return choose(
            self.attention,
            device=device_kind(),
            precision=self.pin_precision(),
            head_width=self.head_width,
            context=self.context,
            documents=self.documents,
        )

    def choose_matmul(self) -> tuple[Library, str]:
        """Choose which library multiplies matrices on this machine, and why."""
        from llm.kernels.matmul import choose_matmul

        return choose_matmul(self.matmul, device=device_kind(), precision=self.pin_precision())

    def choose_micro_batch(self, device: Device) -> int:
        """Return the sequences a rank works on at once: as given, or the largest divisor of its slice of a batch that
        fits the device; with a batch warm-up, of the smallest batch.
        """
        if self.micro_batch != "auto":
            return self.micro_batch
        most = max(1, MICRO_BATCH_TOKENS[device] * self.sequence_parallel // self.context)
        count = self.batches.smallest // self.data_parallel_size
        return max(size for size in range(1, min(most, count) + 1) if count % size == 0)

    def resolve(self) -> Resolved:
        """Work out what it comes to on this machine.

        Raises:
            UserError: something that is asked for cannot run here.
        """
        self.require()
        device, precision = device_kind(), self.pin_precision()
        fastest, why = hardware_precision()
        reason = why if fastest == precision else f"asked for ({fastest} would be faster here: {why})"
        attention, attention_reason = self.choose_attention()
        matmul, matmul_reason = self.choose_matmul()
        return Resolved(
            **{name: getattr(self, name) for name in Given.model_fields},
            device=device,
            precision=precision,
            precision_reason=reason,
            attention=attention,
            attention_reason=attention_reason,
            matmul=matmul,
            matmul_reason=matmul_reason,
            micro_batch=self.choose_micro_batch(device),
        )


def pin_precision(asked: Precision | Literal["auto"]) -> Precision:
    """Return the precision that was asked for, "auto" being what this machine is fast in."""
    return hardware_precision()[0] if asked == "auto" else asked


class Resolved(Given):
    """Settings that the ranks compute with."""

    device: Device
    precision: Precision
    precision_reason: str
    attention: BackEnd
    attention_reason: str
    matmul: Library
    matmul_reason: str
    micro_batch: int
    """Sequences a rank works on at once."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.batches.steps

    def accumulation(self, step: int) -> int:
        """Count the micro-batches a rank works through in ``step``."""
        return self.batches.sequences_at(step) // (self.data_parallel_size * self.micro_batch)
