"""Names of kernels that a recipe may ask for."""

from __future__ import annotations

from typing import Literal

BackEnd = Literal["formula", "blocks", "sdpa", "flash", "flash2", "flash3", "flash4"]
"""The formula; `llm.kernels.cpu_attention`; torch's choice of its kernels; torch's own FlashAttention-2; the package
flash-attn; and the packages of FlashAttention-3 and -4 through torch."""
Library = Literal["torch", "onednn"]
"""The library that torch takes by itself; oneDNN, for layers in fp32 on a CPU."""
