"""AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) in torch's fused form, which needs no compiler on any
device, and the rule for which parameters decay: matrices that multiply the stream do; norms do not, and neither
do embeddings, because shrinking them makes the first layers' gradients grow (OLMo 2, arXiv:2501.00656, 3.2).
A tied head is the embedding, so it does not decay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from llm.pretrain import PretrainConfig


def adamw(model: nn.Module, config: PretrainConfig) -> torch.optim.AdamW:
    """The optimizer over ``model``'s parameters. The learning rate is set before each step by the loop."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: what decays and what does not."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for parameter in model.parameters():
        decays = parameter.ndim >= 2 and id(parameter) not in embeddings
        (decay if decays else keep).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
