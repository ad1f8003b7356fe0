"""Abilities of a machine, measured on it: the rate of its matrix products, which a training's own is reported as a
part of, and the memory that a rank has held.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.kernels.matmul import missing, onednn
from llm.kernels.names import Library


def matmul_rates(device: torch.device, precision: str, repeats: int = 20) -> dict[Library, float]:
    """Floating-point operations a second of one rank's large matrix products while all ranks run them, by each library
    that can be had: the best of a few, because other work on the machine only ever makes one slower."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, dtype=kind, device=device) for _ in range(2))
    libraries: dict[Library, Callable[[Tensor, Tensor], Tensor]] = {"torch": torch.matmul}
    if not missing(device.type, precision):
        libraries["onednn"] = onednn
    best: dict[Library, float] = dict.fromkeys(libraries, 0.0)
    for _ in range(repeats):
        for name, product in libraries.items():
            start = time.perf_counter()
            product(a, b)[0, 0].item()  # waits for the device
            best[name] = max(best[name], 2 * size**3 / (time.perf_counter() - start))
    return best


def memory_bytes() -> int:
    """Return the most memory this rank has held: on its GPU, or resident where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Clock:
    """Timer of the phases of a step: seconds by phase, added up over steps while it runs."""

    def __init__(self, running: bool = False) -> None:
        self.running = running
        self.seconds: dict[str, float] = {}
        self._last = 0.0

    def start(self) -> None:
        """Begin the first phase with what follows."""
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Count all since the last call as ``phase``. Waits for the GPU, so a step that is timed is no race."""
        if not self.running:
            return
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    @contextmanager
    def apart(self, phase: str) -> Iterator[None]:
        """Count what is done inside as ``phase``, and as none of the lap that it falls into."""
        start = self._now() if self.running else 0.0
        yield
        if self.running:
            took = self._now() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + took
            self._last += took

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "allgather", "allgather_coalesced"),
    *(
        "all_gather_single",
        "all_gather_single_coalesced",
        "_allgather_base",
        "allgather_into_tensor_coalesced",
    ),
    *("reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced", "_reduce_scatter_base"),
    *("reduce_scatter_tensor_coalesced", "alltoall", "all_to_all_single", "alltoall_base", "barrier"),
    "_end_coalescing",
)
"""Methods of `torch.distributed.ProcessGroup` in which all of DeepSpeed's, torch's and our own collectives end."""


@contextmanager
def collectives_timed(clock: Clock) -> Iterator[None]:
    """Inside, collectives are ``clock``'s phase "communication", the wait for slower ranks included.

    Each is waited for at once: so what would run beside computation is reported in full.
    """

    def timed(collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def call(*arguments: Any, **options: Any) -> Any:
            with clock.apart("communication"):
                work = collective(*arguments, **options)
                if work is not None:
                    work.wait()
            return work

        return call

    plain = {name: method for name, method in vars(dist.ProcessGroup).items() if name in COLLECTIVES}
    try:
        for name, collective in plain.items():
            setattr(dist.ProcessGroup, name, timed(collective))
        yield
    finally:
        for name, collective in plain.items():
            setattr(dist.ProcessGroup, name, collective)
