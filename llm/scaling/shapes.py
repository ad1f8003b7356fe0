"""Shapes of the models of a ladder: for each budget of FLOPs, sizes around the one that twenty tokens a parameter make
the best (Hoffmann et al. 2022, arXiv:2203.15556), each in the proportions of the recipe's model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from data_pipeline.core.errors import UserError
from llm.model.config import ModelConfig
from llm.pretrain.presets import TOKENS_A_PARAMETER

SPAN = 8.0
"""Parameters of a budget's largest model over those of its smallest."""
MOST_LAYERS = 64
LEAST_SIZES = 3
"""Fewer make no parabola."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model of a ladder."""

    layers: int
    width: int
    heads: int
    kv_heads: int | None
    hidden: int | None
    parameters: int
    """Numbers in matrices: blocks and head."""
    flops_per_token: float

    @property
    def settings(self) -> tuple[str, ...]:
        """Settings of a recipe that give a model this shape."""
        named = {"layers": self.layers, "width": self.width, "heads": self.heads, "kv_heads": self.kv_heads}
        named["hidden"] = self.hidden
        return tuple(f"pretrain.model.{name}={value}" for name, value in named.items() if value is not None)


def matrices(model: ModelConfig) -> int:
    """Count the numbers in a model's matrices: of its blocks and its head."""
    return model.block_parameters + model.width * model.head_rows


def shapes(model: ModelConfig, budget: float, sizes: int) -> list[Shape]:
    """Return models for a budget of FLOPs, the smallest first.

    Args:
        model: whose proportions they have.

    Raises:
        UserError: there are too few that differ.
    """
    middle = math.sqrt(budget / 6 / TOKENS_A_PARAMETER)
    found: dict[int, Shape] = {}
    for place in range(sizes):
        wanted = middle * SPAN ** (place / max(1, sizes - 1) - 0.5)
        shape = nearest(model, wanted)
        found.setdefault(shape.parameters, shape)
    if len(found) < min(sizes, LEAST_SIZES):
        raise UserError(
            f"--flops {budget:.3g}: the models of {middle / math.sqrt(SPAN):,.0f} to {middle * math.sqrt(SPAN):,.0f} "
            "parameters that it asks for are too small to differ:\nraise it, or lower train_tokenizer.vocab_size"
        )
    return [found[one] for one in sorted(found)]


def nearest(model: ModelConfig, wanted: float) -> Shape:
    """Return the shape whose parameters are nearest, and among those alike the one of like proportions."""
    aspect, group = model.width / model.layers, model.heads // model.kv_head_count

    def off(candidate: ModelConfig) -> float:
        size = abs(math.log(matrices(candidate) / wanted))
        return size + abs(math.log(candidate.width / candidate.layers / aspect)) / 2

    candidates = [
        one
        for layers in range(1, MOST_LAYERS + 1)
        for heads in range(group, 4 * layers * max(1, round(aspect / model.head_width)) + 4 * group, group)
        if matrices(one := resized(model, layers, heads)) < 4 * wanted or (layers, heads) == (1, group)
    ]
    best = min(candidates, key=off)
    return Shape(
        layers=best.layers,
        width=best.width,
        heads=best.heads,
        kv_heads=best.kv_heads,
        hidden=best.hidden,
        parameters=matrices(best),
        flops_per_token=best.flops_per_token(),
    )


def resized(model: ModelConfig, layers: int, heads: int) -> ModelConfig:
    """Return a model of other size, with heads of the same width, grouped alike."""
    ratio = None if model.hidden is None else model.hidden / model.width
    width = heads * model.head_width
    return model.model_copy(
        update={
            "layers": layers,
            "heads": heads,
            "width": width,
            "kv_heads": None
            if model.kv_heads is None
            else max(1, heads // (model.heads // model.kv_head_count)),
            "hidden": None if ratio is None else max(1, round(ratio * width)),
        }
    )
