"""Tokens that lie end to end, read as sequences: streams of token shards (of a split, or of a source of it), which each
rank maps into memory, are cut into sequences of ``context + 1`` tokens. Sequences become micro-batches by one gather of
whole rows; a batch is written into buffers that are used again, pinned where a GPU reads them, because new pages cost
more than the copy does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.tokenize.flat import Stream
from llm.data.order import Indices


class Batch(NamedTuple):
    """Sequences as tensors, each of shape (B, T)."""

    tokens_BT: Tensor
    """int64: what the model sees."""
    targets_BT: Tensor
    """int64: what follows each token. After a document's last token that is the first of the next."""
    documents_BT: Tensor | None = None
    """int32: the number, within its sequence, of the document that each token belongs to."""
    positions_BT: Tensor | None = None
    """int64: the position of each token; None: as it lies in its sequence."""
    counted_BT: Tensor | None = None
    """bool: whether a target counts in the loss; None: all do."""
    reference_BT: Tensor | None = None
    """float32: nats of each target under the model that training is held against; 0 where it does not count."""
    weight: float = 1.0
    """Factor of the batch's mean loss in that of its step: other than 1 where batches have unlike many targets that
    count."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``; from pinned memory without waiting for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def slice(self, first: int, end: int) -> Batch:
        """Return sequences ``first`` to ``end - 1``, as views."""
        return self._each(lambda tensor: tensor[first:end])

    def begin(self, positions: int) -> Batch:
        """Return the first positions of each sequence."""
        return self._each(lambda tensor: tensor[:, :positions].contiguous())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in self._asdict().items() if isinstance(value, Tensor)
        }
        return self._replace(**changed)


class Sequences:
    """Streams of tokens as sequences of ``context + 1`` tokens, each a ``context`` after the last of its stream.

    Sequence i of a stream gives inputs ``tokens[i c : i c + c]`` and, shifted by one, targets; so every token but the
    first is a target exactly once an epoch, less a remainder shorter than a sequence. They are numbered from 0, stream
    after stream. With ``end``, the token that ends documents, batches hold the document index of each token.
    """

    def __init__(self, streams: Sequence[Stream], context: int, end: int | None = None) -> None:
        self.context, self.end = context, end
        self._streams = streams
        self.counts = [max(0, (len(stream) - 1) // context) for stream in streams]
        """Sequences of each stream."""

    def __len__(self) -> int:
        return sum(self.counts)

    def empty(self, count: int, pinned: bool = False) -> Batch:
        """Make room for ``count`` sequences, in memory that a GPU can read directly where ``pinned``."""
        shape = (count, self.context)
        tokens, targets = (torch.empty(shape, dtype=torch.int64, pin_memory=pinned) for _ in range(2))
        documents = None if self.end is None else torch.empty(shape, dtype=torch.int32, pin_memory=pinned)
        return Batch(tokens, targets, documents)

    def take(self, indices: npt.NDArray[Any], into: Batch | None = None) -> Batch:
        """Gather the sequences of these indices, in ``into`` (from `empty`, at least as large) or in new memory."""
        batch = self.empty(len(indices)) if into is None else into.slice(0, len(indices))
        rows = self._gather(indices.astype(np.int64))
        batch.tokens_BT.numpy()[:] = rows[:, :-1]
        batch.targets_BT.numpy()[:] = rows[:, 1:]
        if batch.documents_BT is not None:
            # An end-of-text token belongs to the document that it ends, so the number rises after it.
            documents = batch.documents_BT.numpy()
            documents[:, 0] = 0
            np.cumsum(rows[:, :-2] == self.end, axis=1, dtype=np.int32, out=documents[:, 1:])
        return batch

    def arranged(self, sequences: Indices) -> Indices:
        """Return a rank's sequences of a step in the order in which they are read: as they come, all are full."""
        return sequences

    def needed(self, batch: Batch, _: npt.NDArray[Any]) -> Batch:
        """Return what of a batch moves something: all of it."""
        return batch

    def weighed(self, batches: Sequence[Batch], mine: Indices, everyone: Indices) -> list[Batch]:
        """Return a rank's micro-batches with the weight of each in the step's loss: alike, as all targets count."""
        return list(batches)

    def _gather(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return tokens of shape ``(len(indices), context + 1)``."""
        if len(self._streams) == 1:
            return self._streams[0].read(indices * self.context, self.context + 1)
        gathered = np.empty((len(indices), self.context + 1), self._streams[0].token_type)
        first = 0
        for stream, count in zip(self._streams, self.counts, strict=True):
            here = np.flatnonzero((indices >= first) & (indices < first + count))
            if len(here):
                gathered[here] = stream.read((indices[here] - first) * self.context, self.context + 1)
            first += count
        return gathered
