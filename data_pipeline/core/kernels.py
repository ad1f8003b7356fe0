"""Kernels: functions compiled by numba, whose machine code stays on disk until anything it is made of changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numba
import numpy as np
from numba.core.dispatcher import Dispatcher
from numpy.typing import NDArray

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""2^64 / golden ratio, odd: multiplying by it is a bijection that spreads low bits upward."""


def kernel(function: Callable[..., Any] | None = None, *, inline: str = "never") -> Any:
    """Compile a function without the interpreter's lock, and keep its code on disk.

    numba itself looks at the function's own file alone: it would keep old code when a kernel that is called, or
    a number that is read, changes in another module. So these are part of what distinguishes old code from new.
    """
    if function is None:
        return partial(kernel, inline=inline)
    compiled = numba.njit(nogil=True, cache=True, inline=inline)(function)
    kept = kept_code(compiled)
    kept._source_stamp = (kept._source_stamp, tuple(ingredients(function)))
    return compiled


def kept_code(compiled: Any) -> Any:
    """Return what numba keeps of a kernel on disk; there is no public way to it."""
    return compiled._cache._cache_file


def ingredients(function: Callable[..., Any]) -> Iterator[object]:
    """Yield the stamps of the kernels that a function calls, and the numbers that it reads, of whatever module."""
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, Dispatcher):
            yield name, kept_code(value)._source_stamp
        elif isinstance(value, int | float | np.generic | tuple):
            yield name, repr(value)


@kernel(inline="always")
def mix(value: np.uint64) -> np.uint64:
    """Return a bijection of 64 bits in which every input bit reaches every output bit (splitmix64's finaliser)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@kernel
def code_point(data: NDArray[np.uint8], at: int) -> tuple[int, int]:
    """Return the code point at byte ``at`` of valid UTF-8, and its length in bytes.

    The returns by length matter: one return for all is fifty times slower.
    """
    first = int(data[at])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return ((first & 31) << 6) | (data[at + 1] & 0x3F), 2
    if first < 0xF0:
        return ((first & 15) << 12) | ((data[at + 1] & 0x3F) << 6) | (data[at + 2] & 0x3F), 3
    code = ((first & 7) << 18) | ((data[at + 1] & 0x3F) << 12)
    return code | ((data[at + 2] & 0x3F) << 6) | (data[at + 3] & 0x3F), 4
