"""One dial: from ``depth``, the number of blocks, follow the model's width and heads, and the tokens, batch and
learning rate to train it with, each only where the recipe does not set it, and each from what is set. The rules are
published ones for models of this kind; what they give is a start, not an optimum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from data_pipeline.core.config import Config
from llm.model.config import ModelShape

HEAD_WIDTH = 64
WIDTH_A_BLOCK = 64
"""Loss hardly depends on width / depth between 32 and 128 (Kaplan et al. 2020, arXiv:2001.08361, figure 5)."""
TOKENS_A_PARAMETER = 20
"""Hoffmann et al. 2022, arXiv:2203.15556, here of parameters outside embeddings and head."""
LARGEST_RATE = 3e-3
"""The fit below is of 60M parameters and more; for smaller models it rises beyond what trains well (docs/log.md)."""
DERIVED = ("model.layers", "model.width", "model.heads", "tokens", "batch_tokens", "lr")
"""Settings that follow from depth, in the order in which they do."""


class DialShape(Config):
    """Fields that the rules need of a `ModelShape` that is not yet whole; None: not set."""

    model_config = ConfigDict(extra="ignore")
    width: int | None = Field(default=None, ge=1)


class Dial(Config):
    """Fields that the rules need of a `PretrainConfig` that is not yet whole, read as those of any config."""

    model_config = ConfigDict(extra="ignore")
    depth: int = Field(ge=1)
    model: DialShape = DialShape()
    tokens: int | None = Field(default=None, ge=1)
    batch_tokens: int | None = Field(default=None, ge=1)

    def shape(self) -> dict[str, int]:
        """Return values of the `ModelShape` that follow from depth and width."""
        width = self.model.width or WIDTH_A_BLOCK * self.depth
        return {"layers": self.depth, "width": width, "heads": max(1, width // HEAD_WIDTH)}

    def training(self, shape: ModelShape) -> dict[str, float]:
        """Return values of the `PretrainConfig` that follow for a model of ``shape``."""
        tokens = self.tokens or TOKENS_A_PARAMETER * shape.block_parameters
        batch = self.batch_tokens or whole_batch(best_batch(tokens), shape.context)
        return {
            "tokens": math.ceil(tokens / batch) * batch,
            "batch_tokens": batch,
            "lr": rate(shape.block_parameters, tokens, batch),
        }


def fill(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `PretrainConfig`'s raw values, those that follow from ``depth`` added where they are absent.

    Nothing is computed from a raw value: `Dial` reads those that count. Values that cannot be right are left alone, to
    be refused where they stand.
    """
    given = dict(values)
    if given.get("depth") is None:
        return given
    if isinstance(given.get("model"), ModelShape):
        given["model"] = given["model"].model_dump(exclude_unset=True)
    try:
        dial = Dial.model_validate(given)
        given["model"] = {**dial.shape(), **given.get("model", {})}
        shape = ModelShape.model_validate(given["model"])
    except ValidationError:
        return {"tokens": 1, **given}
    return {**dial.training(shape), **given}


def best_batch(tokens: int) -> float:
    """Return tokens of the best batch for a training on ``tokens``: 0.58 D^0.571 (Li et al. 2025, arXiv:2503.04715)."""
    return 0.58 * tokens**0.571


def whole_batch(batch: float, context: int) -> int:
    """Return the power of two nearest ``batch``, or what is nearest to that in whole sequences."""
    return max(1, round(2 ** round(math.log2(batch)) / context)) * context


def rate(parameters: int, tokens: int, batch: int) -> float:
    """Peak learning rate: 1.79 N^-0.713 D^0.307 (Li et al. 2025) at the best batch, and for another one with the
    square root of its size (Malladi et al. 2022, arXiv:2205.10287); at most `LARGEST_RATE`; three digits."""
    best = 1.79 * parameters**-0.713 * tokens**0.307
    return float(f"{min(LARGEST_RATE, best * math.sqrt(batch / best_batch(tokens))):.3g}")


def describe(values: Mapping[str, Any]) -> list[str]:
    """Describe, for a person, what of a `PretrainConfig`'s values follows from depth, and what is set otherwise."""
    if values["depth"] is None:
        return []
    follows, otherwise = [], []
    for key in DERIVED:
        value, rule = look_up(values, key), look_up(fill(without(values, key)), key)
        if value == rule:
            follows.append(f"{key} {value:,}")
        else:
            otherwise.append(f"{key} {value:,} ({rule:,} by the rule)")
    lines = [f"depth {values['depth']}: {', '.join(follows)}"]
    return lines + ([f"set otherwise: {', '.join(otherwise)}"] if otherwise else [])


def without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Copy the values less one."""
    name, _, rest = key.partition(".")
    return {
        one: without(value, rest) if one == name else value
        for one, value in values.items()
        if rest or one != name
    }


def look_up(values: Mapping[str, Any], key: str) -> Any:
    """Return ``values["model"]["width"]`` for ``model.width``."""
    for section in key.split("."):
        values = values[section]
    return values
