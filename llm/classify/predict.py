"""Labels of texts by a model: read at the last token of each. Shape suffixes: N texts, L labels, T positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_pipeline.core.errors import UserError
from data_pipeline.train_tokenizer.tokenizer import load_tokenizer
from llm.classify.labels import FILE, read_labels
from llm.model.layouts import load_folder
from llm.model.transformer import Transformer, load_model
from llm.training.resolved import MICRO_BATCH_TOKENS

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Classifier:
    """A model that gives texts labels."""

    model: Transformer
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    several: bool

    @classmethod
    def of(cls, model: Path, tokenizer: Path) -> Classifier:
        """Load a model from a folder of `transformers`' or of a stage, and the tokenizer of another or the same.

        Raises:
            UserError: there is none that gives labels.
        """
        if not (model / FILE).is_file():
            raise UserError(f"{model} holds no model that gives labels: the stage classify makes one")
        sealed = (model / "model.json").exists()
        loaded = load_model(model, labels=True) if sealed else load_folder(model, labels=True)
        names, several = read_labels(model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(
            model=loaded.to(device), tokenizer=load_tokenizer(tokenizer), labels=names, several=several
        )

    def tokens(self, text: str, room: int | None = None) -> list[int]:
        """Return a text's tokens, as many as are read.

        Raises:
            UserError: it has none, or is no text.
        """
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError("the text is not UTF-8, or holds half of a surrogate pair")
        ids: list[int] = self.tokenizer.encode(text).ids[: room or self.model.config.context]
        if not ids:
            raise UserError("the text has no tokens")
        return ids

    @torch.inference_mode()
    def logits(self, texts: Sequence[Sequence[int]]) -> Floats:
        """Return the logits of texts, given as tokens, ``(N, L)``; those of like length are computed together."""
        found = np.zeros((len(texts), len(self.labels)))
        device = self.model.embed_tokens.weight.device
        room = MICRO_BATCH_TOKENS["cuda" if device.type == "cuda" else "cpu"]
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        while order:
            longest = len(texts[order[-1]])
            batch, order = order[-max(1, room // longest) :], order[: -max(1, room // longest)]
            ids = [[*texts[number], *[0] * (longest - len(texts[number]))] for number in batch]
            logits_BTL = self.model(torch.tensor(ids, device=device)).double().cpu()
            for row, number in zip(logits_BTL, batch, strict=True):
                found[number] = row[len(texts[number]) - 1].numpy()
        return found

    def probabilities(self, logits_NL: Floats) -> Floats:
        """Return the probability of each label."""
        logits = torch.from_numpy(logits_NL)
        found: Floats = (logits.sigmoid() if self.several else logits.softmax(dim=1)).numpy()
        return found


def chosen(probabilities_NL: Floats, *, several: bool) -> NDArray[np.bool_]:
    """Return which labels are given, ``(N, L)``: the likeliest, or all that are likelier than not."""
    if several:
        return probabilities_NL > 0.5
    best_N = probabilities_NL.argmax(axis=1)
    return np.arange(probabilities_NL.shape[1]) == best_N[:, None]
