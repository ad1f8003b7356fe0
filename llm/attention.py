"""Causal attention: the fused kernel that trains, and the textbook formula that tests hold it to."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
    """softmax(q k' / sqrt(E)) v over positions up to one's own, by torch's fastest kernel for the device.

    H is a multiple of K: query heads h*H/K ... share key-value head h (Ainslie et al. 2023, arXiv:2305.13245).
    """
    grouped = q_BHTE.shape[1] != k_BKTE.shape[1]
    return F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, is_causal=True, enable_gqa=grouped)


def reference_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
    """The same by the formula, with all scores in memory: for tests."""
    group = q_BHTE.shape[1] // k_BKTE.shape[1]
    k_BHTE, v_BHTE = k_BKTE.repeat_interleave(group, dim=1), v_BKTE.repeat_interleave(group, dim=1)
    scores_BHTT = q_BHTE @ k_BHTE.transpose(-1, -2) / math.sqrt(q_BHTE.shape[-1])
    future_TT = torch.ones(scores_BHTT.shape[-2:], dtype=torch.bool, device=q_BHTE.device).triu(1)
    return scores_BHTT.masked_fill(future_TT, -math.inf).softmax(dim=-1) @ v_BHTE
