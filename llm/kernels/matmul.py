"""Matrix products in fp32 on a CPU. torch has them from MKL, which on processors that are not Intel's runs its AVX2
kernels even where they have AVX-512; oneDNN, which torch carries too, uses that there, at twice the rate. One of
them is chosen, once, at start. Shape suffixes: N rows, K features in, M features out.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from llm.kernels.names import Library
from llm.machine.hardware import cpu_flags, cpu_vendor


def choose_matmul(asked: Library | Literal["auto"], *, device: str, precision: str) -> tuple[Library, str]:
    """Return the library to use and why.

    Raises:
        UserError: oneDNN is asked for and cannot be had.
    """
    why_not = missing(device, precision)
    if asked == "onednn" and why_not:
        raise UserError(f"pretrain.runtime.matmul is onednn, but {why_not}:\nset it to auto or torch")
    if asked != "auto":
        return asked, "asked for"
    if why_not:
        return "torch", why_not
    if "avx512f" not in cpu_flags():
        return "torch", "this processor has no AVX-512, for which oneDNN would be faster"
    if cpu_vendor() == "GenuineIntel":
        return "torch", "MKL uses all that this processor has"
    return "onednn", "MKL would leave this processor's AVX-512 unused"


def missing(device: str, precision: str) -> str | None:
    """Return why oneDNN cannot be asked for, or None."""
    if device != "cpu":
        return "oneDNN is for CPUs"
    if precision != "fp32":
        return f"torch takes oneDNN for {precision} by itself"
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return "this torch is built without oneDNN"
    return None


class Linear(nn.Linear):
    """x weight' + bias by the library that `matmul` names."""

    matmul: Library = "torch"

    def __init__(self, features_in: int, features_out: int, bias: bool = True) -> None:
        super().__init__(features_in, features_out, bias=bias)
        self.adapter: nn.Module | None = None
        """Added to the product, where only that is trained: see `llm.model.lora`."""

    def forward(self, x: Tensor) -> Tensor:
        product = self.multiplied(x)
        return product if self.adapter is None else product + self.adapter(x)

    def multiplied(self, x: Tensor) -> Tensor:
        """Return x weight' + bias."""
        if self.matmul == "torch" or torch.compiler.is_compiling():  # which cannot trace oneDNN's operator
            return super().forward(x)
        result: Tensor = ByOneDNN.apply(x, self.weight, self.bias)
        return result


class ByOneDNN(torch.autograd.Function):
    """y = x weight' + bias: dx = dy weight, dweight = dy' x, dbias = the sum of dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_MK)
        ctx.biased = bias_M is not None
        return onednn(x, weight_MK, bias_M)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_MK = ctx.saved_tensors
        grad_NM, x_NK = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return (
            onednn(grad_NM, weight_MK.t()).view(x.shape) if ctx.needs_input_grad[0] else None,
            outer(grad_NM, x_NK) if ctx.needs_input_grad[1] else None,
            grad_NM.sum(dim=0) if ctx.biased else None,
        )


def onednn(x: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """x weight' + bias. Both may be transposed views of what is contiguous, not slices of rows: with gaps oneDNN
    falls back to its reference, which is a thousand times slower."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_MK, bias_M, "none", [], "")
    return result


def outer(grad_NM: Tensor, x_NK: Tensor) -> Tensor:
    """grad' x, ``(M, K)``, maybe a transposed view: with the smaller side as rows it takes two thirds of the time."""
    if grad_NM.shape[1] <= x_NK.shape[1]:
        return onednn(grad_NM.t(), x_NK.t())
    return onednn(x_NK.t(), grad_NM.t()).t()
