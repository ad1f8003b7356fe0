"""Readers that feed a training loop, contestants of `benchmarks.loader`: each gives (tokens, targets) as int64 tensors
of shape (batch, context) and is timed until it has given ``tokens`` tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Work

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]


def drain(batches: Pairs, tokens: int) -> dict[str, int]:
    """Take batches until there are ``tokens`` tokens; their number, and a sum that shows that all were read."""
    read = checksum = 0
    for inputs, targets in batches:
        assert inputs.dtype == targets.dtype == torch.int64
        read += inputs.numel()
        checksum += int(inputs[0, 0]) + int(targets[-1, -1])
        if read >= tokens:
            return {"tokens": read, "checksum": checksum}
    raise AssertionError(f"only {read} tokens came")


def llmill(shards: str, context: int, batch: int, tokens: int, end: int | None = None) -> Work:
    """Ours, as the trainer uses it; with ``end``, documents' numbers too. The thread shares the core."""
    from data_pipeline.tokenize.flat import FlatTokens
    from llm.data.loader import Loader, RankSlice
    from llm.data.order import batch_sequences
    from llm.data.sequences import Sequences

    torch.set_num_threads(1)
    windows = Sequences([FlatTokens(Path(shards), "train").stream()], context, end)
    order = partial(batch_sequences, seed=0, total=len(windows))
    steps = -(-tokens // (batch * context))

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        with Loader(
            windows, order, lambda step: (step * batch, batch), RankSlice(0, 1, batch), steps
        ) as loader:
            for step in range(steps):
                (one,) = loader.micro_batches(step)
                yield one.tokens_BT, one.targets_BT

    return lambda: drain(pairs(), tokens)


def random_crops(flat: str, vocab_size: int, context: int, batch: int, tokens: int) -> Work:
    """As nanoGPT does: crops at random offsets of a file that is mapped anew for each batch. There are no epochs."""
    torch.set_num_threads(1)
    kind = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    generator = torch.Generator().manual_seed(0)

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            data = np.memmap(flat, kind, "r")
            starts = torch.randint(len(data) - context, (batch,), generator=generator).tolist()
            yield (
                torch.stack([torch.from_numpy(data[at : at + context].astype(np.int64)) for at in starts]),
                torch.stack(
                    [torch.from_numpy(data[at + 1 : at + 1 + context].astype(np.int64)) for at in starts]
                ),
            )

    return lambda: drain(pairs(), tokens)


class MappedWindows(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Windows of a mapped file, one an item."""

    def __init__(self, flat: str, kind: Any, context: int) -> None:
        self.data, self.context = np.memmap(flat, kind, "r"), context

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = torch.from_numpy(
            self.data[index * self.context : (index + 1) * self.context + 1].astype(np.int64)
        )
        return row[:-1], row[1:]


def data_loader(flat: str, vocab_size: int, context: int, batch: int, tokens: int) -> Work:
    """torch's DataLoader with its shuffled sampler, in this process, since there is one core."""
    torch.set_num_threads(1)
    windows = MappedWindows(flat, np.uint16 if vocab_size <= 1 << 16 else np.uint32, context)
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(
        windows, batch_size=batch, shuffle=True, drop_last=True, generator=generator
    )

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from loader

    return lambda: drain(pairs(), tokens)


def packed_dataset(shards: list[str], context: int, batch: int, tokens: int, out: str) -> Work:
    """`datasets`: the Parquet shards packed into rows of context + 1 by `map` (before the clock starts), shuffled,
    and read as torch tensors."""
    import datasets

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    shutil.rmtree(out, ignore_errors=True)

    def pack(rows: dict[str, Any]) -> dict[str, Any]:
        text = np.concatenate(rows["tokens"])
        starts = range(0, len(text) - context, context)
        return {"tokens": [text[start : start + context + 1] for start in starts]}

    whole = datasets.load_dataset(
        "parquet", data_files=shards, columns=["tokens"], split="train", cache_dir=out
    )
    packed = whole.with_format("numpy").map(pack, batched=True, batch_size=1000).with_format("torch")

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for epoch in range(1_000_000):
            for rows in packed.shuffle(seed=epoch).iter(batch_size=batch, drop_last_batch=True):
                yield rows["tokens"][:, :-1], rows["tokens"][:, 1:]

    return lambda: drain(pairs(), tokens)
