"""Losses that trainings make small, and measures of each on held-out rows. A training has one; it says what the model
is asked for (its mean loss, its losses by position, or its logits) and how a step's targets are counted, so that the
mean over micro-batches and ranks is the mean over the step. Shape suffixes: B rows, T positions, V vocabulary, P pairs
of a row, D numbers of conversations, L labels, N pairs or texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from data_pipeline.core.config import Config
from llm.data.bits import bits_per_byte, text_sums
from llm.data.packed import IGNORED, count_targets
from llm.data.sequences import Batch

Outputs = Literal["mean", "none", "logits"]
"""Outputs of a model: its loss over a batch, that of each position ``(B, T)`` in nats, or its logits."""


class NextToken(Config):
    """The cross entropy of the next token, in nats."""

    kind: Literal["next_token"] = "next_token"
    trained_by: ClassVar[Outputs] = "mean"
    measured_by: ClassVar[Outputs] = "none"

    def units(self, rows_3RT: NDArray[np.int32]) -> NDArray[np.float64]:
        """Count each row's targets."""
        return count_targets(rows_3RT)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean over a batch."""
        return outputs

    def sums(self, outputs: Tensor, batch: Batch, valid_B1: Tensor, token_bytes_V: Tensor) -> Tensor:
        """Return what has to be added up over the batches, in float64, of the rows that are ``valid``."""
        weight_BT = valid_B1 if batch.counted_BT is None else valid_B1 & batch.counted_BT
        return text_sums(outputs, token_bytes_V[batch.targets_BT], weight_BT)

    def facts(self, sums: Sequence[float]) -> dict[str, float]:
        """Return what is measured, from the sums."""
        nats, count, text_nats, text_bytes = sums
        return {"loss": nats / count, "bits_per_byte": bits_per_byte(text_nats, text_bytes)}


class Preferences(Config):
    """The loss over pairs of a chosen and a rejected answer, whose rows also have the nats of each target under the
    model that training starts from, the reference. With m by how much more likely, as against the reference, the chosen
    one is made than the rejected one (a difference of logarithms):

    - "dpo": -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m), e being the label smoothing (Rafailov et al. 2023,
      arXiv:2305.18290; Mitchell 2023);
    - "ipo": (m - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036).
    """

    kind: Literal["preferences"] = "preferences"
    by: Literal["dpo", "ipo"] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    trained_by: ClassVar[Outputs] = "none"
    measured_by: ClassVar[Outputs] = "none"

    def units(self, rows_3RT: NDArray[np.int32]) -> NDArray[np.float64]:
        """Count each row's pairs: even numbers are chosen answers, odd ones rejected, and what fills up comes last."""
        return ((rows_3RT[2].max(axis=1) + 1) // 2).astype(np.float64)

    def log_ratios(self, nats_BT: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logarithms ``(N, 2)`` of how much more likely than to the reference the answers of each pair are,
        chosen and rejected, and the row ``(N,)`` of each pair."""
        assert batch.documents_BT is not None
        assert batch.reference_BT is not None
        pairs_B = (batch.documents_BT.amax(dim=1) + 1) // 2
        most = int(pairs_B.max())
        numbers_BTD = batch.documents_BT[..., None] == torch.arange(2 * most, device=nats_BT.device)
        more_BT = batch.reference_BT - nats_BT
        ratios_BP2 = (more_BT[..., None] * numbers_BTD).sum(dim=1).unflatten(1, (most, 2))
        exists_BP = torch.arange(most, device=nats_BT.device) < pairs_B[:, None]
        return ratios_BP2[exists_BP], exists_BP.nonzero()[:, 0]

    def losses(self, margins_N: Tensor) -> Tensor:
        """Return the loss of pairs with these margins."""
        if self.by == "ipo":
            return (margins_N - 1 / (2 * self.beta)).square()
        logits_N, e = self.beta * margins_N, self.label_smoothing
        return -(1 - e) * F.logsigmoid(logits_N) - e * F.logsigmoid(-logits_N)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean over a batch's pairs."""
        ratios_N2, _ = self.log_ratios(outputs, batch)
        return self.losses(ratios_N2[:, 0] - ratios_N2[:, 1]).mean()

    def sums(self, outputs: Tensor, batch: Batch, valid_B1: Tensor, token_bytes_V: Tensor) -> Tensor:
        """Return what has to be added up over the batches, in float64, of the rows that are ``valid``."""
        ratios_N2, row_N = self.log_ratios(outputs, batch)
        ratios_N2 = ratios_N2[valid_B1[row_N, 0]].double()
        margins_N = ratios_N2[:, 0] - ratios_N2[:, 1]
        right = (margins_N > 0).sum() + (margins_N == 0).sum() / 2
        count = margins_N.new_tensor(float(len(margins_N)))
        return torch.stack([self.losses(margins_N).sum(), count, right, *ratios_N2.sum(dim=0)]).double()

    def facts(self, sums: Sequence[float]) -> dict[str, float]:
        """Return what is measured, from the sums; of pairs without a margin half count as right."""
        loss, count, right, chosen, rejected = sums
        return {
            "loss": loss / count,
            "accuracy": right / count,
            "margin": self.beta * (chosen - rejected) / count,
            "chosen_log_ratio": chosen / count,
            "rejected_log_ratio": rejected / count,
        }


class Labels(Config):
    """The cross entropy of a text's label, in nats, read from the logits at its last token; where a text may have
    several labels (their bits are its target), the mean over the labels of that of having each or not."""

    kind: Literal["labels"] = "labels"
    several: bool = False
    weights: tuple[float, ...] | None = None
    """Weight of the texts of each label; None: alike."""
    trained_by: ClassVar[Outputs] = "logits"
    measured_by: ClassVar[Outputs] = "logits"

    def units(self, rows_3RT: NDArray[np.int32]) -> NDArray[np.float64]:
        """Sum the weights of each row's texts."""
        if self.weights is None:
            return count_targets(rows_3RT)
        weights = np.asarray([*self.weights, 0.0])
        return weights[np.where(rows_3RT[1] == IGNORED, len(weights) - 1, rows_3RT[1])].sum(axis=1)

    def losses(self, logits_NL: Tensor, targets_N: Tensor) -> Tensor:
        """Return the loss of each text, before its weight."""
        if not self.several:
            return F.cross_entropy(logits_NL, targets_N, reduction="none")
        bits_L = torch.arange(logits_NL.shape[1], device=targets_N.device)
        has_NL = (targets_N[:, None] >> bits_L & 1).to(logits_NL.dtype)
        return F.binary_cross_entropy_with_logits(logits_NL, has_NL, reduction="none").mean(dim=1)

    def weight(self, targets_N: Tensor) -> Tensor:
        """Return the weight of each text."""
        if self.weights is None:
            return torch.ones(len(targets_N), device=targets_N.device)
        return torch.tensor(self.weights, device=targets_N.device)[targets_N]

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the weighed mean over a batch's texts."""
        targets_N, weight_N = (
            batch.targets_BT[batch.counted_BT],
            self.weight(batch.targets_BT[batch.counted_BT]),
        )
        losses_N = self.losses(outputs[batch.counted_BT], targets_N)
        return (losses_N * weight_N).sum() / weight_N.sum()

    def sums(self, outputs: Tensor, batch: Batch, valid_B1: Tensor, token_bytes_V: Tensor) -> Tensor:
        """Return what has to be added up over the batches, in float64, of the rows that are ``valid``."""
        assert batch.counted_BT is not None
        counted_BT = batch.counted_BT & valid_B1
        logits_NL, targets_N = outputs[counted_BT].double(), batch.targets_BT[counted_BT]
        if self.several:
            bits_L = torch.arange(logits_NL.shape[1], device=targets_N.device)
            right_N = ((logits_NL > 0) == (targets_N[:, None] >> bits_L & 1).bool()).all(dim=1)
        else:
            right_N = logits_NL.argmax(dim=1) == targets_N
        losses_N = self.losses(logits_NL, targets_N)
        return torch.stack(
            [losses_N.sum(), losses_N.new_tensor(float(len(losses_N))), right_N.sum().double()]
        )

    def facts(self, sums: Sequence[float]) -> dict[str, float]:
        """Return what is measured, from the sums: the loss of all texts alike, and the share whose labels are right."""
        loss, count, right = sums
        return {"loss": loss / count, "accuracy": right / count}


Objective = Annotated[NextToken | Preferences | Labels, Field(discriminator="kind")]
NEXT_TOKEN: Objective = NextToken()
"""The loss where none is named."""
