"""Bits per byte: the loss on text in a unit that does not depend on the tokenizer. Losses (nats) of tokens that stand
for text are summed and divided by the bytes of that text; special tokens (0 bytes) count in the loss but not here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def text_sums(loss_BT: Tensor, bytes_BT: Tensor, weight_BT: Tensor) -> Tensor:
    """Sum [loss, targets, loss of targets that are text, bytes of text] over the targets of weight True, in fp64.

    ``loss_BT`` is the cross entropy of each target (nats), and ``bytes_BT`` its UTF-8 length; ``weight_BT`` broadcasts.
    """
    weight_BT = weight_BT.expand_as(loss_BT)
    loss_BT = loss_BT.double().masked_fill(~weight_BT, 0.0)
    bytes_BT = bytes_BT.masked_fill(~weight_BT, 0)
    text_loss = loss_BT.masked_fill(bytes_BT == 0, 0.0)
    return torch.stack([loss_BT.sum(), weight_BT.sum(), text_loss.sum(), bytes_BT.sum()]).double()


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Convert the loss of a text, in nats, and its bytes to bits a byte."""
    return nats / (math.log(2) * text_bytes)
