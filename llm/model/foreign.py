"""Causal models of any architecture that `transformers` has, computed by its own forward pass: slower than ours, and
nothing but scored. Shape suffixes as in `llm.model.transformer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from data_pipeline.core.text import first_line
from llm.model.transformer import Transformer, load_model

UNLIMITED = 2048
"""Tokens that a model reads at once whose config names no limit."""
LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
"""Names of that limit in the configs of `transformers`."""
MAX_LOGITS = 1 << 28
"""Logits that are held at once, at most: 1 GB."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of a model that scoring needs."""

    context: int
    """Tokens that it reads at once, at most."""
    vocab_size: int


class ForeignModel(nn.Module):
    """A causal model in a folder, as `transformers` computes it; fp32."""

    def __init__(self, folder: Path, theirs: Any) -> None:
        super().__init__()
        self.folder = folder
        self.theirs = theirs
        text = theirs.config.get_text_config()
        limit = next(filter(None, (getattr(text, name, None) for name in LIMITS)), UNLIMITED)
        self.config = Sizes(context=int(limit), vocab_size=int(text.vocab_size))

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Compute logits ``(B, T, V)`` of what follows each position. What fills a row up stands behind its tokens."""
        logits_BTV: Tensor = self.theirs(input_ids=tokens_BT, use_cache=False).logits
        return logits_BTV.float()

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, *, reduction: str = "none") -> Tensor:
        """Return the loss ``(B, T)`` of each target, in nats."""
        assert reduction == "none", "a foreign model is not trained"
        rows = max(1, MAX_LOGITS // (tokens_BT.shape[1] * self.config.vocab_size))
        losses = [
            F.cross_entropy(self.logits(tokens_RT).transpose(1, 2), targets_RT, reduction="none")
            for tokens_RT, targets_RT in zip(tokens_BT.split(rows), targets_BT.split(rows), strict=True)
        ]
        return torch.cat(losses)

    def next_logits(self, sequences: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Return logits ``(V,)``, on the CPU, of what follows each sequence, of which all is read anew."""
        device = next(self.parameters()).device
        found = {}
        for number, tokens in sequences.items():
            window_1T = torch.tensor([tokens[-self.config.context :]], device=device)
            found[number] = self.logits(window_1T)[0, -1].cpu()
        return found


Scorable = Transformer | ForeignModel
"""A model that can be scored."""


def load_scorable(folder: Path) -> Scorable:
    """Return the model in a sealed artifact: fp32, in evaluation mode, on the CPU."""
    return load_model(folder) if (folder / "model.json").exists() else load_foreign(folder)


def load_foreign(folder: Path) -> ForeignModel:
    """Return the causal model in a folder: fp32, in evaluation mode, on the CPU. No code that lies there is run.

    Raises:
        UserError: `transformers` has not its architecture, or weights are missing or damaged.
    """
    from transformers import AutoModelForCausalLM

    try:
        theirs, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # each of its classes fails in its own way
        raise UserError(
            f"transformers can't load {folder} as a causal model:\n{' '.join(str(error).split())[:300]}"
        ) from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{folder} lacks weights: {', '.join(missing[:5])}")
    return ForeignModel(folder, theirs.eval())


@torch.inference_mode()
def require_context(model: ForeignModel) -> None:
    """See that a model reads as many tokens at once as its config says.

    Raises:
        UserError: it reads fewer.
    """
    longest = min(model.config.context, MAX_LOGITS // model.config.vocab_size)
    try:
        model.logits(torch.zeros((1, longest), dtype=torch.long))
    except (IndexError, RuntimeError) as error:  # as it looks its positions up
        raise UserError(
            f"{model.folder} holds a model that reads fewer than the {longest:,} tokens that its config.json names:\n"
            f"{first_line(error)}"
        ) from None


@torch.inference_mode()
def require_causal(model: ForeignModel) -> None:
    """See that what a model says of a position does not depend on what follows.

    Raises:
        UserError: it does.
    """
    tokens_2T = torch.tensor([[0, 1, 2, 3], [0, 1, 3, 2]]) % model.config.vocab_size
    one_TV, other_TV = model.logits(tokens_2T)[:, :2]
    if not torch.allclose(one_TV, other_TV, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"{model.folder} holds a model that reads what follows a token, so that its losses mean nothing:\n"
            "llmill scores causal models only"
        )
