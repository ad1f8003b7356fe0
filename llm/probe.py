"""What a machine can do, measured on it: the rate of its matrix products, which a training's own is told as a part
of, and the memory that a rank has held.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from llm.matmul import missing, onednn


def matmul_flops(device: torch.device, precision: str, repeats: int = 20) -> float:
    """Floating-point operations a second of one rank's large matrix products while all ranks run them: the best
    of a few, because other work on the machine only ever makes one slower, by torch's library or by oneDNN."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, dtype=kind, device=device) for _ in range(2))
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [torch.matmul]
    if not missing(device.type, precision):
        ways.append(onednn)
    best = 0.0
    for way in ways * repeats:
        start = time.perf_counter()
        way(a, b)[0, 0].item()  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def memory_bytes() -> int:
    """The most memory this rank has held: on its GPU, or resident where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Clock:
    """Where the time of a step goes: seconds by part, added up over steps while it runs."""

    def __init__(self, running: bool = False) -> None:
        self.running = running
        self.seconds: dict[str, float] = {}
        self._last = 0.0

    def start(self) -> None:
        """What follows is the first part."""
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """All since the last call was ``part``. Waits for the GPU, so a step that is timed by parts is no race."""
        if not self.running:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now
