"""A training that takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm.pretrain.config import PretrainConfig

CONTEXT = 32


def toy(steps: int, batch: int, runtime: Mapping[str, Any], **fields: Any) -> PretrainConfig:
    """Return the config of a training of ``steps`` steps that read ``batch`` sequences each."""
    values = {
        "model": {"layers": 1, "heads": 2, "width": 32, "context": CONTEXT},
        "tokens": steps * batch * CONTEXT,
        "batch_tokens": batch * CONTEXT,
        "lr": 1e-2,
        "precision": "fp32",
        "runtime": runtime,
    }
    return PretrainConfig.model_validate({**values, **fields})
