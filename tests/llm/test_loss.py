"""The chunked loss against the plain formula in float64, which has all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.kernels import loss as module
from llm.kernels.loss import linear_cross_entropy

VOCAB, PADDED, WIDTH = 50, 64, 16


@pytest.fixture(autouse=True, params=[1, 7 * 4 * PADDED, 1 << 20], ids=["rows", "chunks-of-7", "whole"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each law for a position at a time, for chunks that do not divide the positions, and for one chunk."""
    if request.function is test_the_logits_are_never_all_in_memory and request.param != 1 << 20:
        pytest.skip("of a chunk of 1 MB")
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": request.param, "cuda": request.param})


def plain(
    x: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, softcap: float | None = None
) -> Tensor:
    """The nats of each target, by the formula."""
    logits = x.double() @ weight.double()[:VOCAB].t()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_z = logits.logsumexp(-1)
    return log_z - logits.gather(-1, targets[..., None])[..., 0] + z_loss * log_z**2


def batch(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """x (3, 6, D), weight (V, D) and targets (3, 6); rows past the vocabulary hold what must not matter."""
    weight = torch.randn(PADDED, WIDTH) * scale
    weight[VOCAB:] = 1e3
    return torch.randn(3, 6, WIDTH, requires_grad=True), weight.requires_grad_(), torch.randint(VOCAB, (3, 6))


OPTIONS = [{}, {"z_loss": 0.3}, {"softcap": 2.0}, {"z_loss": 0.1, "softcap": 5.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_and_gradients_are_those_of_the_formula_however_the_loss_is_scaled(
    options: dict[str, Any], reduction: Any
) -> None:
    x, weight, targets = batch()
    factor = torch.tensor(0.125) if reduction == "mean" else torch.randn(3, 6)
    ours = linear_cross_entropy(x, weight, targets, vocab_size=VOCAB, reduction=reduction, **options)
    gradients = torch.autograd.grad((ours * factor).sum(), (x, weight))
    theirs = plain(x, weight, targets, **options)
    theirs = theirs.mean() if reduction == "mean" else theirs
    expected = torch.autograd.grad((theirs * factor).sum(), (x, weight))
    torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-6)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)
    assert not gradients[1][VOCAB:].any()


def test_in_float64_it_is_exact() -> None:
    x, weight, targets = batch()
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    ours = linear_cross_entropy(x, weight, targets, vocab_size=VOCAB, z_loss=0.2)
    theirs = plain(x, weight, targets, z_loss=0.2).mean()
    torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-14)
    for one, other in zip(*(torch.autograd.grad(loss, (x, weight)) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=1e-13)


def test_targets_without_a_probability_in_fp32_cost_what_the_formula_says() -> None:
    """exp(-1000) is 0 in fp32, and its logarithm would be infinite."""
    x, weight, targets = batch(scale=300.0)
    ours = linear_cross_entropy(x, weight, targets, vocab_size=VOCAB, reduction="none")
    assert ours.max() > 1000
    torch.testing.assert_close(ours.double(), plain(x, weight, targets), atol=1e-3, rtol=1e-6)


def test_a_loss_that_nobody_differentiates_is_the_same() -> None:
    x, weight, targets = batch()
    trained = linear_cross_entropy(x, weight, targets, vocab_size=VOCAB)
    with torch.inference_mode():
        assert torch.equal(linear_cross_entropy(x, weight, targets, vocab_size=VOCAB), trained)
    trained.backward()  # and memory that inference used serves training again
    linear_cross_entropy(x, weight, targets, vocab_size=VOCAB).backward()
    frozen = linear_cross_entropy(x, weight.detach(), targets, vocab_size=VOCAB)
    torch.testing.assert_close(torch.autograd.grad(frozen, x)[0] * 2, x.grad)


def test_a_mean_is_differentiated_once() -> None:
    x, weight, targets = batch()
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()


def test_under_autocast_only_matrix_products_are_rounded() -> None:
    x, weight, targets = batch(scale=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(x, weight, targets, vocab_size=VOCAB)
    rounded = plain(x.bfloat16(), weight.bfloat16(), targets).mean()
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(rounded.item(), rel=2e-3)
    gradients = torch.autograd.grad(ours, (x, weight))
    expected = torch.autograd.grad(plain(x, weight, targets).mean(), (x, weight))
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("target", [-1, PADDED])
def test_a_target_that_is_no_row_is_an_error(target: int) -> None:
    x, weight, targets = batch()
    targets[1, 2] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(x, weight, targets, vocab_size=VOCAB)


def largest_allocation(loss: Callable[..., Tensor], *parts: Tensor) -> int:
    """Bytes of the operation that took most in the forward and backward pass."""
    with torch.profiler.profile(profile_memory=True) as profile:
        loss(*parts).backward()
    return max(event.self_cpu_memory_usage for event in profile.key_averages())


def test_the_logits_are_never_all_in_memory() -> None:
    positions, vocab = 1024, 4096
    x, weight = torch.randn(positions, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    targets = torch.randint(vocab, (positions,))
    full = 4 * positions * vocab
    assert largest_allocation(lambda *t: F.cross_entropy(F.linear(*t[:2]), t[2]), x, weight, targets) >= full
    assert largest_allocation(linear_cross_entropy, x, weight, targets) <= full / 8
