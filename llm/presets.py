"""One dial: from ``depth``, the number of blocks, follow the model's width and heads, and the tokens, batch and
learning rate to train it with, each only where the recipe does not set it, and each from what is set. The rules are
published ones for models of this kind; what they give is a start, not an optimum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from pydantic import ValidationError

from llm.model import ModelShape

if TYPE_CHECKING:
    from llm.pretrain import PretrainConfig

HEAD_WIDTH = 64
WIDTH_A_BLOCK = 64
"""Loss hardly depends on width / depth between 32 and 128 (Kaplan et al. 2020, arXiv:2001.08361, figure 5)."""
TOKENS_A_PARAMETER = 20
"""Hoffmann et al. 2022, arXiv:2203.15556, here of parameters outside embeddings and head."""
LARGEST_RATE = 3e-3
"""The fit below is of 60M parameters and more; for smaller models it rises beyond what trains well (docs/log.md)."""
DERIVED = ("model.layers", "model.width", "model.heads", "tokens", "batch_tokens", "lr")
"""What follows from depth, in the order in which it does."""


def fill(values: Mapping[str, Any]) -> dict[str, Any]:
    """A `PretrainConfig`'s raw values, those that follow from ``depth`` added where they are absent.

    What can't be right is left alone, to be refused where it stands.
    """
    depth, model = values.get("depth"), values.get("model", {})
    if isinstance(model, ModelShape):
        model = model.model_dump(exclude_unset=True)
    if not positive(depth) or not isinstance(model, Mapping):
        return dict(values)
    model = {"layers": depth, "width": WIDTH_A_BLOCK * depth, **model}
    if positive(model["width"]):
        model = {"heads": max(1, model["width"] // HEAD_WIDTH), **model}
    try:
        shape = ModelShape.model_validate(model)
    except ValidationError:
        return {"tokens": 1, **values, "model": model}
    filled = {**values, "model": model}
    tokens = filled.get("tokens", TOKENS_A_PARAMETER * shape.block_parameters)
    if positive(tokens):
        filled.setdefault("batch_tokens", whole_batch(best_batch(tokens), shape.context))
        if positive(batch := filled["batch_tokens"]):
            filled.setdefault("tokens", math.ceil(tokens / batch) * batch)
            filled.setdefault("lr", rate(shape.block_parameters, tokens, batch))
    return filled


def positive(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def best_batch(tokens: int) -> float:
    """Tokens of the best batch for a training on ``tokens``: 0.58 D^0.571 (Li et al. 2025, arXiv:2503.04715)."""
    return 0.58 * tokens**0.571


def whole_batch(batch: float, context: int) -> int:
    """The power of two nearest ``batch``, or what is nearest to that in whole windows."""
    return max(1, round(2 ** round(math.log2(batch)) / context)) * context


def rate(parameters: int, tokens: int, batch: int) -> float:
    """Peak learning rate: 1.79 N^-0.713 D^0.307 (Li et al. 2025) at the best batch, and for another one with the
    square root of its size (Malladi et al. 2022, arXiv:2205.10287); at most `LARGEST_RATE`; three digits."""
    best = 1.79 * parameters**-0.713 * tokens**0.307
    return float(f"{min(LARGEST_RATE, best * math.sqrt(batch / best_batch(tokens))):.3g}")


def describe(config: PretrainConfig) -> list[str]:
    """Lines for a person: all that follows from depth, and what the recipe sets otherwise."""
    if config.depth is None:
        return []
    follows, otherwise = [], []
    for key in DERIVED:
        value, rule = look_up(config.model_dump(), key), look_up(fill(without(config, key)), key)
        if value == rule:
            follows.append(f"{key} {value:,}")
        else:
            otherwise.append(f"{key} {value:,} ({rule:,} by the rule)")
    lines = [f"depth {config.depth}: {', '.join(follows)}"]
    return lines + ([f"set otherwise: {', '.join(otherwise)}"] if otherwise else [])


def without(config: PretrainConfig, key: str) -> dict[str, Any]:
    """The config's values less one."""
    values = config.model_dump()
    *parents, last = key.split(".")
    del (values[parents[0]] if parents else values)[last]
    return values


def look_up(values: Mapping[str, Any], key: str) -> Any:
    """``values["model"]["width"]`` for ``model.width``."""
    for part in key.split("."):
        values = values[part]
    return values
