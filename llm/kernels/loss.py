"""Cross entropy of a linear head, a chunk of positions at a time, so that the logits of a whole batch never exist:
they would be the largest tensor of all, and on a CPU the time goes into fetching them from memory. A chunk's
gradients are computed with its logits still at hand, so nothing is computed twice (as Liger's fused kernel does:
Hsu et al. 2024, arXiv:2410.10989). Shape suffixes: N positions, C positions of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llm.kernels.matmul import onednn, outer
from llm.kernels.names import Library

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Bytes of a chunk's logits in fp32: large enough that reading the weights once more for each chunk costs little."""

SPARE_COLUMNS = 16
"""More than the logits need: rows whose length in bytes is a power of two would share a few sets of the cache."""

Reduction = Literal["mean", "none"]


def linear_cross_entropy(
    x_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    *,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    matmul: Library = "torch",
) -> Tensor:
    """Return the loss (nats) of each target ``(B, T)``, or its mean, under softmax(x weight') over the first
    ``vocab_size`` rows.

    ``z_loss`` adds that multiple of log(Z)^2, Z the sum of the exponentials (Chowdhery et al. 2022, arXiv:2204.02311,
    section 5). ``softcap`` turns logits s into softcap * tanh(s / softcap) (Gemma 2, arXiv:2408.00118). Under
    autocast matrix products run in its type; all else, and the sums over chunks, is fp32. Rows from ``vocab_size``
    on get no gradient. A target that is no row is a RuntimeError; one in the padding costs inf.
    """
    device = x_BTD.device.type
    head = LinearHead(
        vocab_size=vocab_size or len(weight_VD),
        z_loss=z_loss,
        softcap=softcap,
        dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype,
        matmul=matmul,
    )
    x_ND, targets_N = x_BTD.flatten(0, -2), targets_BT.flatten()
    if reduction == "mean":
        return MeanLoss.apply(x_ND, weight_VD, targets_N, head, torch.is_grad_enabled())
    return TokenLosses.apply(x_ND, weight_VD, targets_N, head).view_as(targets_BT)


@dataclass(frozen=True)
class LinearHead:
    """How logits come from the stream, and the loss from them."""

    vocab_size: int
    z_loss: float
    softcap: float | None
    dtype: torch.dtype
    """Type of matrix products."""
    matmul: Library


class MeanLoss(torch.autograd.Function):
    """The mean. Its gradients are ready when it is: what comes from behind can only scale them."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, head: LinearHead, with_grad: bool
    ) -> Tensor:
        wanted = (with_grad and ctx.needs_input_grad[0], with_grad and ctx.needs_input_grad[1])
        nats_N, *ctx.gradients = sweep(x_ND, weight_VD, targets_N, head, 1 / len(targets_N), wanted)
        return nats_N.mean()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the mean loss was differentiated twice: it keeps its gradients for one time only"
            )
        # Handed over rather than kept with save_for_backward, so that autograd takes them as they are, uncopied.
        gradients, ctx.gradients = ctx.gradients, None
        return (
            *(None if gradient is None else gradient.mul_(scale) for gradient in gradients),
            None,
            None,
            None,
        )


class TokenLosses(torch.autograd.Function):
    """The loss of each position (nats). The incoming gradient is known in the backward pass, which computes again."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, head: LinearHead) -> Tensor:
        ctx.save_for_backward(x_ND, weight_VD, targets_N)
        ctx.head = head
        return sweep(x_ND, weight_VD, targets_N, head, 0.0, (False, False))[0]

    @staticmethod
    def backward(ctx: Any, scale_N: Tensor) -> tuple[Tensor | None, ...]:
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        x_ND, weight_VD, targets_N = ctx.saved_tensors
        _, x_grad_ND, weight_grad_VD = sweep(x_ND, weight_VD, targets_N, ctx.head, scale_N, wanted)
        return x_grad_ND, weight_grad_VD, None, None


