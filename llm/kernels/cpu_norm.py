"""Operations between the matrix products, in as few passes over memory as a CPU allows: there each elementwise
operation reads and writes its tensors anew, and autograd of the plain formulas makes about twice the passes of these.
Each is exact arithmetic of the formula in its docstring, forwards and backwards. Shape suffixes: N rows (all leading
dimensions), D features, T positions, H heads, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ScaleByRMS(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps) and t = dy * x: dx = r w dy - x r^3 (t w) / D, dw = t' r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        norm_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True, dtype=weight_D.dtype)
        rate_N1 = norm_N1.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, weight_D, rate_N1)
        return (x_ND * rate_N1).mul_(weight_D).view(x.shape).type_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_D, rate_N1 = ctx.saved_tensors
        grad_ND = grad.reshape(x_ND.shape)
        product_ND = torch.mul(grad_ND, x_ND).type_as(weight_D)
        weight_grad_D = (product_ND.t() @ rate_N1)[:, 0]
        back_N1 = (product_ND @ weight_D)[:, None].mul_(rate_N1.pow(3)).div_(-x_ND.shape[1])
        torch.mul(grad_ND, rate_N1, out=product_ND)
        x_grad_ND = torch.mul(x_ND, back_N1).addcmul_(product_ND, weight_D)
        return x_grad_ND.view(grad.shape).type_as(x_ND), weight_grad_D, None


class Rotate(torch.autograd.Function):
    """Turn each pair of features (i, i + E/2) by its position's angle; backwards, by the opposite one."""

    @staticmethod
    def forward(ctx: Any, x_BTHE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TE, sin_TE)
        return turned(x_BTHE, cos_TE, sin_TE, 1.0)

    @staticmethod
    def backward(ctx: Any, grad_BTHE: Tensor) -> tuple[Tensor, None, None]:
        cos_TE, sin_TE = ctx.saved_tensors
        return turned(grad_BTHE, cos_TE, sin_TE, -1.0), None, None


def turned(x_BTHE: Tensor, cos_TE: Tensor, sin_TE: Tensor, sign: float) -> Tensor:
    """x cos + (-right, left) sin of each head, with ``sign`` 1; its transpose with -1."""
    half = x_BTHE.shape[-1] // 2
    sin_T1E = sin_TE[..., None, :half]
    left, right = x_BTHE[..., :half], x_BTHE[..., half:]
    out_BTHE = x_BTHE * cos_TE[..., None, :]
    out_BTHE[..., :half].addcmul_(right, sin_T1E, value=-sign)
    out_BTHE[..., half:].addcmul_(left, sin_T1E, value=sign)
    return out_BTHE
