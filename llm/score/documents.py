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
from llm.model.foreign import Scorable
from llm.score.replicas import Replicas

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
    first: int
    """Place of the first of these in the document."""


def score_documents(
    replicas: Replicas,
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
    found = token_nats(replicas, documents, end=end, stride=stride, progress=progress)
    rows = []
    for (name, tokens), nats in zip(documents, found, strict=True):
        size, text_loss = int(sizes[tokens].sum()), text_nats(nats, sizes[tokens])
        rows.append(
            {
                "id": name,
                "source": name.split("/", 1)[0],
                "tokens": len(tokens),
                "bytes": size,
                "nats": float(nats.sum(dtype=np.float64)),
                "text_nats": text_loss,
                "bits_per_byte": bits_per_byte(text_loss, size) if size else None,
            }
        )
    return rows


def token_nats(
    replicas: Replicas,
    documents: Sequence[Document],
    *,
    end: int,
    stride: int | None = None,
    progress: Callable[[int, int], None],
) -> list[NDArray[np.float32]]:
    """Return the loss of each document's tokens, in nats, as the model has it; arguments as of `score_documents`."""
    found = [np.zeros(len(tokens), np.float32) for _, tokens in documents]
    total, done = sum(map(len, found)), 0
    batches = list(batched(cut(documents, end, replicas.context, stride)))
    for batch, of_batch in zip(batches, replicas.map(window_losses, batches), strict=True):
        for window, losses in zip(batch, of_batch, strict=True):
            last = len(window.tokens) - 1
            until = window.first + window.counted
            found[window.owner][window.first : until] = losses[last - window.counted : last]
        done += sum(window.counted for window in batch)
        progress(done, total)
    return found


def text_nats(nats: NDArray[np.float32], sizes: NDArray[np.int32]) -> float:
    """Sum the loss of the tokens that are text: those that stand for bytes."""
    return float(nats[sizes > 0].sum(dtype=np.float64))


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
            windows.append(Window(index, sequence[start:until], counted=until - done, first=done - 1))
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
def window_losses(model: Scorable, windows: Sequence[Window]) -> NDArray[np.float32]:
    """Return the losses ``(B, T)``, in nats, of the windows' tokens but the first of each; the longest window first.

    Padding stands behind a window's tokens, where causal attention does not look; its losses mean nothing.
    """
    rows = np.zeros((len(windows), len(windows[0].tokens)), np.int64)
    for row, window in zip(rows, windows, strict=True):
        row[: len(window.tokens)] = window.tokens
    device = next(model.parameters()).device
    tokens_BT, targets_BT = (torch.from_numpy(ids).to(device) for ids in (rows[:, :-1], rows[:, 1:]))
    losses: NDArray[np.float32] = model(tokens_BT, targets_BT, reduction="none").float().cpu().numpy()
    return losses
