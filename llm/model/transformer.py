"""The decoder-only transformer, readable top to bottom: embed, then per layer attention and an MLP, each behind a
norm and added to the residual stream, then a norm and the head. With rotary positions the layout, the names and the
arithmetic are Llama's (Touvron et al. 2023, arXiv:2302.13971) with grouped-query attention, and `qk_norm` adds
Qwen3's norm on each head's queries and keys; with learned positions the blocks are GPT-2's (Radford et al. 2019).
Shape suffixes: B batch, T positions, D width, F hidden width, H query heads, K key-value heads, E width of a head,
V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from llm.kernels.attention import Attend, Documents, attention
from llm.kernels.cpu_norm import Rotate, ScaleByRMS
from llm.kernels.loss import Reduction, linear_cross_entropy
from llm.kernels.matmul import Linear
from llm.kernels.names import BackEnd, Library
from llm.model.config import ModelConfig

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the positions' rotations."""


class Transformer(nn.Module):
    """Token ids to logits, or to the loss.

    Parameters carry the names of `transformers`' Llama less the prefix ``model.``; `llm.model.layouts` knows those of
    GPT-2.
    """

    cos_TE: Tensor
    sin_TE: Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 0,
        z_loss: float = 0.0,
        back_end: BackEnd = "sdpa",
        matmul: Library = "torch",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.attend = attention(back_end)
        self.checkpointing = checkpointing
        """Keep of each layer's activations its input only, and compute the others again in the backward pass."""
        self.first_position = 0
        """Position of the first token given, where ranks share sequences by positions."""
        self.embed_tokens = nn.Embedding(config.padded_vocab, config.width)
        self.embed_positions: nn.Embedding | None = None
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.context, config.width)
        else:
            cos_TE, sin_TE = rotary_tables(config)
            self.register_buffer("cos_TE", cos_TE, persistent=False)
            self.register_buffer("sin_TE", sin_TE, persistent=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = norm(config)
        self.lm_head = Head(config, z_loss)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        for module in self.modules():
            if isinstance(module, Linear):
                module.matmul = matmul
        self.initialise(seed)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        reduction: Reduction = "mean",
        documents_BT: Tensor | None = None,
        *,
        positions_BT: Tensor | None = None,
        counted_BT: Tensor | None = None,
    ) -> Tensor:
        """Return logits ``(B, T, V)`` in fp32; of a model that gives labels, those of the labels. With targets return
        the cross entropy in nats, for which no logits are kept.

        ``reduction`` is "mean" (a scalar over all targets) or "none" (``(B, T)``). ``documents_BT`` numbers the
        document of each position in its sequence; with it no position sees another document. ``positions_BT`` are
        those of the tokens, if not as they lie. Of the targets only those of ``counted_BT`` count: the mean is over
        these, the loss of the others 0. Logits of ids that only pad the matrices are -inf: they have no probability,
        in training or sampling. The z-loss is part of the loss in training mode only.
        """
        documents = None if documents_BT is None else Documents(documents_BT)
        first, count = self.first_position, tokens_BT.shape[1]
        positions = positions_BT
        if positions is None:
            positions = torch.arange(first, first + count, device=tokens_BT.device)
        x_BTD, rope = self.embed(tokens_BT, positions)
        forget = self.checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            inputs = (x_BTD, rope, self.attend, documents)
            x_BTD = checkpoint(layer, *inputs, use_reentrant=False) if forget else layer(*inputs)
        if counted_BT is None:
            return self.lm_head(self.norm(x_BTD), targets_BT, reduction)
        assert targets_BT is not None
        losses = self.lm_head(self.norm(x_BTD[counted_BT]), targets_BT[counted_BT], reduction)
        if reduction == "mean":
            return losses
        return losses.new_zeros(targets_BT.shape).masked_scatter(counted_BT, losses)

    def embed(self, tokens_BT: Tensor, positions: Tensor) -> tuple[Tensor, Rope | None]:
        """Return what enters the layers, ``(B, T, D)``, and how far they turn their heads.

        ``positions`` are ``(T,)`` or ``(B, T)``.
        """
        x_BTD = self.embed_tokens(tokens_BT)
        if self.embed_positions is not None:
            return x_BTD + self.embed_positions(positions), None
        return x_BTD, (self.cos_TE[positions], self.sin_TE[positions])

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw the weights: normal, smaller where a projection adds to the residual stream (GPT-2); biases are 0."""
        generator = torch.Generator().manual_seed(seed)
        residual_std = self.config.init_std / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = residual_std if into_residual else self.config.init_std
                parameter.normal_(0.0, std, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()

    def parameter_count(self) -> int:
        """Count the parameters that can matter: rows which only pad the vocabulary are not counted."""
        matrices = 1 if self.config.tie_embeddings or self.config.labels else 2
        padding = (self.config.padded_vocab - self.config.vocab_size) * self.config.width * matrices
        return sum(parameter.numel() for parameter in self.parameters()) - padding


class Block(nn.Module):
    """Attention, then an MLP, each on a normed copy of the stream and added back to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = norm(config)
        self.mlp = GeluMLP(config) if config.positions == "learned" else SwiGLU(config)

    def forward(
        self, x_BTD: Tensor, rope: Rope | None, attend: Attend, documents: Documents | None
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, attend, documents)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)  # one fused kernel there
        assert self.eps is not None
        result: Tensor = ScaleByRMS.apply(x, self.weight, self.eps)
        return result


