"""Muon's part that needs whole matrices: the nearest (semi-)orthogonal matrix of each momentum (Jordan et al. 2024,
kellerjordan.github.io/posts/muon). Matrices of equal shape are worked on together, and divided among the ranks. ZeRO
keeps shards of matrices, so here is also where they lie in flat tensors and how matrices are made of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

SAFETY = 1.01
"""Factor by which singular values are taken to be larger than they are, against rounding (Amsel et al. 2025, 4.4)."""

POLAR_EXPRESS = tuple(
    (a / SAFETY, b / SAFETY**3, c / SAFETY**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
)
"""Coefficients (a, b, c) of the polynomials a x + b x^3 + c x^5 that, one after the other, bring singular values
nearest to 1 in the fewest products: Amsel et al. 2025, arXiv:2505.16932, algorithm 1."""


def orthogonalise(matrices_NRC: Tensor) -> Tensor:
    """Approximate the polar factor U V' of each matrix U S V': singular values of at least 1/1000 of its Frobenius norm
    come within 0.17 of 1, smaller ones stay smaller.

    ``(N, R, C)`` with R <= C, in the type in which products are computed; matrices of zeros stay zero.
    """
    norms_N11 = matrices_NRC.float().norm(dim=(1, 2), keepdim=True)
    x_NRC = (matrices_NRC / (norms_N11 * SAFETY).clamp_min(1e-30)).to(matrices_NRC.dtype)
    for a, b, c in POLAR_EXPRESS:
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = torch.baddbmm(
            x_NRC, torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c), x_NRC, beta=a
        )
    return x_NRC


def orthogonalise_all(matrices: Sequence[Tensor], kind: torch.dtype) -> list[Tensor]:
    """Return the polar factor of each matrix, computed in ``kind``; the same on all ranks, which divide the work.

    A collective: all ranks call it with matrices of the same shapes.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        groups[min(matrix.shape), max(matrix.shape)].append(index)
    results: list[Tensor] = list(matrices)
    for group in groups.values():
        wide = [matrices[index].to(kind) for index in group]
        stack_NRC = torch.stack([matrix.mT if is_tall(matrix) else matrix for matrix in wide])
        for index, factor in zip(group, divided(stack_NRC), strict=True):
            results[index] = factor.mT if is_tall(matrices[index]) else factor
    return results


def is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def divided(stack_NRC: Tensor) -> Tensor:
    """Run `orthogonalise` with the matrices ``(N, R, C)`` divided among the ranks. A collective."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        return orthogonalise(stack_NRC)
    count = math.ceil(len(stack_NRC) / ranks)
    mine = orthogonalise(stack_NRC[dist.get_rank() * count :][:count])
    padded = mine.new_zeros(count, *stack_NRC.shape[1:])
    padded[: len(mine)] = mine
    return gather(padded).flatten(0, 1)[: len(stack_NRC)]


def gather(local: Tensor) -> Tensor:
    """Gather every rank's ``local``, ``(ranks, *local.shape)``, on the device of collectives and fast products."""
    if torch.cuda.is_available():
        local = local.cuda()  # at home it may be offloaded
    everyone = local.new_empty(dist.get_world_size() * local.numel())
    dist.all_gather_into_tensor(everyone, local.flatten())
    return everyone.view(-1, *local.shape)


class ShardLayout(Protocol):
    """How matrices lie in flat tensors, of which each rank has one."""

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of the matrices, in order."""

    def whole(self, local: Tensor) -> list[Tensor]:
        """Gather the matrices from every rank's flat tensor. A collective."""

    def mine(self, matrices: Sequence[Tensor], local: Tensor) -> Tensor:
        """Return this rank's flat tensor, like ``local``, of the matrices."""


@dataclass(frozen=True)
class Zero12Layout:
    """ZeRO 1 and 2: a group's parameters lie end to end in one tensor, which is cut into equal shards for the ranks."""

    shapes: tuple[torch.Size, ...]
    offsets: tuple[int, ...]

    def whole(self, local: Tensor) -> list[Tensor]:
        flat = gather(local).flatten()
        return [
            flat[offset : offset + shape.numel()].view(shape)
            for shape, offset in zip(self.shapes, self.offsets, strict=True)
        ]

    def mine(self, matrices: Sequence[Tensor], local: Tensor) -> Tensor:
        flat = matrices[0].new_zeros(dist.get_world_size(), local.numel())
        for matrix, offset in zip(matrices, self.offsets, strict=True):
            flat.view(-1)[offset : offset + matrix.numel()] = matrix.flatten()
        return flat[dist.get_rank()].to(local.device)


@dataclass(frozen=True)
class Zero3Layout:
    """ZeRO 3: each parameter is cut into equal shards for the ranks, and a rank's shards lie end to end."""

    shapes: tuple[torch.Size, ...]

    def slices(self) -> list[tuple[int, int]]:
        """Return offset and size of each parameter's shard in a rank's tensor."""
        sizes = [math.ceil(shape.numel() / dist.get_world_size()) for shape in self.shapes]
        return [(sum(sizes[:index]), size) for index, size in enumerate(sizes)]

    def whole(self, local: Tensor) -> list[Tensor]:
        everyone = gather(local)
        return [
            everyone[:, offset : offset + size].flatten()[: shape.numel()].view(shape)
            for shape, (offset, size) in zip(self.shapes, self.slices(), strict=True)
        ]

    def mine(self, matrices: Sequence[Tensor], local: Tensor) -> Tensor:
        flat = matrices[0].new_zeros(local.numel())
        for matrix, (offset, size) in zip(matrices, self.slices(), strict=True):
            missing = size * dist.get_world_size() - matrix.numel()
            padded = F.pad(matrix.flatten(), (0, missing)).view(-1, size)
            flat[offset : offset + size] = padded[dist.get_rank()]
        return flat.to(local.device)
