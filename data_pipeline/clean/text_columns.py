"""Columns of texts as numba kernels see them: Arrow's UTF-8 bytes and offsets in place, and how they are rebuilt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.core.kernels import kernel


def from_buffers(data: NDArray[np.uint8], offsets: NDArray[np.int32]) -> pa.Array:
    """Return a column of strings over these bytes (valid UTF-8) and offsets, in place."""
    return pa.StringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(data))


def replace_rows(
    texts: pa.Array, rows: NDArray[np.int64], replacements: Sequence[str] | pa.Array
) -> pa.Array:
    """Return ``texts`` with others in some rows (ascending); the column itself where there are none."""
    if not len(rows):
        return texts
    mask = np.zeros(len(texts), np.bool_)
    mask[rows] = True
    return pc.replace_with_mask(texts, pa.array(mask), pa.array(replacements, pa.string()))


def slices(data: NDArray[np.uint8], begins: NDArray[np.int32], ends: NDArray[np.int32]) -> pa.Array:
    """Return a column of the strings that stand between these bytes of ``data``, copied."""
    offsets = np.zeros(len(begins) + 1, np.int32)
    np.cumsum(ends - begins, out=offsets[1:])
    copied = np.empty(offsets[-1], np.uint8)
    copy_slices(data, begins, ends, offsets, copied)
    return from_buffers(copied, offsets)


@kernel
def copy_slices(
    data: NDArray[np.uint8],
    begins: NDArray[np.int32],
    ends: NDArray[np.int32],
    offsets: NDArray[np.int32],
    copied: NDArray[np.uint8],
) -> None:
    for row in range(len(begins)):
        copied[offsets[row] : offsets[row + 1]] = data[begins[row] : ends[row]]
