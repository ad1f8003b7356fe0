"""The tests of `llmill compare` are right as often as they say: shown on simulated models, documents and seeds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from flows.compare.claims import Claim
from llm.score.statistics import Estimate, Floats, holm, paired_bootstrap, seeds_test

WORLDS = 500
EFFECT = 0.02
RARELY = 1e-4
"""How often a calibrated test would fail here; the seeds are fixed, so that this one either always does or never."""


def documents(generator: np.random.Generator, count: int) -> Floats:
    """Bytes of documents whose lengths differ by two orders of magnitude, as those of crawled pages do."""
    return np.exp(generator.normal(8, 1, count)).round() + 1


def pairs(count: int, effect: float) -> list[Estimate]:
    """What the test says of two models in many worlds; heavy tails of the differences between documents."""
    generator = np.random.default_rng(count)
    said = []
    for seed in range(WORLDS):
        sizes = documents(generator, count)
        more = effect + 0.05 * generator.standard_t(5, count)
        said += paired_bootstrap((more * sizes)[None], sizes, 1000, seed)
    return said


def within(count: int, share: float, of: int = WORLDS) -> bool:
    """Whether so many of ``of`` are what a share of all would give."""
    return stats.binomtest(count, of, share).pvalue > RARELY


@pytest.mark.parametrize("count", [12, 100])
def test_of_models_that_do_not_differ_one_in_twenty_is_said_to(count: int) -> None:
    assert within(sum(one.p_value < 0.05 for one in pairs(count, 0)), 0.05)


@pytest.mark.parametrize("count", [12, 100])
def test_the_interval_covers_the_true_difference_19_times_out_of_20(count: int) -> None:
    said = pairs(count, EFFECT)
    assert within(sum(one.low <= EFFECT <= one.high for one in said), 0.95)
    assert all((one.p_value < 0.05) == (not one.low <= 0 <= one.high) for one in said
               if abs(one.p_value - 0.05) > 0.002)  # fmt: skip


def test_the_smallest_difference_is_shown_four_times_out_of_five() -> None:
    smallest = float(np.mean([one.smallest for one in pairs(60, 0)]))
    shown = sum(one.p_value < 0.05 for one in pairs(60, smallest)) / WORLDS
    assert 0.7 < shown < 0.9


def test_all_pairs_at_once_are_as_each_alone_and_swapped_models_swap_the_answer() -> None:
    generator = np.random.default_rng(0)
    sizes = documents(generator, 80)
    more = generator.normal(0.02, 0.05, (3, 80)) * sizes
    together = paired_bootstrap(more, sizes)
    for one, row in zip(together, more, strict=True):
        (alone,), (swapped,) = paired_bootstrap(row[None], sizes), paired_bootstrap(-row[None], sizes)
        assert (one.low, one.high) == pytest.approx((alone.low, alone.high))
        assert (swapped.difference, swapped.low) == pytest.approx((-one.difference, -one.high))
        assert swapped.p_value == pytest.approx(one.p_value, abs=2e-4)


def test_a_difference_is_that_of_the_sums_and_not_of_the_mean_document() -> None:
    sizes = np.array([10_000.0] + [100.0] * 11)
    (said,) = paired_bootstrap((np.array([0.1] + [-0.1] * 11) * sizes)[None], sizes)
    assert said.difference == pytest.approx((1000 - 110) / 11_100)


def recipes(seeds: int, noise: float, effect: float, worlds: int) -> list[Estimate]:
    """What the test says of two recipes, of which each seed and each document has its own noise."""
    generator = np.random.default_rng(seeds)
    said = []
    for _ in range(worlds):
        sizes = documents(generator, 60)
        own = effect * np.array([0.0, 1.0])[:, None] + generator.normal(0, 0.05, (2, 60))
        per_byte = 1.2 + np.repeat(own, seeds, axis=0) + generator.normal(0, noise, (2 * seeds, 1))
        bits = (per_byte + generator.normal(0, 0.02, per_byte.shape)) * sizes
        figures = bits.sum(axis=1) / sizes.sum()
        more = bits[seeds:].mean(axis=0) - bits[:seeds].mean(axis=0)
        said.append(seeds_test(figures[:seeds], figures[seeds:], more, sizes))
    return said


@pytest.mark.parametrize("noise", [0.003, 0.03])
@pytest.mark.parametrize("seeds", [3, 5])
def test_of_recipes_that_do_not_differ_at_most_one_in_twenty_is_said_to(seeds: int, noise: float) -> None:
    alarms = sum(one.p_value < 0.05 for one in recipes(seeds, noise, 0, 2000))
    assert stats.binomtest(alarms, 2000, 0.05, "greater").pvalue > RARELY
    assert alarms > 2000 * 0.02, "nor is it deaf"


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_over_seeds_covers_the_true_difference(seeds: int) -> None:
    covered = sum(one.low <= 0.1 <= one.high for one in recipes(seeds, 0.03, 0.1, 2000))
    assert stats.binomtest(covered, 2000, 0.95, "less").pvalue > RARELY
    assert covered < 2000 * 0.98


def test_seeds_alone_would_mislead_where_the_documents_are_few() -> None:
    """Without the documents' share of the variance, recipes that do not differ would be said to, very often."""
    generator, alarms = np.random.default_rng(1), 0
    for _ in range(300):
        figures = generator.normal(0, 0.05, 2).repeat(5) / np.sqrt(60) + generator.normal(0, 0.001, 10)
        alarms += stats.ttest_ind(figures[:5], figures[5:], equal_var=False).pvalue < 0.05
    assert alarms > 150


def test_several_tests_at_once_are_adjusted_as_holm_did() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("differ", [0, 1, 2, 12])
@pytest.mark.parametrize("by", [0.0, 3.0])
def test_documents_that_hardly_differ_or_all_alike_give_numbers(differ: int, by: float) -> None:
    """Resamples without any difference, or without any spread, have a standard error of 0."""
    sizes = np.full(12, 100.0)
    more = np.zeros(12)
    more[:differ] = by
    (found,) = paired_bootstrap(more[None], sizes, 1000)
    several = seeds_test(np.array([1.0, 1.0]), np.array([1.0, 1.0]) + more.sum() / 1200, more, sizes)
    for one in (found, several):
        assert not np.isnan([one.difference, one.low, one.high, one.p_value, one.smallest]).any()
        assert one.low <= one.difference <= one.high
        if not more.any():
            assert (one.difference, one.p_value) == (0, 1)
        if by and differ == 12:
            assert one.low == one.high == one.difference == pytest.approx(0.03)
            assert one.p_value < 0.001
    numbers = Claim(first="A", second="B", outcome="no difference shown", estimate=found).as_json()
    json.dumps(numbers, allow_nan=False)