def norm(config: ModelConfig) -> nn.Module:
    """Return the norm before a block's halves and before the head."""
    if config.positions == "learned":
        return nn.LayerNorm(config.width, config.norm_eps)
    return RMSNorm(config.width, config.norm_eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads; with rotary positions where ``rope`` is given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_head_count, config.head_width
        biased = config.positions == "learned"
        self.q_proj = Linear(config.width, config.heads * config.head_width, bias=biased)
        self.k_proj = Linear(config.width, self.kv_heads * config.head_width, bias=biased)
        self.v_proj = Linear(config.width, self.kv_heads * config.head_width, bias=biased)
        self.o_proj = Linear(config.heads * config.head_width, config.width, bias=biased)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_width, config.norm_eps)
            self.k_norm = RMSNorm(config.head_width, config.norm_eps)

    def forward(
        self, x_BTD: Tensor, rope: Rope | None, attend: Attend, documents: Documents | None
    ) -> Tensor:
        q_BTHE = self.q_proj(x_BTD).unflatten(-1, (self.heads, self.head_width))
        k_BTKE = self.k_proj(x_BTD).unflatten(-1, (self.kv_heads, self.head_width))
        v_BTKE = self.v_proj(x_BTD).unflatten(-1, (self.kv_heads, self.head_width))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHE, k_BTKE = self.q_norm(q_BTHE.float()), self.k_norm(k_BTKE.float())
        if rope is not None:
            q_BTHE, k_BTKE = rotate(q_BTHE, *rope).type_as(v_BTKE), rotate(k_BTKE, *rope).type_as(v_BTKE)
        return self.o_proj(attend(q_BTHE, k_BTKE, v_BTKE, documents).flatten(-2))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x): Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.width, config.hidden_width, bias=False)
        self.up_proj = Linear(config.width, config.hidden_width, bias=False)
        self.down_proj = Linear(config.hidden_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class GeluMLP(nn.Module):
    """down(gelu(up x)), as GPT-2: GELU by its tanh formula (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = Linear(config.width, config.hidden_width)
        self.down_proj = Linear(config.hidden_width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_BTD), approximate="tanh"))


class Head(Linear):
    """Stream to logits, or straight to the loss."""

    def __init__(self, config: ModelConfig, z_loss: float) -> None:
        super().__init__(config.width, config.head_rows, bias=False)
        self.vocab_size = config.labels or config.vocab_size
        self.softcap, self.z_loss = config.logit_softcap, z_loss

    def forward(
        self, x_BTD: Tensor, targets_BT: Tensor | None = None, reduction: Reduction = "mean"
    ) -> Tensor:
        if targets_BT is not None:
            return linear_cross_entropy(
                x_BTD,
                self.weight,
                targets_BT,
                vocab_size=self.vocab_size,
                reduction=reduction,
                z_loss=self.z_loss if self.training else 0.0,
                softcap=self.softcap,
                matmul=self.matmul,
            )
        logits_BTV = F.linear(x_BTD, self.weight).float()
        if self.softcap is not None:
            logits_BTV = self.softcap * torch.tanh(logits_BTV / self.softcap)
        logits_BTV[..., self.vocab_size :] = -math.inf
        return logits_BTV


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``(T, E)`` of the rotation of each position: Su et al. 2021, arXiv:2104.09864.

    Feature i of a head turns together with i + E/2, at rate theta^(-2i/E) a position.
    """
    even_E = torch.arange(0, config.head_width, 2, dtype=torch.float32)
    rate_E = 1.0 / config.rope_theta ** (even_E / config.head_width)
    angle_TE = torch.outer(torch.arange(config.context, dtype=torch.float32), rate_E)
    angle_TE = torch.cat((angle_TE, angle_TE), dim=-1)
    return angle_TE.cos(), angle_TE.sin()


def rotate(x_BTHE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Turn each head's features by its position's angles, ``(T, E)`` or ``(B, T, E)``, in fp32."""
    result: Tensor = Rotate.apply(x_BTHE, cos_TE, sin_TE)
    return result


def save_model(model_config: ModelConfig, weights: dict[str, Tensor], folder: Path) -> None:
    """Write ``model.json`` and, last, ``model.safetensors`` into ``folder``, each atomically."""
    from safetensors.torch import save_file

    with atomic_path(folder / "model.json") as path:
        only_some = None if model_config.labels else {"labels"}
        path.write_text(model_config.model_dump_json(indent=2, exclude=only_some) + "\n", encoding="utf-8")
    with atomic_path(folder / "model.safetensors") as path:
        save_file(weights, path)
        path.chmod(0o644)  # safetensors makes it readable by its owner only


def load_model(folder: Path, *, labels: bool = False) -> Transformer:
    """Return the trained model in an artifact, fp32, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: ``folder`` holds no ``model.json`` and ``model.safetensors``.
        UserError: it holds a model of an architecture that only `transformers` computes, or one that gives texts
            labels where none with ``labels`` is asked for.
    """
    from safetensors.torch import load_file

    if not (folder / "model.json").exists() and (folder / "config.json").exists():
        raise UserError(f"{folder} holds a model that only transformers computes: it can be scored, no more")
    config = ModelConfig.model_validate_json((folder / "model.json").read_text(encoding="utf-8"))
    if config.labels and not labels:
        raise UserError(f"{folder} holds a model that gives texts labels: it continues none")
    return model_of(config, load_file(folder / "model.safetensors"))


def model_of(config: ModelConfig, weights: dict[str, Tensor]) -> Transformer:
    """Return a model with a copy of ``weights``, without that of a tied head; fp32, in evaluation mode, on the CPU."""
    model = Transformer(config)
    if config.tie_embeddings:
        weights = {**weights, "lm_head.weight": weights["embed_tokens.weight"]}
    model.load_state_dict(weights)
    return model.eval()
