"""(seed, sample index) -> sequence, as a pure function. A sample is one sequence; a step reads so many, in the order
of a seeded permutation that is drawn anew each epoch. The permutation is computed index by index (a Feistel network),
so no order is stored, resume needs no state, and the number of ranks never changes what step N trains on. What a
sequence is, see `llm.data.sequences`; how several sources share the samples, `llm.data.mixture`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.core.errors import UserError

FEISTEL_ROUNDS = 6
"""Luby and Rackoff (1988) need 4 for a pseudo-random permutation; two more because small domains have short keys."""

Indices = npt.NDArray[np.uint64]


def batch_sequences(first: int, count: int, seed: int, total: int) -> Indices:
    """Find which sequences the samples ``first`` to ``first + count`` read: numbers below ``total``.

    Samples read the permutation of epoch 0 to its end, then that of epoch 1, so a batch may span two epochs.
    """
    return shuffled(np.arange(first, first + count, dtype=np.uint64), seed, total)


def shuffled(positions: Indices, seed: int, total: int) -> Indices:
    """Return the sequences at positions of an endless order: all ``total`` in one order, then in another, ..."""
    epochs, positions = positions // np.uint64(total), positions % np.uint64(total)
    sequences = np.empty(len(positions), np.uint64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        sequences[here] = permute(positions[here], total, seed, int(epoch))
    return sequences


def positions_of(sequences: Indices, epochs: npt.NDArray[np.int64], seed: int, total: int) -> Indices:
    """Return the positions where `shuffled` reads each sequence in its epoch: shape (sequences,), as its arguments."""
    positions = np.empty(len(sequences), np.uint64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        positions[here] = unpermute(sequences[here], total, seed, epoch) + np.uint64(epoch * total)
    return positions


def rank_slice(sequences: Indices, rank: int, ranks: int) -> Indices:
    """Return the contiguous slice of a global batch that one rank trains on."""
    if len(sequences) % ranks:
        raise ValueError(f"a batch of {len(sequences)} sequences does not divide among {ranks} ranks")
    size = len(sequences) // ranks
    return sequences[rank * size : (rank + 1) * size]


def permute(positions: Indices, total: int, seed: int, epoch: int = 0) -> Indices:
    """Find where a pseudo-random permutation of ``range(total)``, keyed by seed and epoch, sends each of ``positions``.

    A balanced Feistel network permutes the next power of four; a number that lands outside ``range(total)`` is
    sent through again until it lands inside (cycle walking: Black and Rogaway 2002), under four times on average.
    Our own arithmetic rather than numpy's shuffles, whose streams may change between versions.
    """
    bits, keys = network(total, seed, epoch)
    images = feistel(positions, bits, keys)
    while (outside := images >= np.uint64(total)).any():
        images[outside] = feistel(images[outside], bits, keys)
    return images


def unpermute(images: Indices, total: int, seed: int, epoch: int = 0) -> Indices:
    """Find which positions `permute` sends to ``images``: its inverse, which walks the same cycles backwards."""
    bits, keys = network(total, seed, epoch)
    positions = unfeistel(images, bits, keys)
    while (outside := positions >= np.uint64(total)).any():
        positions[outside] = unfeistel(positions[outside], bits, keys)
    return positions


def network(total: int, seed: int, epoch: int) -> tuple[np.uint64, Indices]:
    """Return half the bits of the numbers that the network for ``range(total)`` permutes, and its rounds' keys."""
    if total < 1:
        raise ValueError(f"no permutation of {total} things")
    bits = np.uint64(max(1, ((total - 1).bit_length() + 1) // 2))
    rounds = np.arange(FEISTEL_ROUNDS, dtype=np.uint64)
    return bits, mix(rounds + mix(np.uint64(seed % 2**64) ^ mix(np.uint64(epoch))))


def feistel(values: Indices, bits: np.uint64, keys: Indices) -> Indices:
    """Apply one pass of the network to numbers of ``2 * bits`` bits."""
    mask = np.uint64((1 << int(bits)) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return left << bits | right


def unfeistel(values: Indices, bits: np.uint64, keys: Indices) -> Indices:
    """Return what `feistel` makes ``values`` of: its rounds undone, the last first."""
    mask = np.uint64((1 << int(bits)) - 1)
    left, right = values >> bits, values & mask
    for key in keys[::-1]:
        left, right = right ^ (mix(left ^ key) & mask), left
    return left << bits | right


def mix(values: Any) -> Any:
    """Apply the SplitMix64 finaliser (Steele, Lea and Flood 2014): every input bit spreads over all 64."""
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
            f"the corpus has {tokens:,} training tokens ({whole:,} in whole sequences of {context:,}), but one batch "
            f"needs {batch_tokens:,}:\nlower pretrain.batch_tokens or pretrain.model.context, or add text"
        )
