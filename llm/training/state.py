"""All the state of a model in training, as named slices of flat fp32 tensors: whatever way ZeRO spreads parameters and
optimizer over the ranks, each rank holds slices of some parameters (its value, and what the optimizer
keeps for each element), and these slices are what it saves and what it asks for. So no rank ever gathers a whole
model to save it, and a model spread in one way is read into any other. Slices are named ``parameter:kind:start``,
kind being ``value`` or the optimizer's own word; what it keeps once a parameter (a count of steps) has no start.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from llm.training.tensor_parallel import Splitting

VALUE = "value"


@dataclass(frozen=True)
class Slice:
    """Neighbouring elements of a parameter, flattened row by row, that lie together in a flat tensor."""

    name: str
    start: int
    """In the parameter."""
    at: int
    """In the flat tensor."""
    count: int

    def of_rank(self, rank: int, ranks: int) -> Slice:
        """Return one of ``ranks`` about equal slices of it."""
        first, last = self.count * rank // ranks, self.count * (rank + 1) // ranks
        return Slice(name=self.name, start=self.start + first, at=self.at + first, count=last - first)


@dataclass(frozen=True)
class Flat:
    """A tensor that the optimizer steps, what it keeps for it, and the slices of parameters that lie in it."""

    tensor: Tensor
    kept: dict[str, Any]
    slices: list[Slice]

    def by_element(self) -> dict[str, Tensor]:
        """Return value and state that have a number for each element, as flat views of them."""
        kept = {kind: held for kind, held in self.kept.items() if torch.is_tensor(held) and held.ndim}
        return {kind: held.detach().view(-1) for kind, held in {VALUE: self.tensor, **kept}.items()}

    def once(self) -> dict[str, Tensor]:
        """Return state that is one number."""
        kept = {kind: torch.as_tensor(held) for kind, held in self.kept.items()}
        return {kind: held for kind, held in kept.items() if not held.ndim}


def snapshot(flats: Iterable[Flat], split: Splitting, *, replicated: bool) -> dict[str, Tensor]:
    """Copy to host memory the slices that are this rank's to save: together the ranks save each once.

    ``replicated``: all ranks hold the same.
    """
    slices: dict[str, Tensor] = {}
    for flat in flats:
        for whole in flat.slices:
            if not split.saves(whole.name):
                continue
            mine = whole.of_rank(dist.get_rank(), dist.get_world_size()) if replicated else whole
            if not mine.count:
                continue
            for kind, vector in flat.by_element().items():
                elements = vector[mine.at : mine.at + mine.count]
                slices[f"{mine.name}:{kind}:{mine.start}"] = elements.to("cpu", copy=True)
            for kind, number in flat.once().items():
                slices[f"{mine.name}:{kind}:"] = number.to("cpu", copy=True)
    return slices


class SavedSlices:
    """The slices in a folder's ``*.safetensors``, to be read by parameter, kind and start."""

    def __init__(self, folder: Path) -> None:
        self.slices: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        self.numbers: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, "pt")
            for key in file.keys():  # noqa: SIM118 - no mapping
                name, kind, start = key.rsplit(":", 2)
                if start:
                    count = file.get_slice(key).get_shape()[0]
                    self.slices[name, kind].append((int(start), count, file, key))
                else:
                    self.numbers[name][kind] = file.get_tensor(key)

    def kinds(self, name: str) -> list[str]:
        """List what there is for each element of a parameter."""
        return sorted(kind for parameter, kind in self.slices if parameter == name)

    def fill(self, vector: Tensor, wanted: Slice, kind: str) -> None:
        """Copy the elements of ``wanted`` to where they lie in ``vector``."""
        found = 0
        for start, count, file, key in self.slices[wanted.name, kind]:
            first, last = max(start, wanted.start), min(start + count, wanted.start + wanted.count)
            if first < last:
                at = wanted.at + first - wanted.start
                vector[at : at + last - first].copy_(file.get_slice(key)[first - start : last - start])
                found += last - first
        assert found == wanted.count, (
            f"the checkpoint has {found} of {wanted.count} elements of {wanted.name}:{kind}"
        )


@torch.no_grad()
def restore(flats: Iterable[Flat], folder: Path, *, fused: bool) -> None:
    """Read what this rank holds from the slices in ``folder``, whoever saved them.

    ``fused``: the optimizer keeps numbers on the device of what they belong to.
    """
    saved = SavedSlices(folder)
    for flat in flats:
        kinds = {kind for held in flat.slices for kind in saved.kinds(held.name)} - {VALUE}
        for kind in kinds - flat.kept.keys():
            flat.kept[kind] = torch.zeros_like(flat.tensor, requires_grad=False)
        vectors = flat.by_element()
        for held in flat.slices:
            for kind in saved.kinds(held.name):
                saved.fill(vectors[kind], held, kind)
            for kind, number in saved.numbers[held.name].items():
                flat.kept[kind] = number.to(flat.tensor.device) if fused else number.clone()


@torch.no_grad()
def read_values(model: nn.Module, folder: Path) -> None:
    """Give a whole model the weights that the slices in ``folder`` hold."""
    saved = SavedSlices(folder)
    for name, parameter in model.named_parameters():
        whole = Slice(name=name, start=0, at=0, count=parameter.numel())
        saved.fill(parameter.view(-1), whole, VALUE)


def size_of(slices: dict[str, Tensor]) -> int:
    """Return the size of tensors in bytes."""
    return sum(elements.nbytes for elements in slices.values())
