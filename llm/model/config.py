"""The numbers of a model: what a recipe sets of it, and that with the vocabulary. They need no torch."""

from __future__ import annotations

import math
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from data_pipeline.core.config import Config

VOCAB_MULTIPLE = 64
"""Rows of the embedding are padded to a multiple of this: odd sizes fall off the fast matrix kernels."""


Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""A matrix of a block."""


class Lora(Config):
    """Low-rank adapters, which are trained in place of the model: see `llm.model.lora`."""

    rank: int = Field(default=8, ge=1)
    """Rows of the smaller one of an adapter's two matrices."""
    alpha: float = Field(default=16.0, gt=0)
    """An adapter adds alpha / rank times its product."""
    targets: tuple[Target, ...] = Field(default=get_args(Target), min_length=1)
    """Matrices of each block that have an adapter; those that a model has not don't count."""

    @property
    def scale(self) -> float:
        """The factor of what an adapter adds."""
        return self.alpha / self.rank


class ModelShape(Config):
    """Shape of the model, as a recipe gives it. The vocabulary comes from the tokenizer."""

    positions: Literal["rotary", "learned"] = "rotary"
    """"rotary": RMSNorm, SwiGLU and no biases; "learned": GPT-2's LayerNorm, GELU and biases."""
    layers: int = Field(default=12, ge=1)
    """Number of blocks."""
    heads: int = Field(default=12, ge=1)
    """Query heads of attention."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Heads of keys and values; None: as many as `heads` (no grouping)."""
    head_dim: int | None = Field(default=None, ge=1)
    """Width of a head; None: `width` / `heads`."""
    width: int = Field(default=768, ge=2)
    """Width of the residual stream."""
    hidden: int | None = Field(default=None, ge=1)
    """Width inside the MLP; None: 4 times `width` for GPT-2's, for SwiGLU 8/3, rounded up to a multiple of 64."""
    context: int = Field(default=1024, ge=2)
    """Positions the model sees at once, in tokens."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the frequencies of rotary positions."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square (or variance) in a norm."""
    qk_norm: bool = False
    """Whether each head's queries and keys are normed, as in Qwen3."""
    tie_embeddings: bool = False
    """Whether embedding and head share one matrix."""
    logit_softcap: float | None = Field(default=None, gt=0)
    """Logits s become logit_softcap * tanh(s / logit_softcap); no layout of `transformers` that we export has it."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights; projections into the residual stream get it / sqrt(2 layers)."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"width {self.width} does not divide into {self.heads} heads: change width or heads"
            )
        if self.heads % self.kv_head_count:
            raise ValueError(
                f"kv_heads {self.kv_heads} does not divide heads {self.heads}: change one of them"
            )
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(
                f"width / heads is {self.head_width}; rotary positions need an even number: change width or heads"
            )
        if self.positions == "learned" and (
            self.qk_norm or self.kv_head_count != self.heads or self.head_dim
        ):
            raise ValueError(
                "GPT-2's blocks (positions: learned) have no qk_norm, grouped kv_heads or head_dim: drop them"
            )
        return self

    @property
    def kv_head_count(self) -> int:
        """`kv_heads`, or `heads` when not given."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """`head_dim`, or width / heads."""
        return self.head_dim or self.width // self.heads

    @property
    def hidden_width(self) -> int:
        """`hidden`, or 4 `width` (GPT-2), or 8/3 of it rounded up to a multiple of 64: about as many parameters."""
        if self.hidden:
            return self.hidden
        if self.positions == "learned":
            return 4 * self.width
        return math.ceil(8 * self.width / 3 / 64) * 64

    @property
    def block_parameters(self) -> int:
        """Numbers in the blocks' matrices: nearly all parameters outside embeddings and head."""
        q_width, kv_width = self.heads * self.head_width, self.kv_head_count * self.head_width
        of_mlp = 2 if self.positions == "learned" else 3
        block = 2 * self.width * (q_width + kv_width) + of_mlp * self.width * self.hidden_width
        return self.layers * block


class ModelConfig(ModelShape):
    """A model's shape with its vocabulary: all that is needed to build it."""

    vocab_size: int = Field(ge=2)
    """Tokens that exist. The matrices have `padded_vocab` rows."""
    labels: int | None = Field(default=None, ge=1)
    """Labels that the head gives a text in place of the next token's logits; None: it gives these."""

    @property
    def head_rows(self) -> int:
        """Rows of the head's matrix."""
        return self.labels or self.padded_vocab

    @property
    def padded_vocab(self) -> int:
        """`vocab_size` rounded up to a multiple of 64."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def flops_per_token(self, context: int | None = None) -> float:
        """Floating-point operations to train on one token: 6 a matrix parameter, and attention.

        Attention over a causal context of T costs 6 T H E a layer (Chowdhery et al. 2022, arXiv:2204.02311,
        appendix B, halved for causality).
        """
        matrices = self.block_parameters + self.width * self.head_rows
        attention = self.layers * self.heads * self.head_width
        return 6 * matrices + 6 * attention * (context or self.context)
