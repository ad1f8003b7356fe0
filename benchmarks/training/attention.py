"""Attention by itself: one back end, forwards and backwards, on random queries, keys and values. Shape suffixes as in
`llm.kernels.attention`."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.training.contestants import WARM_UP, Contestant
from llm.kernels.attention import Attend, Documents, attention, formula
from llm.machine.hardware import device_kind

QKV = tuple[Tensor, Tensor, Tensor]

DOCUMENTS = 4
"""In a window, on average, where they are masked."""


def time_attention(job: Contestant, repeats: int) -> dict[str, Any]:
    """Cases of the back end ``settings["attention"]``: each of the contexts in ``settings["contexts"]``, with
    windows of one document and of several, in batches of as many tokens as ``job.shape`` has."""
    attend = attention(job.settings["attention"])
    return {
        "cases": [
            {"context": context, "masked": masked, **time_case(attend, job, context, masked, repeats)}
            for masked in (False, True)
            for context in job.settings["contexts"]
        ]
    }


def time_case(attend: Attend, job: Contestant, context: int, masked: bool, repeats: int) -> dict[str, Any]:
    """Seconds of forward and backward pass, each the median of ``repeats``; operations of both that the formula needs
    inside documents; `deviation`; and the most bytes held meanwhile, which only a GPU tells."""
    shape, device = job.shape, torch.device(device_kind())
    kind = torch.bfloat16 if job.settings["precision"] == "bf16" else torch.float32
    windows = max(1, shape.batch_sequences * shape.context // context)
    generator = torch.Generator().manual_seed(0)
    size = (windows, context, shape.heads, shape.model.head_width)
    q_BTHE, k_BTHE, v_BTHE, grad_BTHE = (
        torch.randn(size, generator=generator).to(device, kind) for _ in range(4)
    )
    qkv = (q_BTHE.requires_grad_(), k_BTHE.requires_grad_(), v_BTHE.requires_grad_())
    documents_BT = (
        (torch.rand(size[:2], generator=generator) < (DOCUMENTS - 1) / context).cumsum(1).to(device)
    )
    documents = Documents(documents_BT) if masked else None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        forward, backward, out_BTHE = run(attend, qkv, grad_BTHE, documents, repeats)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    return {
        "forward": forward,
        "backward": backward,
        "flops": flops(size, documents),
        "memory": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "deviation": deviation(out_BTHE, qkv, grad_BTHE, documents_BT if masked else None),
    }


def run(
    attend: Attend, qkv: QKV, grad_BTHE: Tensor, documents: Documents | None, repeats: int
) -> tuple[float, float, Tensor]:
    """Median seconds of the forward and of the backward pass, and the last output."""
    moments = []
    for _ in range(WARM_UP + repeats):
        for x in qkv:
            x.grad = None
        start = moment()
        out_BTHE = attend(*qkv, documents)
        middle = moment()
        out_BTHE.backward(grad_BTHE)
        moments.append((start, middle, moment()))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    counted = moments[WARM_UP:]
    forward = statistics.median(seconds(start, middle) for start, middle, _ in counted)
    return forward, statistics.median(seconds(middle, end) for _, middle, end in counted), out_BTHE.detach()


def moment() -> Any:
    """Now, as the device that computes comes to it."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start: Any, end: Any) -> float:
    """Between two moments; of a GPU when it has passed both."""
    return float(end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3)


def flops(size: tuple[int, int, int, int], documents: Documents | None) -> dict[str, float]:
    """Floating-point operations of the two passes: for a document of T positions 2 T^2 H E forwards and twice that
    backwards, causality counted and computing again not, as in `ModelConfig.flops_per_token`."""
    windows, context, heads, head_width = size
    squares = (
        windows * context**2 if documents is None else documents.starts.diff().double().square().sum().item()
    )
    return {"forward": 2.0 * squares * heads * head_width, "backward": 4.0 * squares * heads * head_width}


def deviation(out_BTHE: Tensor, qkv: QKV, grad_BTHE: Tensor, documents_BT: Tensor | None) -> float:
    """The largest difference of the first window's output and gradients from those by the formula in float64, as a
    part of the largest entry there."""
    documents = None if documents_BT is None else Documents(documents_BT[:1])
    worst = 0.0
    for head in range(out_BTHE.shape[2]):  # one by one: scores of all would not fit
        q_1T1E, k_1T1E, v_1T1E = (x[:1, :, head : head + 1].detach().double().requires_grad_() for x in qkv)
        out = formula(q_1T1E, k_1T1E, v_1T1E, documents)
        out.backward(grad_BTHE[:1, :, head : head + 1].double())
        exact = (out.detach(), q_1T1E.grad, k_1T1E.grad, v_1T1E.grad)
        for ours, theirs in zip((out_BTHE, *(x.grad for x in qkv)), exact, strict=True):
            assert ours is not None
            assert theirs is not None
            off = (ours[:1, :, head : head + 1].double() - theirs).abs().max() / theirs.abs().max()
            worst = max(worst, off.item())
    return worst
