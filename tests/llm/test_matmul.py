"""Layers whose products oneDNN makes are the formula, forwards and backwards; and which library is taken, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_pipeline.core.errors import UserError
from llm.kernels import matmul as module
from llm.kernels.loss import linear_cross_entropy
from llm.kernels.matmul import Linear, choose_matmul, missing
from llm.machine.hardware import cpu_vendor
from llm.model.config import ModelConfig
from llm.model.transformer import Transformer

pytestmark = pytest.mark.skipif(
    missing("cpu", "fp32") is not None, reason=missing("cpu", "fp32") or "oneDNN is here"
)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (40, 24), (1, 7), (7, 1)])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (1, 1)])
def test_a_layer_is_the_formula(leading: tuple[int, ...], inputs: int, outputs: int, bias: bool) -> None:
    layer = Linear(inputs, outputs, bias=bias)
    layer.matmul = "onednn"
    x = torch.randn(*leading, inputs, requires_grad=True)
    upstream = torch.randn(*leading, outputs)
    parameters = list(layer.parameters())
    exact = [part.detach().double().requires_grad_() for part in (x, *parameters)]
    theirs = exact[0] @ exact[1].t() + (exact[2] if bias else 0)
    ours = layer(x)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(ours, (x, *parameters), upstream)
    expected = torch.autograd.grad(theirs, exact, upstream.double())
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, atol=1e-5, rtol=1e-5)


def test_gradients_of_a_part_of_a_tensor_are_taken_too() -> None:
    """What comes from behind may be a view with gaps, or one number spread over a tensor."""
    layer = Linear(6, 4)
    layer.matmul = "onednn"
    x = torch.randn(3, 6, requires_grad=True)
    for loss in (lambda y: y.sum(), lambda y: y[:, 1:3].square().sum(), lambda y: y.t()[1:].exp().sum()):
        ours = torch.autograd.grad(loss(layer(x)), x)[0]
        torch.testing.assert_close(ours, torch.autograd.grad(loss(x @ layer.weight.t() + layer.bias), x)[0])


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.3, "softcap": 5.0}], ids=["plain", "z-loss-and-cap"])
@pytest.mark.parametrize("chunk", [7 * 4 * 64, 1 << 20], ids=["chunks-of-7", "whole"])
def test_the_loss_is_the_same(chunk: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.kernels.loss.CHUNK_BYTES", {"cpu": chunk})
    x, weight = torch.randn(3, 6, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    targets = torch.randint(50, (3, 6))
    kept: list[Any] = []
    for matmul in ("torch", "onednn"):
        for reduction in ("mean", "none"):
            loss = linear_cross_entropy(
                x, weight, targets, vocab_size=50, reduction=reduction, matmul=matmul, **options
            )
            kept.append((loss.detach(), *torch.autograd.grad(loss.square().sum(), (x, weight))))
    for ours, theirs in zip(kept[2:], kept[:2], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_every_layer_of_a_model_takes_it(positions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the blocks and of the head; with no other products left in them."""
    shape = ModelConfig(layers=2, width=16, heads=2, context=8, vocab_size=60, positions=positions)
    plain, ours = Transformer(shape), Transformer(shape, matmul="onednn")
    tokens = torch.randint(60, (2, 9))
    calls: list[int] = []
    onednn = module.onednn
    for place in ("llm.kernels.matmul.onednn", "llm.kernels.loss.onednn"):
        monkeypatch.setattr(place, lambda *given: calls.append(1) or onednn(*given))
    with torch.no_grad():
        losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in (plain, ours)]
    torch.testing.assert_close(*losses)
    assert len(calls) == 2 * (6 if positions == "learned" else 7) + 1


def test_the_choice_goes_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(vendor: str, *flags: str, device: str = "cpu", precision: str = "fp32") -> str:
        monkeypatch.setattr(module, "cpu_vendor", lambda: vendor)
        monkeypatch.setattr(module, "cpu_flags", lambda: frozenset(flags))
        return choose_matmul("auto", device=device, precision=precision)[0]

    assert chosen("AuthenticAMD", "avx2", "avx512f") == "onednn"
    assert chosen("AuthenticAMD", "avx2") == "torch"
    assert chosen("GenuineIntel", "avx2", "avx512f") == "torch"
    assert chosen("AuthenticAMD", "avx512f", precision="bf16") == "torch"
    assert chosen("AuthenticAMD", "avx512f", device="cuda") == "torch"
    assert choose_matmul("torch", device="cpu", precision="fp32") == ("torch", "asked for")
    with pytest.raises(UserError, match="matmul is onednn, but oneDNN is for CPUs"):
        choose_matmul("onednn", device="cuda", precision="fp32")
    with pytest.raises(UserError, match="matmul is onednn, but torch takes oneDNN for bf16 by itself"):
        choose_matmul("onednn", device="cpu", precision="bf16")


def test_the_vendor_is_what_linux_lists(tmp_path: Any) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2\n", encoding="utf-8")
    assert cpu_vendor(listing) == "AuthenticAMD"
    assert cpu_vendor(tmp_path / "none") == ""
