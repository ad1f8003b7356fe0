"""Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): groups of neighbouring ranks work on the same sequences,
each with its shard of every layer's matrices, split by heads and by hidden columns. DeepSpeed's AutoTP cuts the
matrices and sums what comes out of each half of a layer. Here is what it has to be given, and what it leaves to be
done: the heads of a rank, the gradients of norms inside attention, and the way back to whole matrices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Layers of which a rank has some outputs: rows of the weight, and of a bias."""
BY_INPUT = ("o_proj", "down_proj")
"""Layers of which a rank has some inputs: columns of the weight. Their bias is whole."""


def split_dimension(name: str) -> int | None:
    """Return the dimension in which a parameter is split, or None for one that each rank has whole."""
    *_, layer, kind = ("", *name.split("."))
    if layer in BY_OUTPUT:
        return 0
    return 1 if layer in BY_INPUT and kind == "weight" else None


def autotp(size: int) -> dict[str, Any]:
    """Return DeepSpeed's settings for ranks that split layers, ``size`` together."""
    rules = [(BY_OUTPUT, "column"), (BY_INPUT, "row")]
    specs = [
        {"patterns": [rf".*\.({'|'.join(layers)})\.weight$"], "partition_type": kind}
        for layers, kind in rules
    ]
    return {"autotp_size": size, "partition_config": {"use_default_specs": False, "layer_specs": specs}}


class Splitting:
    """Groups of ``size`` neighbouring ranks that split the layers; this rank's is number ``index`` in its group."""

    def __init__(self, size: int) -> None:
        ranks = range(dist.get_world_size())
        self.size, self.index = size, dist.get_rank() % size
        groups = [dist.new_group(list(ranks[first : first + size])) for first in ranks[::size]]
        self.group = groups[dist.get_rank() // size]

    def prepare(self, model: nn.Module) -> None:
        """Let ``model``'s attention, before it is split, expect a rank's heads.

        A norm on queries and keys is on every rank but sees only its heads there, so its gradients are summed:
        AutoTP does not, and lets such norms drift apart.
        """
        for name, module in model.named_modules():
            if name.endswith("self_attn"):
                module.heads //= self.size
                module.kv_heads //= self.size
            if self.size > 1 and name.endswith(("q_norm", "k_norm")):
                for parameter in module.parameters():
                    parameter.register_hook(self.sum)

    def sum(self, gradient: Tensor) -> Tensor:
        """Return the sum of ``gradient`` over the group."""
        total = gradient.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def whole(self, name: str, parameter: Tensor) -> Tensor:
        """Gather a parameter of which each rank of the group has its shard. A collective."""
        dimension = split_dimension(name)
        if self.size == 1 or dimension is None:
            return parameter
        shards = [torch.empty_like(parameter) for _ in range(self.size)]
        dist.all_gather(shards, parameter.contiguous(), group=self.group)
        return torch.cat(shards, dim=dimension)

    def own_name(self, name: str) -> str:
        """Return a checkpoint's name for this rank's shard of a parameter."""
        whole = self.size == 1 or split_dimension(name) is None
        return name if whole else f"{name}@{self.index + 1}of{self.size}"

    def saves(self, own_name: str) -> bool:
        """Return whether this rank saves its shard of a parameter of that `own_name`, not the group's first rank."""
        return self.index == 0 or "@" in own_name
