"""The passes between the matrix products are exact: forwards and backwards as the formulas, in any shape and type."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm.model.config import ModelConfig
from llm.model.transformer import RMSNorm, rotary_tables, rotate


def norm_formula(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight_D


def rotate_formula(x_BTHE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """As a product of complex numbers: feature i + E/2 is the imaginary part of feature i."""
    half = x_BTHE.shape[-1] // 2
    x = torch.complex(x_BTHE[..., :half], x_BTHE[..., half:])
    turn = torch.complex(cos_TE[..., None, :half], sin_TE[..., None, :half])
    return torch.cat(((x * turn).real, (x * turn).imag), dim=-1)


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 16), (2, 3, 4, 6), (1, 1)])
def test_the_norm_is_the_formula_forwards_and_backwards(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(shape[-1], 1e-5, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(x), norm_formula(x, norm.weight, 1e-5))
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight)
    )


def test_the_norm_keeps_to_fp32_where_the_stream_is_bf16() -> None:
    norm = RMSNorm(64, 1e-5)
    x = torch.randn(7, 64).bfloat16()
    exact = norm_formula(x.double(), norm.weight.double(), 1e-5)
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).double(), exact, rtol=2**-8, atol=0)  # one rounding


def test_rows_may_lie_apart_in_memory() -> None:
    norm = RMSNorm(8, 1e-5)
    x = torch.randn(8, 6, 5).permute(2, 1, 0)
    torch.testing.assert_close(norm(x), norm(x.contiguous()))


def test_rotation_is_the_complex_product_and_its_gradient_turns_back() -> None:
    config = ModelConfig(layers=1, heads=2, width=12, context=9, vocab_size=10)
    cos_TE, sin_TE = (table.double() for table in rotary_tables(config))
    x = torch.randn(2, 9, 2, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rotate(x, cos_TE, sin_TE), rotate_formula(x, cos_TE, sin_TE))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos_TE, sin_TE), (x,))
