"""Token shards laid flat, and read as windows: all documents of a split (or of one source) lie end to end in a file
that every rank maps into memory, cut into windows of ``context + 1`` tokens. Windows become micro-batches by one
gather of whole rows; a batch is written into buffers that are used again, pinned where a GPU reads them, because
new pages cost more than the copy does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.tokenize.shards import TokenBatch


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id below ``vocab_size``."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def write_flat(batches: Iterable[TokenBatch], path: Path, vocab_size: int, end: int) -> int:
    """Write documents end to end to ``path``, little endian, 2 bytes a token where ids fit, and count tokens.

    Each document must end with token ``end`` and hold no other: it is how windows know where documents begin.
    """
    count = 0
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for batch in batches:
            assert_ended(batch, end)
            count += len(batch.tokens)
            file.write(np.ascontiguousarray(batch.tokens, token_type(vocab_size)).data)
    return count


def write_flat_by_source(
    batches: Iterable[TokenBatch], paths: Mapping[str, Path], vocab_size: int, end: int
) -> dict[str, int]:
    """As `write_flat`, one file for each source that ``paths`` names, and the tokens of all sources there are.

    Raises:
        UserError: a source in ``paths`` has no document.
    """
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        temporaries = {name: stack.enter_context(atomic_path(path)) for name, path in paths.items()}
        files = {name: stack.enter_context(open(path, "wb")) for name, path in temporaries.items()}
        for batch in batches:
            assert_ended(batch, end)
            for name, tokens in by_source(batch):
                counts[name] = counts.get(name, 0) + len(tokens)
                if name in files:
                    files[name].write(np.ascontiguousarray(tokens, token_type(vocab_size)).data)
        if unknown := [name for name in paths if name not in counts]:
            raise UserError(
                f"pretrain.mixture names {', '.join(unknown)}, but no training document comes from there:\n"
                f"the sources are {', '.join(sorted(counts))}"
            )
    return counts


def by_source(batch: TokenBatch) -> Iterable[tuple[str, npt.NDArray[Any]]]:
    """The tokens of each source in a batch; a document's source is what comes before the first "/" of its id."""
    names, codes = np.unique([id.partition("/")[0] for id in batch.ids], return_inverse=True)
    owners = np.repeat(codes, np.diff(batch.offsets))
    for code, name in enumerate(names.tolist()):
        yield name, batch.tokens if len(names) == 1 else batch.tokens[owners == code]


def assert_ended(batch: TokenBatch, end: int) -> None:
    """Assert that every document ends with ``end`` and holds no other."""
    lasts = batch.offsets[1:] - 1
    ends = np.flatnonzero(batch.tokens == end)
    if not np.array_equal(ends, lasts):
        wrong = next(
            name
            for name, first, stop in zip(batch.ids, batch.offsets, batch.offsets[1:], strict=True)
            if np.flatnonzero(batch.tokens[first:stop] == end).tolist() != [stop - first - 1]
        )
        raise AssertionError(f"document {wrong} does not end with its only end-of-text token ({end})")


class Batch(NamedTuple):
    """Windows as tensors, each of shape (B, T)."""

    tokens_BT: Tensor
    """int64: what the model sees."""
    targets_BT: Tensor
    """int64: what follows each token. After a document's last token that is the first of the next."""
    documents_BT: Tensor | None = None
    """int32: the number, within its window, of the document that each token belongs to."""

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; from pinned memory without waiting for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def part(self, first: int, end: int) -> Batch:
        """Windows ``first`` to ``end``, in the same memory."""
        return self._each(lambda tensor: tensor[first:end])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        documents_BT = None if self.documents_BT is None else change(self.documents_BT)
        return Batch(change(self.tokens_BT), change(self.targets_BT), documents_BT)


class Windows:
    """Flat token files as windows of ``context + 1`` tokens, each a ``context`` after the last of its file.

    Window i of a file gives inputs ``tokens[i c : i c + c]`` and, shifted by one, targets; so every token but the
    first is a target exactly once an epoch, less a remainder shorter than a window. Windows are numbered from 0, file
    after file. With ``end``, the token that ends documents, batches say which document each token belongs to.
    """

    def __init__(self, paths: Sequence[Path], vocab_size: int, context: int, end: int | None = None) -> None:
        self.context, self.end = context, end
        kind = token_type(vocab_size)
        self._rows = [rows_of(path, kind, context) for path in paths]
        self.counts = [len(rows) for rows in self._rows]
        """Windows of each file."""

    def __len__(self) -> int:
        return sum(self.counts)

    def empty(self, count: int, pinned: bool = False) -> Batch:
        """Room for ``count`` windows, in memory that a GPU can read directly where ``pinned``."""
        shape = (count, self.context)
        tokens, targets = (torch.empty(shape, dtype=torch.int64, pin_memory=pinned) for _ in range(2))
        documents = None if self.end is None else torch.empty(shape, dtype=torch.int32, pin_memory=pinned)
        return Batch(tokens, targets, documents)

    def take(self, indices: npt.NDArray[Any], into: Batch | None = None) -> Batch:
        """The windows of these numbers, in ``into`` (from `empty`, at least as large) or in memory of their own."""
        batch = self.empty(len(indices)) if into is None else into.part(0, len(indices))
        rows = self._gather(indices.astype(np.int64))
        batch.tokens_BT.numpy()[:] = rows[:, :-1]
        batch.targets_BT.numpy()[:] = rows[:, 1:]
        if batch.documents_BT is not None:
            # An end-of-text token belongs to the document that it ends, so the number rises after it.
            documents = batch.documents_BT.numpy()
            documents[:, 0] = 0
            np.cumsum(rows[:, :-2] == self.end, axis=1, dtype=np.int32, out=documents[:, 1:])
        return batch

    def _gather(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Tokens of shape ``(len(indices), context + 1)``."""
        if len(self._rows) == 1:
            return self._rows[0][indices]
        gathered = np.empty((len(indices), self.context + 1), self._rows[0].dtype)
        first = 0
        for rows in self._rows:
            here = np.flatnonzero((indices >= first) & (indices < first + len(rows)))
            gathered[here] = rows[indices[here] - first]
            first += len(rows)
        return gathered


def rows_of(path: Path, kind: np.dtype[Any], context: int) -> npt.NDArray[Any]:
    """A flat file as overlapping rows of ``context + 1`` tokens, without a copy."""
    if path.stat().st_size < (context + 1) * kind.itemsize:  # numpy cannot map an empty file
        return np.empty((0, context + 1), kind)
    tokens = np.asarray(np.memmap(path, kind, "r"))
    return sliding_window_view(tokens, context + 1)[::context]
