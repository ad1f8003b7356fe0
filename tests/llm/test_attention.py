"""Every back end that can run here, forwards and backwards, against the formula in float64."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.core.errors import UserError
from llm.kernels import attention as module
from llm.kernels.attention import Documents, attention, choose, missing
from llm.kernels.names import BackEnd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def reference(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, documents_BT: Tensor) -> Tensor:
    """A position at a time, in float64."""
    group = q_BTHE.shape[2] // k_BTKE.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    rows = []
    for row, documents in enumerate(documents_BT.tolist()):
        for t, document in enumerate(documents):
            past = [s for s in range(t + 1) if documents[s] == document]
            for h in range(q.shape[1]):
                p = (k[row, h // group, past] @ q[row, h, t] / math.sqrt(q.shape[-1])).softmax(0)
                rows.append(p @ v[row, h // group, past])
    return torch.stack(rows).view(q_BTHE.shape)


def numbered(lengths: list[list[int]]) -> Tensor:
    """Documents of such lengths, sequence by sequence."""
    rows = [[number for number, length in enumerate(row) for _ in range(length)] for row in lengths]
    return torch.tensor(rows, dtype=torch.int32)


PACKED = numbered([[1, 7, 5], [13], [12, 1]])


def ready(name: BackEnd, width: int) -> tuple[Any, torch.dtype]:
    """The back end, and the type it computes in."""
    precision = "fp32" if name in ("formula", "blocks", "sdpa") else "bf16"
    if why_not := missing(name, DEVICE, precision, width):
        pytest.skip(f"{name}: {why_not}")
    return attention(name), torch.float32 if precision == "fp32" else torch.bfloat16


@pytest.mark.parametrize("packed", [False, True], ids=["whole-sequences", "documents"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("name", get_args(BackEnd))
def test_each_back_end_is_the_formula_forwards_and_backwards(
    name: BackEnd, heads: int, kv_heads: int, packed: bool
) -> None:
    attend, kind = ready(name, 16)
    documents_BT = PACKED if packed else torch.zeros_like(PACKED)
    parts = [torch.randn(3, 13, count, 16).to(DEVICE, kind) for count in (heads, kv_heads, kv_heads)]
    q, k, v = (part.requires_grad_() for part in parts)
    upstream = torch.randn(3, 13, heads, 16).to(DEVICE, kind)
    ours = attend(q, k, v, Documents(documents_BT.to(DEVICE)) if packed else None)
    theirs = reference(q, k, v, documents_BT)
    tolerance = TOLERANCE[kind]
    assert ours.dtype == kind
    torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)
    gradients = torch.autograd.grad(ours, (q, k, v), upstream)
    expected = torch.autograd.grad(theirs, (q, k, v), upstream.double())
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted.double(), atol=4 * tolerance, rtol=tolerance)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    width=st.sampled_from([2, 16, 40]),
)
def test_what_runs_on_cpus_is_the_formula_for_all_shapes(
    lengths: list[int], kv_heads: int, group: int, width: int
) -> None:
    documents = Documents(numbered([lengths]))
    q = torch.randn(1, sum(lengths), kv_heads * group, width)
    k, v = torch.randn(2, 1, sum(lengths), kv_heads, width)
    for given_documents in (documents, None):
        expected = module.formula(q.double(), k.double(), v.double(), given_documents)
        for ours in (module.sdpa, module.block_products):
            mixed = ours(q, k, v, given_documents)
            torch.testing.assert_close(mixed.double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True], ids=["whole-sequences", "documents"])
def test_several_blocks_have_the_gradients_of_the_formula(packed: bool) -> None:
    documents = Documents(numbered([[1, 70, 79], [150]])) if packed else None
    q = torch.randn(2, 150, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 150, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    upstream = torch.randn(2, 150, 4, 8, dtype=torch.float64)
    ours, theirs = (each(q, k, v, documents) for each in (module.block_products, module.formula))
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(
        *(torch.autograd.grad(each, (q, k, v), upstream) for each in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_documents_begin_where_their_number_changes_and_windows_begin() -> None:
    documents = Documents(torch.tensor([[4, 4, 9, 9, 9], [9, 9, 9, 9, 2]]))
    assert documents.starts.tolist() == [0, 2, 5, 9, 10]
    assert documents.starts.dtype == torch.int32
    assert documents.mask_B1TT.sum().item() == (1 + 2) + (1 + 2 + 3) + (1 + 2 + 3 + 4) + 1


SHAPE: dict[str, Any] = {"precision": "bf16", "head_width": 64, "context": 64, "documents": True}


@pytest.mark.parametrize("name", ["flash", "flash2", "flash3", "flash4"])
def test_what_cannot_run_is_refused_with_the_reason(name: BackEnd) -> None:
    with pytest.raises(UserError, match=f"attention is {name}, but it needs a GPU:\nset it to auto"):
        choose(name, device="cpu", **SHAPE)
    assert missing(name, "cuda", "fp32", 64) == "it computes in bf16, not in fp32"
    assert missing(name, "cuda", "bf16", 36) == "it needs heads of a multiple of 8 up to 256, not 36"


@pytest.mark.parametrize(
    ("major", "packages", "documents", "chosen"),
    [
        (9, {"flash_attn_interface"}, False, "flash3"),
        (9, {"flash_attn_interface", "flash_attn.cute"}, True, "flash3"),
        (10, {"flash_attn_interface", "flash_attn.cute"}, True, "flash4"),
        (9, {"flash_attn"}, True, "flash"),
        (9, set(), False, "sdpa"),
        (8, {"flash_attn_interface"}, True, "flash"),
        (7, {"flash_attn"}, True, "sdpa"),
    ],
)
def test_the_automatic_choice_goes_by_what_the_machine_can(
    monkeypatch: pytest.MonkeyPatch, major: int, packages: set[str], documents: bool, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(module, "installed", lambda name: name in packages)
    shape = {"head_width": 64, "documents": documents}
    name, reason = choose("auto", device="cuda", precision="bf16", context=1024, **shape)
    assert (name, bool(reason)) == (chosen, True)
    assert choose("auto", device="cpu", precision="bf16", context=1024, **shape)[0] == "sdpa"
    assert choose("auto", device="cpu", precision="fp32", context=1024, **shape)[0] == "blocks"
    assert choose("auto", device="cpu", precision="fp32", context=1025, **shape)[0] == "sdpa"
    assert choose("formula", device="cpu", **SHAPE) == ("formula", "asked for")


def test_a_package_counts_as_installed_when_it_can_be_imported() -> None:
    assert module.installed("torch.nn")
    assert not module.installed("flash_attn_interface.missing")
