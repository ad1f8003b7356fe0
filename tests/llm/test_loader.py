"""Batches prepared ahead are those that would be made on the spot."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.tokenize.flat import Stream, StreamShard
from llm.data import loader as module
from llm.data.loader import Loader, RankSlice
from llm.data.order import batch_sequences
from llm.data.sequences import Batch, Sequences

CONTEXT, STEPS = 8, 12
ALONE = RankSlice(0, 1, 4)


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    tokens = np.random.default_rng(0).integers(0, 50, 3000).astype("<u2")
    return Sequences([Stream([StreamShard(tokens)])], CONTEXT, end=0)


def growing(step: int) -> tuple[int, int]:
    """Batches of 4 sequences, and of 8 from step 5."""
    return (4 * step, 4) if step < 5 else (20 + 8 * (step - 5), 8)


def load(sequences: Sequences, mine: RankSlice = ALONE, **options: Any) -> Loader:
    options = {"order": partial(batch_sequences, seed=3, total=len(sequences)), "samples": growing, **options}
    return Loader(sequences, options.pop("order"), options.pop("samples"), mine, STEPS, **options)


def expected(sequences: Sequences, step: int) -> Batch:
    return sequences.take(batch_sequences(*growing(step), seed=3, total=len(sequences)))


def tensors(batch: Batch) -> list[torch.Tensor]:
    """Those that it has: of text neither positions nor what counts."""
    assert batch.positions_BT is batch.counted_BT is None
    return [one for one in batch if isinstance(one, torch.Tensor)]


def assert_same(batches: list[Batch], whole: Batch) -> None:
    for parts, one in zip(zip(*map(tensors, batches), strict=True), tensors(whole), strict=True):
        assert torch.equal(torch.cat(parts), one)


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(st.integers(0, STEPS - 1), max_size=20), ahead=st.integers(0, 3), micro=st.integers(1, 9)
)
def test_whatever_steps_are_asked_for_in_whatever_order_come_out_as_if_made_on_the_spot(
    sequences: Sequences, steps: list[int], ahead: int, micro: int
) -> None:
    with load(sequences, RankSlice(0, 1, micro), ahead=ahead) as batches:
        for step in steps:
            found = batches.micro_batches(step)
            assert [len(part.tokens_BT) for part in found[:-1]] == [micro] * (len(found) - 1)
            assert_same(found, expected(sequences, step))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_ranks_together_read_the_same_windows_whatever_their_number(
    sequences: Sequences, ranks: int
) -> None:
    loaders = [load(sequences, RankSlice(rank, ranks, 1)) for rank in range(ranks)]
    for step in range(STEPS):
        parts = [part for one in loaders for part in one.micro_batches(step)]
        assert_same(parts, expected(sequences, step))
    for one in loaders:
        one.close()


def test_a_batch_stays_as_it_is_while_the_next_ones_are_prepared(sequences: Sequences) -> None:
    with load(sequences, ahead=2) as batches:
        for step in range(STEPS):
            now = batches.micro_batches(step)
            for _, future in batches._prepared:
                future.result()
            assert_same(now, expected(sequences, step))


def test_no_more_is_prepared_than_allowed_and_nothing_past_the_end(sequences: Sequences) -> None:
    asked: list[int] = []

    def samples(step: int) -> tuple[int, int]:
        asked.append(step)
        return growing(step)

    with load(sequences, samples=samples, ahead=2) as batches:
        batches.micro_batches(0)
        for _, future in batches._prepared:
            future.result()
        assert asked == [0, 1, 2]
        for step in range(1, STEPS):
            batches.micro_batches(step)
    assert asked == list(range(STEPS))


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_asked_for(sequences: Sequences) -> None:
    def samples(step: int) -> tuple[int, int]:
        if step == 3:
            raise OSError("the disk went away")
        return growing(step)

    with load(sequences, samples=samples) as batches:
        for step in range(3):
            batches.micro_batches(step)
        with pytest.raises(OSError, match="the disk went away"):
            batches.micro_batches(3)


def test_nothing_works_on_after_the_block_even_if_that_ends_badly(sequences: Sequences) -> None:
    def of_ours() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]

    def interrupted() -> None:
        with load(sequences) as batches:
            batches.micro_batches(0)
            assert of_ours()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not of_ours()


def test_the_order_is_worked_out_a_block_at_a_time(
    sequences: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ORDER_BLOCK", 16)
    calls: list[tuple[int, int]] = []

    def order(first: int, count: int) -> Any:
        calls.append((first, count))
        return batch_sequences(first, count, 3, len(sequences))

    with load(sequences, order=order) as batches:
        for step in range(STEPS):
            assert_same(batches.micro_batches(step), expected(sequences, step))
    assert calls == [(0, 16), (16, 16), (28, 16), (44, 16), (60, 16)]
