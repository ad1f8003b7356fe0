"""Measures of a classifier on held-out texts, each with a 95% interval. Shape suffixes: N texts, L labels, S resamples,
C bins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from llm.score.statistics import LEVEL, SEED

Floats = NDArray[np.float64]
Given = NDArray[np.bool_]
RESAMPLES = 2_000
BINS = 10
"""Bins of equal width in which confidence is held against what is right."""


@dataclass(frozen=True)
class Measure:
    """A figure, and the ends of its interval."""

    value: float
    low: float
    high: float

    def text(self) -> str:
        """``0.953 (0.931 to 0.968)``."""
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def accuracy(given: Given, truth: Given) -> Measure:
    """Return the share of the texts whose labels are all right (Wilson 1927)."""
    right = int((given == truth).all(axis=1).sum())
    low, high = binomtest(right, len(truth)).proportion_ci(method="wilson")
    return Measure(right / len(truth), float(low), float(high))


def f1(given: Given, truth: Given) -> tuple[list[Measure], Measure]:
    """Return the harmonic mean of precision and recall of each label, and their mean over labels; where a label is
    neither had nor given it is 0 (percentile bootstrap over texts)."""

    def of(times_SN: Floats) -> Floats:
        both, either = times_SN @ (given & truth), times_SN @ given + times_SN @ truth
        return np.divide(2 * both, either, out=np.zeros_like(both), where=either > 0)

    drawn_SL = resampled(of, len(truth))
    exact_L = of(np.ones((1, len(truth))))[0]
    each = [measure(value, drawn_S) for value, drawn_S in zip(exact_L, drawn_SL.T, strict=True)]
    return each, measure(exact_L.mean(), drawn_SL.mean(axis=1))


def calibration(confidence_N: Floats, right_N: Given) -> Measure:
    """Return how far confidence and the share that is right lie apart, in the mean over texts (expected calibration
    error: Naeini et al. 2015), in `BINS` bins of equal width (percentile bootstrap over texts)."""
    bins_NC = bin_of(confidence_N)[:, None] == np.arange(BINS)
    apart_NC = bins_NC * (confidence_N - right_N)[:, None]

    def of(times_SN: Floats) -> Floats:
        found: Floats = np.abs(times_SN @ apart_NC).sum(axis=1, keepdims=True) / len(confidence_N)
        return found

    exact = of(np.ones((1, len(confidence_N))))[0, 0]
    return measure(exact, resampled(of, len(confidence_N))[:, 0])


def bin_of(confidence_N: Floats) -> NDArray[np.int64]:
    """Return the bin of each confidence."""
    return np.minimum((confidence_N * BINS).astype(np.int64), BINS - 1)


def resampled(of: Callable[[Floats], Floats], count: int) -> Floats:
    """Compute figures on texts drawn with replacement, as many times as `RESAMPLES`."""
    chance, drawn = np.random.default_rng(SEED), []
    at_once = max(1, (1 << 22) // count)
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        drawn.append(of(chance.multinomial(count, np.full(count, 1 / count), size).astype(np.float64)))
    return np.concatenate(drawn)


def measure(value: float, drawn_S: Floats) -> Measure:
    """Return a figure with the percentiles of its resamples."""
    low, high = np.quantile(drawn_S, [LEVEL / 2, 1 - LEVEL / 2])
    return Measure(float(value), float(low), float(high))
