"""Causal attention in fp32 on a CPU: a block of queries at a time, each against the keys up to its end, in batched
matrix products whose probabilities are kept for the backward pass. torch's kernel for CPUs computes them again there,
and with smaller products; what is kept grows with the square of the context. Shape suffixes as in
`llm.kernels.attention`; N all heads of all sequences, Q queries of a block, S keys up to its end.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

LONGEST = 1024
"""Positions up to which the probabilities are worth their memory: half of 4 bytes for each pair of positions."""


def in_blocks(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, hidden_B1TT: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(E)) v over positions up to one's own that are not ``hidden``: ``(B, T, H, E)``."""
    result: Tensor = Blocks.apply(q_BTHE, k_BTKE, v_BTKE, hidden_B1TT)
    return result


class Blocks(torch.autograd.Function):
    """With P = softmax(S), S = q k' / sqrt(E): dv = P' dy, dP = dy v', dS = P (dP - sum(P dP)), dq = dS k / sqrt(E),
    dk = dS' q / sqrt(E)."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, hidden_B1TT: Tensor | None
    ) -> Tensor:
        sequences, positions, heads, width = q_BTHE.shape
        ctx.scale, ctx.group = 1 / math.sqrt(width), heads // k_BTKE.shape[2]
        q_NTE = heads_first(q_BTHE) * ctx.scale
        k_NTE, v_NTE = (
            heads_first(each.repeat_interleave(ctx.group, dim=2) if ctx.group > 1 else each)
            for each in (k_BTKE, v_BTKE)
        )
        mixed_BTHE, kept = torch.empty_like(q_BTHE), []
        for start, end in blocks(positions):
            p_NQS = torch.bmm(q_NTE[:, start:end], k_NTE[:, :end].transpose(1, 2))
            if hidden_B1TT is None:
                later_QQ = torch.full((end - start, end - start), -math.inf, dtype=p_NQS.dtype).triu_(1)
                p_NQS[:, :, start:] += later_QQ
            else:
                of_sequence = p_NQS.view(sequences, heads, end - start, end)
                of_sequence.masked_fill_(hidden_B1TT[:, :, start:end, :end], -math.inf)
            torch.softmax(p_NQS, dim=-1, out=p_NQS)
            put(mixed_BTHE[:, start:end], torch.bmm(p_NQS, v_NTE[:, :end]))
            kept.append(p_NQS)
        ctx.save_for_backward(q_NTE, k_NTE, v_NTE, *kept)
        return mixed_BTHE

    @staticmethod
    def backward(ctx: Any, grad_BTHE: Tensor) -> tuple[Tensor | None, ...]:
        q_NTE, k_NTE, v_NTE, *kept = ctx.saved_tensors
        grad_NTE, dq_BTHE = heads_first(grad_BTHE), torch.empty_like(grad_BTHE)
        dk_NTE, dv_NTE = torch.empty(0), torch.empty(0)
        # The last block sees all keys, so what it gives is where the others' shares are added.
        for (start, end), p_NQS in zip(reversed(blocks(q_NTE.shape[1])), reversed(kept), strict=True):
            grad_NQE = grad_NTE[:, start:end]
            dv_NSE = torch.bmm(p_NQS.transpose(1, 2), grad_NQE)
            dp_NQS = torch.bmm(grad_NQE, v_NTE[:, :end].transpose(1, 2))
            ds_NQS = torch._softmax_backward_data(dp_NQS, p_NQS, -1, p_NQS.dtype)
            put(dq_BTHE[:, start:end], torch.bmm(ds_NQS, k_NTE[:, :end]).mul_(ctx.scale))
            dk_NSE = torch.bmm(ds_NQS.transpose(1, 2), q_NTE[:, start:end])
            if end == q_NTE.shape[1]:
                dk_NTE, dv_NTE = dk_NSE, dv_NSE
            else:
                dk_NTE[:, :end] += dk_NSE
                dv_NTE[:, :end] += dv_NSE
        return dq_BTHE, *(of_groups(each, len(grad_BTHE), ctx.group) for each in (dk_NTE, dv_NTE)), None


def blocks(positions: int) -> list[tuple[int, int]]:
    """Return starts and ends of the blocks. Smaller ones skip more of what lies ahead, larger ones make faster
    products."""
    size = max(64, positions // 8)
    return list(pairwise([*range(0, positions, size), positions]))


def heads_first(x_BTHE: Tensor) -> Tensor:
    """Return the heads of sequences as one batch, each contiguous: ``(N, T, E)``."""
    return x_BTHE.transpose(1, 2).reshape(-1, x_BTHE.shape[1], x_BTHE.shape[3])


def put(out_BQHE: Tensor, x_NQE: Tensor) -> None:
    """Write what `heads_first` would have read."""
    out_BQHE.copy_(x_NQE.view(len(out_BQHE), -1, *x_NQE.shape[1:]).transpose(1, 2))


def of_groups(x_NTE: Tensor, sequences: int, group: int) -> Tensor:
    """Return the gradients of key-value heads from those of the query heads that share them: ``(B, T, K, E)``."""
    x_BHTE = x_NTE.view(sequences, -1, *x_NTE.shape[1:])
    return (x_BHTE if group == 1 else x_BHTE.unflatten(1, (-1, group)).sum(dim=2)).transpose(1, 2)
