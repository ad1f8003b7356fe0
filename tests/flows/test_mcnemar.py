"""McNemar's test of two shares of the same items."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from llm.score.mcnemar import mcnemar


def test_of_equal_shares_one_in_twenty_is_said_to_differ_and_the_interval_covers_the_true_one() -> None:
    """Over the whole distribution of outcomes, by arithmetic: 60 items, of which the models differ in a third."""
    items, differ = 60, 1 / 3
    for effect in (0.0, 0.1):
        chances = [(differ - effect) / 2, (differ + effect) / 2, 1 - differ]
        alarms = covered = total = 0.0
        for only_first in range(items + 1):
            for only_second in range(items + 1 - only_first):
                counts = [only_first, only_second, items - only_first - only_second]
                chance = stats.multinomial.pmf(counts, items, chances)
                if chance < 1e-9:
                    continue
                said = mcnemar(only_first, only_second, items)
                total += chance
                alarms += chance * (said.p_value < 0.05)
                covered += chance * (said.low <= effect <= said.high)
        assert total == pytest.approx(1, abs=1e-5)
        assert 0.945 < covered < 0.965
        if not effect:
            assert 0.04 < alarms < 0.052


def test_shares_by_hand() -> None:
    said = mcnemar(2, 10, 100)
    exact = stats.binomtest(2, 12).pvalue
    assert said.p_value == pytest.approx(exact - stats.binom.pmf(2, 12, 0.5))
    assert said.difference == 0.08
    first, second = 3 / 102, 11 / 102
    half = 1.959964 * math.sqrt((first + second - (second - first) ** 2) / 102)
    assert (said.low, said.high) == pytest.approx((second - first - half, second - first + half), rel=1e-6)
    assert mcnemar(0, 0, 5).p_value == 1
    assert mcnemar(3, 3, 9).p_value == 1
    assert mcnemar(0, 0, 5).low < 0 < mcnemar(0, 0, 5).high
