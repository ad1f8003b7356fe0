"""The budget of false findings: what it promises, by simulation of many looks; `test_compare` tries its record."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from flows.compare.budget import Look, share
from llm.score.statistics import LEVEL, holm

BUDGET, LOOKS, STREAMS = 0.1, 200, 400


def found_in_looks(p_values: np.ndarray, budget: float) -> np.ndarray:
    """Which of the looks at one p-value each, one after the other, find something."""
    found: list[bool] = []
    for number, p_value in enumerate(p_values, 1):
        paid = Look("", number=number, found=sum(found), budget=budget)
        [adjusted] = holm([p_value], paid.correction)
        assert adjusted >= LEVEL or p_value < paid.level
        found.append(adjusted < LEVEL)
    return np.array(found)


def test_the_shares_of_all_looks_are_the_whole_budget() -> None:
    spent = list(itertools.accumulate(map(share, range(1, 100_000))))
    assert spent[-1] < 1
    rest = 2 / math.sqrt(100_000) / 2.612375348685488
    assert spent[-1] + rest == pytest.approx(1, abs=1e-4)
    assert share(1) > share(2) > share(100) > 0


def test_of_looks_at_nothing_few_find_anything() -> None:
    chance = np.random.default_rng(0)
    any_found = [found_in_looks(chance.uniform(size=LOOKS), BUDGET).any() for _ in range(STREAMS)]
    assert stats.binomtest(sum(any_found), STREAMS, BUDGET, alternative="greater").pvalue > 0.01
    uncorrected = [(chance.uniform(size=LOOKS) < LEVEL).any() for _ in range(STREAMS)]
    assert np.mean(uncorrected) > 0.99, "without a budget, nearly everybody finds something"


@pytest.mark.parametrize("true", [0.1, 0.5])
def test_of_what_is_found_among_true_differences_the_budget_at_most_is_false(true: float) -> None:
    chance = np.random.default_rng(1)
    shares, power = [], []
    for _ in range(STREAMS):
        is_true = chance.uniform(size=LOOKS) < true
        scores = chance.normal(size=LOOKS) + 4.5 * is_true
        found = found_in_looks(2 * stats.norm.sf(abs(scores)), BUDGET)
        shares.append((found & ~is_true).sum() / max(1, found.sum()))
        power.append((found & is_true).sum() / max(1, is_true.sum()))
    error = np.std(shares) / math.sqrt(STREAMS)
    assert np.mean(shares) - 3 * error < BUDGET
    assert np.mean(power) > 0.3, "and it still finds some"


def test_what_was_found_pays_for_stricter_looks() -> None:
    levels = [Look("", number=20, found=found, budget=BUDGET).level for found in range(3)]
    assert levels[2] == pytest.approx(3 * levels[0])
    assert Look("", number=1, found=0, budget=BUDGET).correction == pytest.approx(LEVEL / (BUDGET * share(1)))
