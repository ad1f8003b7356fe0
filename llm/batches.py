"""(seed, step) -> batch, as a pure function over the token shards. All documents of a split lie end to end in one
flat file that every rank maps into memory; it is cut into windows of ``context + 1`` tokens, and training reads
the windows in the order of a seeded permutation, drawn anew each epoch. The permutation is computed index by index
(a Feistel network), so no order is stored, resume needs no state, and the number of ranks never changes what
step N trains on.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.context import UserError, atomic_path

FEISTEL_ROUNDS = 6
"""Luby and Rackoff (1988) need 4 for a pseudo-random permutation; two more because small domains have short keys."""

Indices = npt.NDArray[np.uint64]


def write_flat(documents: Iterable[npt.NDArray[Any]], path: Path, vocab_size: int) -> int:
    """Write documents end to end to ``path``, little endian, 2 bytes a token where ids fit, and count tokens."""
    count = 0
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for tokens in documents:
            count += len(tokens)
            file.write(np.ascontiguousarray(tokens, token_type(vocab_size)).data)
    return count


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id below ``vocab_size``."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class Windows:
    """A flat token file as windows of ``context + 1`` tokens, each a ``context`` after the last.

    Window i gives inputs ``tokens[i c : i c + c]`` and, shifted by one, targets; so every token but the first is
    a target exactly once an epoch, less a remainder shorter than a window.
    """

    def __init__(self, path: Path, vocab_size: int, context: int) -> None:
        kind = token_type(vocab_size)
        # numpy cannot map an empty file.
        self.tokens = np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)
        self.context = context

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.context)

    def take(self, indices: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets, each ``(len(indices), context)``."""
        at = indices.astype(np.int64)[:, None] * self.context + np.arange(self.context + 1)
        rows = self.tokens[at].astype(np.int64)
        return rows[:, :-1], rows[:, 1:]


def batch_windows(first: int, batch: int, seed: int, total: int) -> Indices:
    """Which windows the global batch holds that comes after ``first`` others: ``batch`` numbers below ``total``.

    Steps read the permutation of epoch 0 to its end, then that of epoch 1, so a batch may span two epochs.
    """
    places = np.arange(first, first + batch, dtype=np.uint64)
    epochs, places = places // np.uint64(total), places % np.uint64(total)
    windows = np.empty(batch, np.uint64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        windows[here] = permute(places[here], total, seed, int(epoch))
    return windows


def rank_share(windows: Indices, rank: int, ranks: int) -> Indices:
    """The part of a global batch that one rank trains on: a contiguous slice."""
    if len(windows) % ranks:
        raise ValueError(f"a batch of {len(windows)} windows does not divide among {ranks} ranks")
    share = len(windows) // ranks
    return windows[rank * share : (rank + 1) * share]


def permute(places: Indices, total: int, seed: int, epoch: int = 0) -> Indices:
    """Where a pseudo-random permutation of ``range(total)``, keyed by seed and epoch, sends each of ``places``.

    A balanced Feistel network permutes the next power of four; a number that lands outside ``range(total)`` is
    sent through again until it lands inside (cycle walking: Black and Rogaway 2002), under four times on average.
    Our own arithmetic rather than numpy's shuffles, whose streams may change between versions.
    """
    if total < 1:
        raise ValueError(f"no permutation of {total} things")
    bits = np.uint64(max(1, ((total - 1).bit_length() + 1) // 2))
    keys = mix(
        np.arange(FEISTEL_ROUNDS, dtype=np.uint64) + mix(np.uint64(seed % 2**64) ^ mix(np.uint64(epoch)))
    )
    images = feistel(places, bits, keys)
    while (outside := images >= np.uint64(total)).any():
        images[outside] = feistel(images[outside], bits, keys)
    return images


def feistel(values: Indices, bits: np.uint64, keys: Indices) -> Indices:
    """One pass of the network over numbers of ``2 * bits`` bits."""
    mask = np.uint64((1 << int(bits)) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return left << bits | right


def mix(values: Any) -> Any:
    """The SplitMix64 finaliser (Steele, Lea and Flood 2014): spreads every input bit over all 64."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def require_batch(tokens: int, context: int, batch_tokens: int) -> None:
    """Refuse a corpus that holds less than one batch.

    Raises:
        UserError: it does.
    """
    whole = max(0, (tokens - 1) // context) * context
    if whole < batch_tokens:
        raise UserError(
            f"the corpus has {tokens:,} training tokens ({whole:,} in whole windows of {context:,}), but one batch "
            f"needs {batch_tokens:,}:\nlower pretrain.batch_tokens or pretrain.model.context, or add text"
        )
