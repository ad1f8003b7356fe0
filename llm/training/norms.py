"""L2 norms of gradients, updates and weights in one step. They are measured while the optimizer takes it, because only
then a rank has at hand, at every ZeRO stage, the gradient of just those slices of parameters that it moves; the squares
of slices add up to those of parameters, layers and kinds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.training.state import Flat
from llm.training.tensor_parallel import Splitting


@dataclass(frozen=True)
class Norms:
    """L2 norms over all elements of one or several parameters."""

    grad: float
    """Norm of the gradient, before clipping."""
    update: float
    """Norm of how far the step moved the weights, weight decay included."""
    weight: float
    """Norm of the weights after it."""

    @property
    def update_ratio(self) -> float:
        """The update over the weights; 0 where these are all 0."""
        return self.update / self.weight if self.weight else 0.0


class Meter:
    """Sums of squares over the slices that a rank holds, by parameter."""

    def __init__(
        self, names: Iterable[str], flats: Iterable[Flat], split: Splitting, device: torch.device
    ) -> None:
        """``names`` of all parameters in an order that all ranks share; ``device`` of the ranks' collectives."""
        self.names = list(names)
        rows = {split.own_name(name): row for row, name in enumerate(self.names)}
        self.slices = {
            id(flat.tensor): [
                (rows[one.name], one.at, one.count) for one in flat.slices if split.saves(one.name)
            ]
            for flat in flats
        }
        """Row, start and size of each slice in a tensor that the optimizer steps, by its id; none that is another's to
        count."""
        self.squares_P3 = torch.zeros(len(self.names), 3, dtype=torch.float64, device=device)

    def reset(self) -> Meter:
        """Begin a step."""
        self.squares_P3.zero_()
        return self

    def add(self, parameters: list[Tensor], before: list[Tensor]) -> None:
        """Add tensors that were just stepped; ``before`` is what they were, and is used up."""
        torch._foreach_sub_(before, parameters)
        rows: list[int] = []
        slices: tuple[list[Tensor], ...] = ([], [], [])
        for parameter, moved in zip(parameters, before, strict=True):
            assert parameter.grad is not None
            flats = [tensor.detach().reshape(-1) for tensor in (parameter.grad, moved, parameter)]
            for row, at, count in self.slices[id(parameter)]:
                rows.append(row)
                for found, flat in zip(slices, flats, strict=True):
                    found.append(flat[at : at + count])
        if rows:
            squares_3N = torch.stack(
                [torch.stack(torch._foreach_norm(one)).double().square() for one in slices]
            )
            device = self.squares_P3.device
            self.squares_P3.index_add_(0, torch.tensor(rows, device=device), squares_3N.T.to(device))


def norms_by(
    labels: Mapping[str, str], squares: Mapping[str, Sequence[float]], clipped: float
) -> dict[str, Norms]:
    """Return the norms over all parameters that have the same of ``labels``, in order of the parameters.

    ``squares`` are a parameter's three of `Meter`, summed over the ranks; ``clipped`` is the factor by which clipping
    had scaled the gradient.
    """
    sums: dict[str, list[float]] = {}
    for name, ours in squares.items():
        sums[labels[name]] = [
            one + other for one, other in zip(sums.get(labels[name], (0, 0, 0)), ours, strict=True)
        ]
    return {
        name: Norms(math.sqrt(grad) / clipped, math.sqrt(update), math.sqrt(weight))
        for name, (grad, update, weight) in sums.items()
    }


def layer_of(parameter: str) -> str:
    """Return the layer of a parameter: ``embedding``, ``block_00`` and so on, ``final_norm`` or ``head``."""
    first, number, *_ = parameter.split(".")
    if first == "layers":
        return f"block_{int(number):02d}"
    return {"norm": "final_norm", "lm_head": "head"}.get(first, "embedding")
