"""The environment that training ranks start in: what pays on the hardware they run on. What the user has set stays."""

from __future__ import annotations

import os

from data_pipeline.core.processes import cores

ALLOCATOR = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296"
"""Keep freed memory: a step frees and takes the same large tensors again, and fresh pages cost up to a fifth of it."""


def rank_environment(ranks: int) -> dict[str, str]:
    """Return variables for each of ``ranks`` ranks on this machine, less those that the user has set.

    ``OMP_NUM_THREADS`` divides the cores among them; ``GLIBC_TUNABLES`` is `ALLOCATOR`, which matters on CPUs.
    """
    wanted = {"OMP_NUM_THREADS": str(max(1, cores() // ranks)), "GLIBC_TUNABLES": ALLOCATOR}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def remark() -> str:
    """Return a line for a person on what `rank_environment` does."""
    if "GLIBC_TUNABLES" in os.environ:
        return "memory allocation follows GLIBC_TUNABLES, which is set already"
    return "ranks keep freed memory for the next step: GLIBC_TUNABLES is set for them"