def sweep(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    head: LinearHead,
    scale: float | Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss of each position, and the gradients of sum(scale * loss) in x and weight, where wanted."""
    exact = torch.float64 if weight_VD.dtype == torch.float64 else torch.float32
    nats_N = torch.empty(len(x_ND), dtype=exact, device=x_ND.device)
    x_grad_ND = torch.empty_like(x_ND, dtype=exact) if wanted[0] else None
    weight_grad_VD: Tensor | None = None
    x_ND, matrix_VD = x_ND.to(head.dtype), weight_VD.to(head.dtype)
    columns_VD = matrix_VD.t().contiguous().t() if head.matmul == "onednn" and wanted[0] else matrix_VD
    for rows in chunks(x_ND, len(weight_VD)):
        x_CD, targets_C = x_ND[rows], targets_N[rows]
        logits_CV, padded_CV = make_logits(x_CD, matrix_VD, head, exact)
        slope_CV = cap(logits_CV, head)
        log_z_C, nats_N[rows] = normalise(padded_CV, targets_C)
        if head.z_loss:
            nats_N[rows] += head.z_loss * log_z_C.square()
        if not any(wanted):
            continue
        alpha = to_gradient(
            logits_CV, targets_C, log_z_C, head.z_loss, scale[rows] if isinstance(scale, Tensor) else scale
        )
        if slope_CV is not None:
            logits_CV *= slope_CV
        grad_CV = logits_CV.to(head.dtype)
        if x_grad_ND is not None:
            x_grad_ND[rows] = add_product(None, grad_CV, columns_VD, alpha, head, exact)
        if wanted[1]:
            weight_grad_VD = add_product(weight_grad_VD, grad_CV.t(), x_CD, alpha, head, exact)
    return nats_N, x_grad_ND, weight_grad_VD


def chunks(x_ND: Tensor, vocab: int) -> list[slice]:
    """Return the positions in slices of as many as `CHUNK_BYTES` has room for, equal but for the last."""
    most = CHUNK_BYTES["cpu" if x_ND.device.type == "cpu" else "cuda"] // (4 * vocab)
    count = math.ceil(len(x_ND) / max(1, most))
    size = max(1, math.ceil(len(x_ND) / max(1, count)))
    return [slice(start, min(start + size, len(x_ND))) for start in range(0, len(x_ND), size)]


def make_logits(
    x_CD: Tensor, matrix_VD: Tensor, head: LinearHead, exact: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a chunk's logits, and what holds them with columns that have no probability."""
    if head.matmul == "onednn":
        logits_CV = onednn(x_CD, matrix_VD)
        return logits_CV, logits_CV
    padded_CV = scratch(len(x_CD), len(matrix_VD) + SPARE_COLUMNS, exact, x_CD.device)
    padded_CV[:, len(matrix_VD) :] = -math.inf
    logits_CV = padded_CV[:, : len(matrix_VD)]
    add_to(logits_CV, x_CD, matrix_VD.t(), 1.0, beta=0.0)
    return logits_CV, padded_CV


def cap(logits_CV: Tensor, head: LinearHead) -> Tensor | None:
    """Apply the soft-cap, and take what pads the vocabulary away; the cap's derivative, where there is one."""
    slope_CV = None
    if head.softcap is not None:
        logits_CV.div_(head.softcap).tanh_()
        slope_CV = 1 - logits_CV.square()
        logits_CV.mul_(head.softcap)
    logits_CV[:, head.vocab_size :] = -math.inf
    return slope_CV


def normalise(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits into probabilities in place; return log(Z) and the loss of each target.

    The largest probability is exp(largest logit) / Z, which gives Z without another pass of exponentials.
    """
    largest_C = logits_CV.amax(dim=1)
    target_C = logits_CV.gather(1, targets_C[:, None])[:, 0]
    torch.softmax(logits_CV, dim=1, out=logits_CV)
    log_z_C = largest_C - logits_CV.amax(dim=1).log_()
    return log_z_C, log_z_C - target_C


def to_gradient(
    p_CV: Tensor, targets_C: Tensor, log_z_C: Tensor, z_loss: float, scale: float | Tensor
) -> float:
    """Turn probabilities in place into the gradient of sum(scale * loss) in the logits, but for the factor returned.

    d loss / d s = p (1 + 2 z_loss log Z) - onehot(target).
    """
    uniform = not z_loss and not isinstance(scale, Tensor)
    if not uniform:
        p_CV *= (scale * (1 + 2 * z_loss * log_z_C))[:, None]
    onehot = 1.0 if uniform else scale[:, None] if isinstance(scale, Tensor) else scale
    p_CV.scatter_(1, targets_C[:, None], p_CV.gather(1, targets_C[:, None]) - onehot)
    return float(scale) if uniform else 1.0


def add_product(
    out: Tensor | None, a: Tensor, b: Tensor, alpha: float, head: LinearHead, exact: torch.dtype
) -> Tensor:
    """Return out + alpha a b, in the memory of ``out`` where there is one, summed in ``exact``."""
    if head.matmul == "onednn":
        made = outer(a.t(), b) if a.stride(0) == 1 else onednn(a, b.t())
        return made.mul_(alpha) if out is None else out.add_(made, alpha=alpha)
    if out is None:
        return add_to(torch.empty(len(a), b.shape[1], dtype=exact, device=a.device), a, b, alpha, beta=0.0)
    return add_to(out, a, b, alpha, beta=1.0)


def add_to(out: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> Tensor:
    """out = alpha a b + beta out, beta being 0 or 1 (on a CPU, products of bf16 are rounded before they are summed)."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    if out.is_cuda:
        return torch.addmm(out, a, b, beta=beta, alpha=alpha, out_dtype=out.dtype, out=out)
    return out.add_(a @ b, alpha=alpha) if beta else torch.mul(a @ b, alpha, out=out)


kept = threading.local()


def scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory of that shape: on a CPU a thread's own, kept between calls.

    A fresh one would cost a page fault every 4 kB; on a GPU the allocator keeps memory by itself.
    """
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    memory: Tensor | None = getattr(kept, "memory", None)
    if memory is None or memory.dtype != dtype or memory.numel() < rows * columns:
        with torch.inference_mode(False):  # else it could only be used in there
            memory = kept.memory = torch.empty(rows * columns, dtype=dtype)
    return memory[: rows * columns].view(rows, columns)
