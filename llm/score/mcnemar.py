"""Whether two models answer different shares of the same items right."""

from __future__ import annotations

import math

from scipy import stats

from llm.score.statistics import LEVEL, POWER, Estimate


def mcnemar(only_first: int, only_second: int, items: int) -> Estimate:
    """Estimate by how much more of ``items`` a second model answers right than a first one.

    Only the items that one of the two alone has right tell them apart. The p-value is McNemar's (1947), in its exact
    conditional form with half of the probability of what was seen (mid-p), which unlike the exact one is not deaf; the
    interval is Wald's with an item more in each of the two cells (Bonett and Price 2012): the test and the interval
    that Fagerland, Lydersen and Laake recommend (2013, BMC Medical Research Methodology 13:91; 2014, Statistics in
    Medicine 33(16)).

    Args:
        only_first: items that the first model alone has right; ``only_second`` likewise.
    """
    fewer, differ = min(only_first, only_second), only_first + only_second
    p_value = 2 * stats.binom.cdf(fewer, differ, 0.5) - stats.binom.pmf(fewer, differ, 0.5) if differ else 1.0
    first, second = ((count + 1) / (items + 2) for count in (only_first, only_second))
    middle = second - first
    error = math.sqrt((first + second - middle**2) / (items + 2))
    reach = float(stats.norm.ppf(1 - LEVEL / 2)) * error
    return Estimate(
        difference=(only_second - only_first) / items,
        low=max(-1.0, middle - reach),
        high=min(1.0, middle + reach),
        p_value=min(1.0, float(p_value)),
        smallest=reach + float(stats.norm.ppf(POWER)) * error,
    )
