"""Which rule moves which parameter. Embeddings, the head and vectors (norms, biases) go by AdamW (Loshchilov and Hutter
2017, arXiv:1711.05101); hidden matrices by AdamW too, or by Muon (Jordan et al. 2024). Weight decay, decoupled, is on
the matrices that multiply the stream; norms have none, and neither have embeddings, because shrinking them makes the
first layers' gradients grow (OLMo 2, arXiv:2501.00656, 3.2). A tied head is the embedding, so it does not decay.

One optimizer does both, the same under every ZeRO stage: ours, because DeepSpeed's Muon clips the updates where ZeRO
is on (docs/log.md). State is keyed plainly: step, exp_avg, exp_avg_sq; step, momentum_buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from llm.training.muon import ShardLayout, orthogonalise_all

if TYPE_CHECKING:
    from llm.training.norms import Meter
    from llm.training.resolved import OptimizerSettings

KINDS = ("matrices", "embeddings", "head", "vectors")
"""Kinds of parameters."""

GATHERED_NUMBERS = 1 << 27
"""Numbers in a group of Muon's matrices, which ZeRO gathers whole on each rank: this times 4 bytes, twice."""


class Optimizer(torch.optim.Optimizer):
    """AdamW and Muon, over groups from `parameter_groups`.

    A parameter is whole or, where ZeRO spreads a group over the ranks, a flat tensor whose content is in
    `layouts`. For Muon, `step` is a collective.
    """

    def __init__(
        self, groups: list[dict[str, Any]], settings: OptimizerSettings, products: torch.dtype = torch.float32
    ) -> None:
        self.products = products
        """Type in which Muon computes products."""
        self.cautious = settings.cautious_decay
        self.layouts: dict[int, ShardLayout] = {}
        """Content of flat tensors, by their id."""
        self.meter: Meter | None = None
        """When not None, measures what a step does."""
        super().__init__(groups, {"betas": settings.betas, "eps": settings.eps, "fused": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not moving:
                continue
            before = [parameter.clone() for parameter in moving] if self.meter else []
            (self.muon if group["rule"] == "muon" else self.adamw)(group, moving)
            if self.meter:
                self.meter.add(moving, before)

    def adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Take one step by torch's fused kernel, which needs no compiler on any device."""
        states = [self.state_of(parameter, "exp_avg", "exp_avg_sq") for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Take one step: m = b m + (1 - b) g; the parameter loses lr * 0.2 sqrt(max(R, C)) * polar(b m + (1 - b) g).

        The factor gives steps the root mean square 0.2, about that of AdamW's, whatever the shape: so one rate and
        one weight decay serve both (Liu et al. 2025, arXiv:2502.16982, 2.2).
        """
        directions = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state_of(parameter, "momentum_buffer")
            state["step"] += 1
            state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
            directions.append(parameter.grad.lerp(state["momentum_buffer"], group["momentum"]))
        for parameter, update in zip(parameters, self.polar(parameters, directions), strict=True):
            if self.cautious:
                parameter.mul_(1 - group["lr"] * group["weight_decay"] * (parameter * update > 0))
            else:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(update, alpha=group["lr"])

    def polar(self, parameters: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
        """Return the scaled polar factors of ``directions``, which are whole matrices or flat shards of them."""
        layouts = [self.layouts.get(id(parameter)) for parameter in parameters]
        matrices: list[Tensor] = []
        for direction, layout in zip(directions, layouts, strict=True):
            matrices += layout.whole(direction) if layout else [direction]
        assert all(matrix.ndim == 2 for matrix in matrices), "Muon got a tensor that is no matrix"
        factors = orthogonalise_all(matrices, self.products)
        scaled = (
            factor.to(matrix.dtype) * (0.2 * math.sqrt(max(matrix.shape)))
            for factor, matrix in zip(factors, matrices, strict=True)
        )
        return [
            layout.mine([next(scaled) for _ in layout.shapes], direction) if layout else next(scaled)
            for direction, layout in zip(directions, layouts, strict=True)
        ]

    def state_of(self, parameter: Tensor, *names: str) -> dict[str, Tensor]:
        """Return a parameter's state: a count of steps, and the tensors ``names``, zero at first."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in names:
                state[name] = torch.zeros_like(parameter)
        return state


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Return the groups of `Optimizer`: each parameter in one of them, with its rule, peak rate and weight decay.

    Each has "params", "kind" (of `KINDS`), "rule" ("adamw" or "muon"), "peak_lr", "lr", "weight_decay", "momentum".
    """
    groups = []
    for kind, parameters in by_kind(model).items():
        rule = settings.kind if kind == "matrices" else "adamw"
        lr = settings.peak_lr(kind)
        decay = settings.weight_decay if kind in ("matrices", "head") else 0.0
        for members in grouped(parameters, GATHERED_NUMBERS) if rule == "muon" else [parameters]:
            fields = {"kind": kind, "rule": rule, "peak_lr": lr, "lr": lr, "weight_decay": decay}
            groups.append({"params": members, **fields, "momentum": settings.momentum})
    require_each_once(model, groups)
    return groups


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """List the parameters that are trained, by name: all, or of a model with adapters only these."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def by_kind(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters that are trained by kind; a kind without any is left out."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in KINDS}
    for name, parameter in trained(model):
        if id(parameter) in embeddings:
            kinds["embeddings"].append(parameter)
        elif name == "lm_head.weight":
            kinds["head"].append(parameter)
        else:
            kinds["matrices" if parameter.ndim == 2 else "vectors"].append(parameter)
    return {kind: parameters for kind, parameters in kinds.items() if parameters}


def grouped(parameters: list[nn.Parameter], numbers: int) -> Iterator[list[nn.Parameter]]:
    """Yield ``parameters`` in order, in groups of at most ``numbers`` numbers (or of one parameter)."""
    group: list[nn.Parameter] = []
    for parameter in parameters:
        if group and sum(other.numel() for other in group) + parameter.numel() > numbers:
            yield group
            group = []
        group.append(parameter)
    yield group


def require_each_once(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Assert that each parameter that is trained is in one group, and that Muon's are matrices."""
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for _, parameter in trained(model))
    for group in groups:
        assert group["rule"] != "muon" or all(parameter.ndim == 2 for parameter in group["params"])
