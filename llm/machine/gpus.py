"""Whether this machine has GPUs. torch, which takes seconds to import, is asked only where the system shows one."""

from __future__ import annotations

import sys
from pathlib import Path

DEVICES = ("nvidiactl", "nvidia0", "nvhost-ctrl", "nvmap", "dxg", "kfd")
"""Files that drivers of NVIDIA's, in machines, on boards and under WSL, and AMD's put into /dev; without one of them
torch finds no GPU."""


def gpus(folder: Path = Path("/dev")) -> int:
    """Count how many GPUs torch may use."""
    if "torch" not in sys.modules and not any((folder / name).exists() for name in DEVICES):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
