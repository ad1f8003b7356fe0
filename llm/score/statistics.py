"""Intervals and tests over documents: how well a score is known, whether two models differ, and two recipes over seeds.

All differences are second minus first, in bits per byte, where less is better. A model's score is a ratio of sums: the
bits of all documents over their bytes, so that a long document counts for more than a short one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
RESAMPLES = 10_000
SEED = 20_260_101
LEVEL = 0.05
POWER = 0.8
MIN_DOCUMENTS = 10
"""With fewer, resamples show little of the documents that there might have been."""
DRAWN = 1 << 22
"""Documents drawn at once, in all resamples: about 100 MB."""


@dataclass(frozen=True)
class Estimate:
    """A difference, how well it is known, and whether it is there."""

    difference: float
    low: float
    high: float
    """Upper end of the 95% interval; `low` is the lower one."""
    p_value: float
    """Two-sided, of no difference."""
    smallest: float
    """The smallest true difference that this test would show four times out of five."""


def paired_bootstrap(
    more_bits_PD: Floats, bytes_D: Floats, resamples: int = RESAMPLES, seed: int = SEED
) -> list[Estimate]:
    """For each of P pairs of models, how they differ over D documents that others might have been in place of.

    ``more_bits_PD`` are the bits that the second model of a pair needs more for a document than the first. Documents
    are drawn with replacement, the same ones for both models (Koehn 2004) and for all pairs. What counts of a draw is
    its difference in standard errors of its own (bootstrap-t: Efron and Tibshirani 1993, chapter 12.5; symmetric: Hall
    1988), for documents differ in length by orders of magnitude, and percentiles of the differences themselves then
    make intervals that are too short.
    """
    documents = len(bytes_D)
    values_VD = columns(more_bits_PD, bytes_D)
    differences, errors = ratios(values_VD.sum(axis=1)[None], documents)
    scores = []
    generator, at_once = np.random.default_rng(seed), max(1, DRAWN // documents)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = generator.integers(0, documents, (count, documents))
        drawn += np.arange(count)[:, None] * documents
        times = np.bincount(drawn.ravel(), minlength=count * documents).reshape(count, documents)
        found, error = ratios(times @ values_VD.T, documents)
        scores.append(in_errors(found - differences, error))
    scores_SP = np.concatenate(scores)
    own = in_errors(differences, errors)[0]
    quantiles = np.quantile(scores_SP, 1 - LEVEL, axis=0, method="higher")
    reaches = np.multiply(quantiles, errors[0], out=np.zeros_like(quantiles), where=errors[0] > 0)
    p_values = (1 + (scores_SP >= own).sum(axis=0)) / (1 + resamples)
    results = zip(differences[0], reaches, errors[0], p_values, strict=True)
    return [
        estimate(float(found), float(reach), float(error), float(p), documents - 1)
        for found, reach, error, p in results
    ]


def estimate(difference: float, reach: float, error: float, p_value: float, degrees: float) -> Estimate:
    """From the interval's half, the standard error and its degrees of freedom."""
    smallest = reach + float(stats.t.ppf(POWER, degrees)) * error
    return Estimate(
        difference=difference,
        low=difference - reach,
        high=difference + reach,
        p_value=p_value,
        smallest=smallest,
    )


def columns(more_bits_PD: Floats, bytes_D: Floats) -> Floats:
    """Return what has to be summed over documents to know P ratios and their errors, ``(3 P + 2, D)``."""
    return np.vstack([more_bits_PD, more_bits_PD**2, more_bits_PD * bytes_D, bytes_D, bytes_D**2])


def ratios(sums_SV: Floats, documents: int) -> tuple[Floats, Floats]:
    """From sums of `columns`: the ratios ``(S, P)``, and the standard error of each (Cochran 1977, section 6.4)."""
    sums, squares, products = np.split(sums_SV[:, :-2], 3, axis=1)
    size, size_squares = sums_SV[:, -2:-1], sums_SV[:, -1:]
    ratio = sums / size
    variance = squares - 2 * ratio * products + ratio**2 * size_squares
    return ratio, np.sqrt(np.maximum(variance, 0) * documents / (documents - 1)) / size


def in_errors(differences: Floats, errors: Floats) -> Floats:
    """How large differences are, in standard errors; those that have none count as more than all others, unless they
    are 0 themselves."""
    none = np.where(differences == 0, 0.0, np.inf)
    return np.divide(np.abs(differences), errors, out=none, where=errors > 0)


def seeds_test(first: Floats, second: Floats, more_bits_D: Floats, bytes_D: Floats) -> Estimate:
    """Whether two recipes differ, from the bits per byte of several seeds each, on the same documents.

    Welch's test (1947) with a third source of variance beside the two groups' seeds: the documents, of which
    ``more_bits_D`` says how many bits the second recipe's mean needs more. Degrees of freedom by Welch and
    Satterthwaite over all three.
    """
    documents = len(bytes_D)
    _, errors = ratios(columns(more_bits_D[None], bytes_D).sum(axis=1)[None], documents)
    parts = [(float(group.var(ddof=1)) / len(group), len(group) - 1) for group in (first, second)]
    parts.append((float(errors[0, 0]) ** 2, documents - 1))
    variance = sum(part for part, _ in parts)
    difference, error = float(second.mean() - first.mean()), math.sqrt(variance)
    if not error:  # nothing varies: neither seeds nor documents
        return estimate(difference, 0.0, 0.0, 0.0 if difference else 1.0, documents - 1)
    degrees = variance**2 / sum(part**2 / free for part, free in parts)
    reach = float(stats.t.ppf(1 - LEVEL / 2, degrees)) * error
    p_value = 2 * float(stats.t.sf(abs(difference) / error, degrees))
    return estimate(difference, reach, error, p_value, degrees)


def holm(p_values: Sequence[float], correction: float = 1.0) -> list[float]:
    """The p-values of several tests made at once, adjusted so that any false alarm keeps its level (Holm 1979).

    Args:
        correction: factor of each of them beforehand.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * correction * p_values[place]))
        adjusted[place] = highest
    return adjusted


def interval(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute the 95% interval of bits per byte over documents that these might have been drawn from; none of few."""
    scored = [row for row in rows if row["bytes"]]
    if len(scored) < MIN_DOCUMENTS:
        return {}
    bits_D = np.array([row["text_nats"] / math.log(2) for row in scored])
    sizes_D = np.array([row["bytes"] for row in scored], np.float64)
    resamples = min(RESAMPLES, max(500, 20_000_000 // len(scored)))  # a second or two, however many there are
    [found] = paired_bootstrap(bits_D[None], sizes_D, resamples)
    return {"bits_per_byte_low": found.low, "bits_per_byte_high": found.high}
