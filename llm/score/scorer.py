"""Log-probabilities of sequences under a model.

The options of an item begin alike. What they have in common is computed once: they lie one after the other in one row,
each of which sees the beginning and itself. Rows of about the same length go through the model together.
Shape suffixes: B rows, T positions, N targets, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llm.kernels.attention import Attend, Documents
from llm.model.foreign import ForeignModel, Scorable
from llm.model.transformer import Transformer
from llm.score.encode import Option, common
from llm.score.replicas import Replicas

BATCH_TOKENS = 4096
"""Positions scored at once. Not a setting: the shape of a batch shows in the last bits of the results."""
HEAD_ROWS = 512
"""Targets whose logits over the vocabulary are held at once."""


@dataclass(frozen=True)
class Scored:
    """An option under a model."""

    nats: NDArray[np.float64]
    """Minus the log-probability of each token that counts."""
    greedy: bool
    """Whether each of these tokens is the likeliest one."""


class Row:
    """The options of one item, laid into one row of positions."""

    def __init__(self, options: Sequence[Option]) -> None:
        self.shared = common([option.tokens for option in options])
        branches = [option.tokens[self.shared :] for option in options]
        self.tokens = options[0].tokens[: self.shared] + [token for branch in branches for token in branch]
        ends = np.cumsum([self.shared, *map(len, branches)])
        self.branch = np.repeat(np.arange(len(options) + 1), [self.shared, *map(len, branches)])
        """Number of the option that a position belongs to, from 1; 0: it belongs to all."""
        self.positions = np.concatenate(
            [np.arange(self.shared), *(self.shared + np.arange(len(branch)) for branch in branches)]
        )
        self.sources, self.targets, self.sizes = [], [], []
        """Positions that predict, what they should, and how many of them there are for each option."""
        for option, start in zip(options, ends[:-1].tolist(), strict=True):
            where = [*range(self.shared), *range(start, start + len(option.tokens) - self.shared)]
            self.sources += where[option.start - 1 : -1]
            self.targets += option.tokens[option.start :]
            self.sizes.append(len(option.tokens) - option.start)


def score(replicas: Replicas, items: Sequence[Sequence[Option]]) -> Iterator[tuple[int, list[Scored]]]:
    """Yield each item's number and its options' scores, the longest items first."""
    if isinstance(replicas.models[0], ForeignModel):
        yield from enumerate(replicas.map(score_apart, items))
        return
    rows = [Row(options) for options in items]
    batches = list(batched(rows))
    found = replicas.map(score_rows, [[rows[number] for number in numbers] for numbers in batches])
    for numbers, scored in zip(batches, found, strict=True):
        yield from zip(numbers, scored, strict=True)


def batched(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Yield the numbers of rows that make at most `BATCH_TOKENS` positions when padded to their first's length."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].tokens))
    start = 0
    while start < len(order):
        count = max(1, BATCH_TOKENS // len(rows[order[start]].tokens))
        yield order[start : start + count]
        start += count


@torch.inference_mode()
def score_rows(model: Scorable, rows: Sequence[Row]) -> list[list[Scored]]:
    """Score rows together."""
    assert isinstance(model, Transformer), "a foreign model's options are scored apart"
    longest = len(rows[0].tokens)
    device = next(model.parameters()).device

    def padded(name: str, fill: int) -> Tensor:
        table = np.full((len(rows), longest), fill, np.int64)
        for line, row in zip(table, rows, strict=True):
            values = getattr(row, name)
            line[: len(values)] = values
        return torch.from_numpy(table).to(device)

    branch_BT = padded("branch", -1)
    attend = attend_within(branch_BT)
    x_BTD, rope = model.embed(padded("tokens", 0), padded("positions", 0))
    for layer in model.layers:
        x_BTD = layer(x_BTD, rope, attend, None)
    sources = torch.tensor(
        [place + number * longest for number, row in enumerate(rows) for place in row.sources]
    )
    targets_N = torch.tensor([token for row in rows for token in row.targets], device=device)
    nats_N, likeliest_N = judged(model, x_BTD.flatten(0, 1)[sources.to(device)], targets_N)
    right_N = (likeliest_N == targets_N).cpu().numpy()
    found, start = [], 0
    for row in rows:
        scored = []
        for size in row.sizes:
            scored.append(Scored(nats_N[start : start + size], bool(right_N[start : start + size].all())))
            start += size
        found.append(scored)
    return found


@torch.inference_mode()
def score_apart(model: Scorable, options: Sequence[Option]) -> list[Scored]:
    """Score the options of an item, each whole and by itself."""
    assert isinstance(model, ForeignModel), "ours scores rows of them together"
    device = next(model.parameters()).device
    found = []
    for option in options:
        logits_TV = model.logits(torch.tensor([option.tokens], device=device))[0, option.start - 1 : -1]
        targets_T = torch.tensor(option.tokens[option.start :], device=device)
        nats_T = F.cross_entropy(logits_TV, targets_T, reduction="none").double()
        greedy = bool((logits_TV.argmax(dim=-1) == targets_T).all())
        found.append(Scored(nats_T.cpu().numpy(), greedy))
    return found


def attend_within(branch_BT: Tensor) -> Attend:
    """Make attention in which a position sees those up to its own that belong to all or to its own option."""
    causal_TT = torch.ones(
        branch_BT.shape[1], branch_BT.shape[1], dtype=torch.bool, device=branch_BT.device
    ).tril()
    same_BTT = branch_BT[:, :, None] == branch_BT[:, None, :]
    mask_B1TT = (causal_TT & (same_BTT | (branch_BT == 0)[:, None, :]))[:, None]

    def attend(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, _: Documents | None) -> Tensor:
        mixed_BHTE = F.scaled_dot_product_attention(
            q_BTHE.transpose(1, 2),
            k_BTKE.transpose(1, 2),
            v_BTKE.transpose(1, 2),
            attn_mask=mask_B1TT,
            enable_gqa=q_BTHE.shape[2] != k_BTKE.shape[2],
        )
        return mixed_BHTE.transpose(1, 2)

    return attend


def judged(model: Transformer, x_ND: Tensor, targets_N: Tensor) -> tuple[NDArray[np.float64], Tensor]:
    """Return minus the log-probability of each target, and the likeliest token in its place."""
    nats, likeliest = [], []
    for x_RD, targets_R in zip(x_ND.split(HEAD_ROWS), targets_N.split(HEAD_ROWS), strict=True):
        logits_RV = model.lm_head(model.norm(x_RD))
        nats.append(F.cross_entropy(logits_RV, targets_R, reduction="none").double())
        likeliest.append(logits_RV.argmax(dim=-1))
    return torch.cat(nats).cpu().numpy(), torch.cat(likeliest)
