"""A uniform hash of every string in an Arrow column, the same everywhere and for ever, without a Python object each.

Splits, samples and orders are drawn by it, so it may never change. It is a chain: the state begins as a mixture
of salt and length, takes in eight bytes at a time by exclusive or, and is mixed by splitmix64's finaliser (Steele, Lea,
Flood 2014, "Fast Splittable Pseudorandom Number Generators"), a bijection in which every input bit reaches every output
bit. It resists accidents, not adversaries.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

HASHES = 1 << 64
KEPT = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)
"""Masks that keep the first ``count`` bytes of a little-endian word."""


def hash_column(column: pa.Array, salt: str) -> NDArray[np.uint64]:
    """Return a uniform 64-bit hash of every string of a column of type string without nulls, shape (rows,)."""
    assert column.type == pa.string(), column.type
    assert not column.null_count
    starts, words = words_of(column)
    lengths = np.diff(starts)
    seed = np.frombuffer(blake2b(salt.encode(), digest_size=8).digest(), "<u8").astype(np.uint64)
    hashes = mix(seed ^ lengths.astype(np.uint64))
    rows, position = np.flatnonzero(lengths), 0
    while len(rows):
        left = lengths[rows] - position
        word = words[starts[rows] + position].astype(np.uint64) & KEPT[np.minimum(left, 8)]
        hashes[rows] = mix(hashes[rows] ^ word)
        rows, position = rows[left > 8], position + 8
    return hashes


def words_of(column: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Find where each string begins (rows + 1), and the eight bytes from each byte on, as an overlapping view."""
    _, offsets, data = column.buffers()
    if not len(column):
        return np.zeros(1, np.int64), np.zeros(0, np.uint64)
    starts = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1].astype(
        np.int64
    )
    text = np.frombuffer(data or b"", np.uint8)[starts[0] : starts[-1]]
    padded = np.concatenate([text, np.zeros(8, np.uint8)])
    words: NDArray[np.uint64] = np.ndarray((len(text) + 1,), "<u8", padded, strides=(1,))
    return starts - starts[0], words


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser, element by element."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
