"""Causal attention by several back ends, one of which is chosen, once, at start: torch's fused kernels, the
FlashAttention kernels of torch and of other packages, and the textbook formula that tests hold them all to. Where
documents are packed into one sequence they need not see each other: kernels for sequences of any length compute only
what is inside a document, the others are given a mask. Shape suffixes: B batch, T positions, H query heads,
K key-value heads, E width of a head.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

from data_pipeline.core.errors import UserError
from llm.kernels.cpu_attention import LONGEST, in_blocks
from llm.kernels.names import BackEnd

PACKAGES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
CAPABILITIES = {"flash": (8, 9, 10, 12), "flash2": (8, 9, 10, 12), "flash3": (9,), "flash4": (9, 10)}
"""Major compute capabilities of the GPUs that each is made for."""


class Documents:
    """Which positions of a batch belong together, in the forms that back ends want, each made once for all layers."""

    def __init__(self, documents_BT: Tensor) -> None:
        """``documents_BT`` numbers each position's document in its sequence: equal numbers lie together."""
        self.documents_BT = documents_BT

    @cached_property
    def mask_B1TT(self) -> Tensor:
        """True where a position (the row) may look."""
        positions = self.documents_BT.shape[1]
        same_BTT = self.documents_BT[:, :, None] == self.documents_BT[:, None, :]
        past_TT = torch.ones(positions, positions, dtype=torch.bool, device=same_BTT.device).tril()
        return (same_BTT & past_TT)[:, None]

    @cached_property
    def hidden_B1TT(self) -> Tensor:
        """True where a position may not look."""
        return ~self.mask_B1TT

    @cached_property
    def starts(self) -> Tensor:
        """Beginnings of documents in the batch laid end to end, and, last, where it ends: int32."""
        begins_BT = torch.ones_like(self.documents_BT, dtype=torch.bool)
        begins_BT[:, 1:] = self.documents_BT[:, 1:] != self.documents_BT[:, :-1]
        starts = begins_BT.flatten().nonzero()[:, 0]
        return F.pad(starts, (0, 1), value=begins_BT.numel()).to(torch.int32)


Attend = Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]
"""(q_BTHE, k_BTKE, v_BTKE, documents) -> mixed_BTHE: softmax(q k' / sqrt(E)) v over positions up to one's own and in
one's own document. H is a multiple of K: query heads h*H/K ... share key-value head h (Ainslie et al. 2023,
arXiv:2305.13245)."""


def attention(name: BackEnd) -> Attend:
    """Make the back end of that name ready. Whether it can run here, `choose` has checked."""
    if name == "flash3":
        activate_flash_attention_impl("FA3")
    elif name == "flash4":
        activate_flash_attention_impl("FA4")
    table: dict[BackEnd, Attend] = {
        "formula": formula,
        "blocks": block_products,
        "sdpa": sdpa,
        "flash2": flash_package,
    }
    return table.get(name, flash)


def choose(
    asked: BackEnd | Literal["auto"],
    *,
    device: Literal["cpu", "cuda"],
    precision: str,
    head_width: int,
    context: int,
    documents: bool,
) -> tuple[BackEnd, str]:
    """Return the back end to use and why: the one that was asked for, or for "auto" the fastest that can run.

    Raises:
        UserError: the one that was asked for cannot run here.
    """
    if asked != "auto":
        if why_not := missing(asked, device, precision, head_width):
            raise UserError(
                f"pretrain.runtime.attention is {asked}, but {why_not}:\nset it to auto, or to one that can run here"
            )
        return asked, "asked for"
    for name in ("flash3", "flash4"):
        if not missing(name, device, precision, head_width):
            return name, f"{PACKAGES[name]} is installed and made for this GPU"
    if not missing("blocks", device, precision, head_width) and context <= LONGEST:
        return "blocks", f"keeps probabilities, which pays in fp32 up to a context of {LONGEST:,}"
    if documents and not missing("flash", device, precision, head_width):
        return "flash", "computes only inside documents"
    return "sdpa", "torch's choice of kernels"


