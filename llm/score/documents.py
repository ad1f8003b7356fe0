"""Loss of a model on whole documents, document by document.

A document is read from its own start, behind a token that ends documents, in windows of the model's context. They lie
end to end, or ``stride`` tokens apart: then a token has more before it that the model sees, at the cost of reading most
of the text again. Every token is scored once either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llm.data.bits import bits_per_byte
from llm.model.transformer import Transformer

BATCH_TOKENS = 8192
"""Positions evaluated at once. Not a setting: the shape of a batch shows in the last bits of the results."""
Document = tuple[str, NDArray[Any]]
"""Id and tokens."""


@dataclass(frozen=True)
class Window:
    """Tokens that are read at once."""

    owner: int
    """Index of the document."""
    tokens: NDArray[np.int64]
    counted: int
    """How many of the last tokens are scored."""


def score_documents(
    model: Transformer,
    documents: Sequence[Document],
    *,
    sizes: NDArray[np.int32],
    end: int,
    stride: int | None = None,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Return one row a document: its targets, bytes, and loss in nats over all targets and over those that are text.

    Args:
        sizes: bytes that each token stands for.
        end: the token that stands before each document.
        progress: called with the tokens scored and those there are.
    """
    windows = cut(documents, end, model.config.context, stride)
    losses, text_losses = np.zeros(len(documents)), np.zeros(len(documents))
    total, done = sum(len(tokens) for _, tokens in documents), 0
    for batch in batched(windows):
        owners = np.array([window.owner for window in batch])
        window_loss, targets = window_losses(model, batch)
        np.add.at(losses, owners, window_loss.sum(axis=1))
        np.add.at(text_losses, owners, np.where(sizes[targets] > 0, window_loss, 0.0).sum(axis=1))
        done += sum(window.counted for window in batch)
        progress(done, total)
    rows = []
    for (name, tokens), loss, text_loss in zip(documents, losses.tolist(), text_losses.tolist(), strict=True):
        size = int(sizes[tokens].sum())
        rows.append(
            {
                "id": name,
                "source": name.split("/", 1)[0],
                "tokens": len(tokens),
                "bytes": size,
                "nats": loss,
                "text_nats": text_loss,
                "bits_per_byte": bits_per_byte(text_loss, size) if size else None,
            }
        )
    return rows


def cut(documents: Sequence[Document], end: int, context: int, stride: int | None = None) -> list[Window]:
    """Return windows of up to ``context + 1`` tokens, the longest first, in which each token is scored once.

    A document's first window begins with ``end`` and scores all that follows. Each later one scores the next ``stride``
    tokens, behind as many others as have room; without a stride as many as there is room for, behind one other.
    """
    windows = []
    for index, (_, tokens) in enumerate(documents):
        sequence = np.concatenate(([end], tokens.astype(np.int64)))
        done = 1
        while done < len(sequence):
            until = min(len(sequence), done + (context if done == 1 else stride or context))
            start = max(0, until - context - 1) if stride else done - 1
            windows.append(Window(index, sequence[start:until], until - done))
            done = until
    return sorted(windows, key=lambda window: -len(window.tokens))


def batched(windows: Sequence[Window]) -> Iterator[Sequence[Window]]:
    """Yield slices of ``windows`` that make at most `BATCH_TOKENS` positions when padded to their first's length."""
    start = 0
    while start < len(windows):
        count = max(1, BATCH_TOKENS // len(windows[start].tokens))
        yield windows[start : start + count]
        start += count


@torch.inference_mode()
def window_losses(
    model: Transformer, windows: Sequence[Window]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return losses, in nats, and targets ``(B, T)`` of windows, the longest first; what is not scored has loss 0.

    Padding stands behind a window's tokens, where causal attention does not look.
    """
    lengths = np.array([len(window.tokens) - 1 for window in windows])
    counted = np.array([window.counted for window in windows])
    rows = np.zeros((len(windows), int(lengths[0]) + 1), np.int64)
    for row, window in zip(rows, windows, strict=True):
        row[: len(window.tokens)] = window.tokens
    device = next(model.parameters()).device
    tokens_BT, targets_BT = (torch.from_numpy(ids).to(device) for ids in (rows[:, :-1], rows[:, 1:]))
    losses = model(tokens_BT, targets_BT, reduction="none").double().cpu().numpy()
    places = np.arange(rows.shape[1] - 1)
    scored = (places < lengths[:, None]) & (places >= (lengths - counted)[:, None])
    return np.where(scored, losses, 0.0), rows[:, 1:]
