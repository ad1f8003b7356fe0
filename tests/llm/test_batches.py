from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.core.errors import UserError
from llm.data.order import batch_sequences, permute, positions_of, rank_slice, require_batch, unpermute

SEEDS = st.integers(0, 2**64 - 1)


@given(total=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_permute_sends_every_place_to_a_window_of_its_own(total: int, seed: int, epoch: int) -> None:
    images = permute(np.arange(total, dtype=np.uint64), total, seed, epoch)
    assert np.array_equal(np.sort(images), np.arange(total))


@settings(deadline=None)
@given(
    total=st.integers(2, 2**62), seed=SEEDS, places=st.lists(st.integers(0, 2**62), min_size=1, max_size=50)
)
def test_permute_takes_places_one_by_one_or_together(total: int, seed: int, places: list[int]) -> None:
    wanted = np.array([place % total for place in places], np.uint64)
    together = permute(wanted, total, seed)
    apart = [permute(wanted[i : i + 1], total, seed)[0] for i in range(len(wanted))]
    assert np.array_equal(together, apart)
    assert (together < total).all()


def test_another_epoch_or_seed_is_another_order_and_each_looks_random() -> None:
    total = 4000
    orders = [
        permute(np.arange(total, dtype=np.uint64), total, seed, epoch)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for order in orders:
        assert abs(np.corrcoef(np.arange(total), order.astype(float))[0, 1]) < 0.06  # 4 standard deviations
        assert (order == np.arange(total)).sum() < 10  # Poisson with mean 1
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (orders[one] == orders[other]).sum() < 10
        assert abs(np.corrcoef(orders[one].astype(float), orders[other].astype(float))[0, 1]) < 0.06


def test_the_order_never_changes_between_versions() -> None:
    """Golden values: a change here means that a resumed training reads other text than it began with."""
    assert permute(np.arange(8, dtype=np.uint64), 1000, seed=1).tolist() == [
        973,
        554,
        327,
        197,
        604,
        49,
        690,
        296,
    ]
    assert batch_sequences(12, 4, seed=7, total=10).tolist() == [6, 5, 4, 8]


@settings(max_examples=50, deadline=None)
@given(total=st.integers(5, 200), batches=st.lists(st.integers(0, 40), min_size=1, max_size=12), seed=SEEDS)
def test_every_window_is_read_once_before_any_twice(total: int, batches: list[int], seed: int) -> None:
    firsts = np.cumsum([0, *batches]).tolist()
    parts = [
        batch_sequences(first, count, seed, total) for first, count in zip(firsts, batches, strict=False)
    ]
    read = np.concatenate(parts)
    assert np.array_equal(
        read, batch_sequences(0, sum(batches), seed, total)
    )  # however it is cut into batches
    for epoch in range(0, len(read), total):
        part = read[epoch : epoch + total]
        assert len(np.unique(part)) == len(part)


@given(
    step=st.integers(0, 10**9), seed=SEEDS, shape=st.sampled_from([(1, 1), (2, 3), (4, 1), (8, 2), (3, 5)])
)
def test_the_number_of_ranks_does_not_change_what_a_step_trains_on(
    step: int, seed: int, shape: tuple[int, int]
) -> None:
    ranks, size = shape
    whole = batch_sequences(step * ranks * size, ranks * size, seed, 12345)
    slices = [rank_slice(whole, rank, ranks) for rank in range(ranks)]
    assert np.array_equal(np.concatenate(slices), whole)
    assert {len(one) for one in slices} == {size}


def test_a_corpus_smaller_than_one_batch_is_refused_with_figures() -> None:
    require_batch(1025, context=32, batch_tokens=1024)
    with pytest.raises(UserError, match=r"1,024 training tokens \(992 in whole.*one batch needs 1,024"):
        require_batch(1024, context=32, batch_tokens=1024)


@settings(deadline=None)
@given(
    total=st.one_of(st.integers(1, 300), st.integers(1, 2**62)),
    seed=SEEDS,
    epoch=st.integers(0, 2**40),
    places=st.lists(st.integers(0, 2**62), min_size=1, max_size=50),
)
def test_unpermute_leads_back_to_every_place(total: int, seed: int, epoch: int, places: list[int]) -> None:
    wanted = np.array([place % total for place in places], np.uint64)
    assert np.array_equal(unpermute(permute(wanted, total, seed, epoch), total, seed, epoch), wanted)
    assert np.array_equal(permute(unpermute(wanted, total, seed, epoch), total, seed, epoch), wanted)


@settings(deadline=None)
@given(total=st.integers(1, 500), seed=SEEDS, first=st.integers(0, 10**6), count=st.integers(1, 300))
def test_a_window_of_an_epoch_knows_its_place(total: int, seed: int, first: int, count: int) -> None:
    epochs = np.arange(first, first + count) // total
    found = positions_of(batch_sequences(first, count, seed, total), epochs, seed, total)
    assert np.array_equal(found, np.arange(first, first + count))