def missing(name: BackEnd, device: str, precision: str, head_width: int) -> str | None:
    """Return what a back end lacks to run here, or None."""
    if name in ("formula", "sdpa"):
        return None
    if name == "blocks":
        if device != "cpu":
            return "it is made for CPUs"
        return None if precision == "fp32" else f"it computes in fp32, not in {precision}"
    if device != "cuda":
        return "it needs a GPU"
    if precision != "bf16":
        return f"it computes in bf16, not in {precision}"
    if head_width % 8 or head_width > 256:
        return f"it needs heads of a multiple of 8 up to 256, not {head_width}"
    major = torch.cuda.get_device_capability()[0]
    if major not in CAPABILITIES[name]:
        return f"it is not made for {torch.cuda.get_device_name()} (compute capability {major})"
    if name == "flash" and not torch.backends.cuda.is_flash_attention_available():
        return "this torch is built without it"
    if name in PACKAGES and not installed(PACKAGES[name]):
        return f"the package {PACKAGES[name]} is not installed"
    return None


def installed(module: str) -> bool:
    """Return whether a module can be imported, without doing so."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


def formula(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, documents: Documents | None) -> Tensor:
    """Attend by the formula, with all scores in memory."""
    group, positions = q_BTHE.shape[2] // k_BTKE.shape[2], q_BTHE.shape[1]
    k_BTHE, v_BTHE = k_BTKE.repeat_interleave(group, dim=2), v_BTKE.repeat_interleave(group, dim=2)
    scores_BHTT = torch.einsum("bthe,bshe->bhts", q_BTHE, k_BTHE) / math.sqrt(q_BTHE.shape[-1])
    allowed = torch.ones(positions, positions, dtype=torch.bool, device=q_BTHE.device).tril()
    if documents is not None:
        allowed = documents.mask_B1TT
    p_BHTT = scores_BHTT.masked_fill(~allowed, -math.inf).softmax(dim=-1).type_as(v_BTHE)
    return torch.einsum("bhts,bshe->bthe", p_BHTT, v_BTHE)


def block_products(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, documents: Documents | None) -> Tensor:
    """Attend by batched matrix products of blocks of queries."""
    return in_blocks(q_BTHE, k_BTKE, v_BTKE, None if documents is None else documents.hidden_B1TT)


def sdpa(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, documents: Documents | None) -> Tensor:
    """Attend by the kernel that torch takes for device and shapes."""
    mixed_BHTE = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BTKE.transpose(1, 2),
        v_BTKE.transpose(1, 2),
        attn_mask=None if documents is None else documents.mask_B1TT,
        is_causal=documents is None,
        enable_gqa=q_BTHE.shape[2] != k_BTKE.shape[2],
    )
    return mixed_BHTE.transpose(1, 2)


def flash(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, documents: Documents | None) -> Tensor:
    """Attend by torch's FlashAttention (Dao 2023, arXiv:2307.08691), or the newer one activated in its place."""
    if documents is None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa(q_BTHE, k_BTKE, v_BTKE, None)
    # Not at the top: it brings torch's compiler along, a second of every start.
    from torch.nn.attention.varlen import varlen_attn

    positions = q_BTHE.shape[1]
    mixed_SHE = varlen_attn(
        q_BTHE.flatten(0, 1),
        k_BTKE.flatten(0, 1),
        v_BTKE.flatten(0, 1),
        documents.starts,
        documents.starts,
        positions,
        positions,
        window_size=(-1, 0),  # causal
        enable_gqa=q_BTHE.shape[2] != k_BTKE.shape[2],
    )
    assert isinstance(mixed_SHE, Tensor)
    return mixed_SHE.view_as(q_BTHE)


def flash_package(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, documents: Documents | None) -> Tensor:
    """Attend by the package flash-attn."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if documents is None:
        return flash_attn_func(q_BTHE, k_BTKE, v_BTKE, causal=True)
    positions = q_BTHE.shape[1]
    mixed_SHE = flash_attn_varlen_func(
        q_BTHE.flatten(0, 1),
        k_BTKE.flatten(0, 1),
        v_BTKE.flatten(0, 1),
        documents.starts,
        documents.starts,
        positions,
        positions,
        causal=True,
    )
    return mixed_SHE.view_as(q_BTHE)
