"""All the state of a model in training, as named pieces of flat fp32 tensors: whatever way ZeRO spreads parameters and
optimizer over the ranks, each rank holds runs of elements of some parameters (its value, and what the optimizer
keeps for each element), and these runs are what it saves and what it asks for. So no rank ever gathers a whole
model to save it, and a model spread in one way is read into any other. Pieces are named ``parameter:kind:start``,
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
from torch import Tensor

from llm.training.tensor_parallel import Splitting

VALUE = "value"


@dataclass(frozen=True)
class Run:
    """Neighbouring elements of a parameter, flattened row by row, that lie together in a flat tensor."""

    name: str
    start: int
    """In the parameter."""
    at: int
    """In the flat tensor."""
    count: int

    def share(self, rank: int, ranks: int) -> Run:
        """One of ``ranks`` about equal parts of it."""
        first, last = self.count * rank // ranks, self.count * (rank + 1) // ranks
        return Run(name=self.name, start=self.start + first, at=self.at + first, count=last - first)


@dataclass(frozen=True)
class Flat:
    """A tensor that the optimizer steps, what it keeps for it, and the runs of parameters that lie in it."""

    tensor: Tensor
    kept: dict[str, Any]
    runs: list[Run]

    def by_element(self) -> dict[str, Tensor]:
        """Value and state that have a number for each element, as vectors that share memory with them."""
        kept = {kind: held for kind, held in self.kept.items() if torch.is_tensor(held) and held.ndim}
        return {kind: held.detach().view(-1) for kind, held in {VALUE: self.tensor, **kept}.items()}

    def once(self) -> dict[str, Tensor]:
        """State that is one number."""
        kept = {kind: torch.as_tensor(held) for kind, held in self.kept.items()}
        return {kind: held for kind, held in kept.items() if not held.ndim}


def snapshot(flats: Iterable[Flat], split: Splitting, *, replicated: bool) -> dict[str, Tensor]:
    """Copies, in host memory, of the pieces that are this rank's to save: together the ranks save each once.

    ``replicated`` says that all ranks hold the same.
    """
    pieces: dict[str, Tensor] = {}
    for flat in flats:
        for whole in flat.runs:
            if not split.saves(whole.name):
                continue
            run = whole.share(dist.get_rank(), dist.get_world_size()) if replicated else whole
            if not run.count:
                continue
            for kind, vector in flat.by_element().items():
                piece = vector[run.at : run.at + run.count]
                pieces[f"{run.name}:{kind}:{run.start}"] = piece.to("cpu", copy=True)
            for kind, number in flat.once().items():
                pieces[f"{run.name}:{kind}:"] = number.to("cpu", copy=True)
    return pieces


class Pieces:
    """The pieces in a folder's ``*.safetensors``, to be read by parameter, kind and place."""

    def __init__(self, folder: Path) -> None:
        self.runs: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        self.numbers: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, "pt")
            for key in file.keys():  # noqa: SIM118 - no mapping
                name, kind, start = key.rsplit(":", 2)
                if start:
                    count = file.get_slice(key).get_shape()[0]
                    self.runs[name, kind].append((int(start), count, file, key))
                else:
                    self.numbers[name][kind] = file.get_tensor(key)

    def kinds(self, name: str) -> list[str]:
        """List what there is for each element of a parameter."""
        return sorted(kind for parameter, kind in self.runs if parameter == name)

    def fill(self, vector: Tensor, run: Run, kind: str) -> None:
        """Copy the elements of ``run`` to their place in ``vector``."""
        found = 0
        for start, count, file, key in self.runs[run.name, kind]:
            first, last = max(start, run.start), min(start + count, run.start + run.count)
            if first < last:
                at = run.at + first - run.start
                vector[at : at + last - first].copy_(file.get_slice(key)[first - start : last - start])
                found += last - first
        assert found == run.count, f"the checkpoint has {found} of {run.count} elements of {run.name}:{kind}"


@torch.no_grad()
def restore(flats: Iterable[Flat], folder: Path, *, fused: bool) -> None:
    """Read what this rank holds from the pieces in ``folder``, whoever saved them.

    ``fused`` says that the optimizer keeps numbers on the device of what they belong to.
    """
    pieces = Pieces(folder)
    for flat in flats:
        kinds = {kind for run in flat.runs for kind in pieces.kinds(run.name)} - {VALUE}
        for kind in kinds - flat.kept.keys():
            flat.kept[kind] = torch.zeros_like(flat.tensor, requires_grad=False)
        vectors = flat.by_element()
        for run in flat.runs:
            for kind in pieces.kinds(run.name):
                pieces.fill(vectors[kind], run, kind)
            for kind, number in pieces.numbers[run.name].items():
                flat.kept[kind] = number.to(flat.tensor.device) if fused else number.clone()


def size_of(pieces: dict[str, Tensor]) -> int:
    """Bytes of tensors."""
    return sum(piece.nbytes for piece in pieces.values())
