"""Whether people prefer one of two models, by votes that each choose one, however often one looks at them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import optimize, special, stats

from llm.score.statistics import LEVEL


@dataclass(frozen=True)
class Preference:
    """The share of votes that choose the second of two models, how well it is known, and whether it is not a half."""

    share: float
    """Among those counted; a half where there are none."""
    low: float
    high: float
    """Ends of the 95% confidence sequence."""
    e_value: float
    """Evidence against a half; 1 / `LEVEL` and more shows one."""
    p_value: float
    """Two-sided, of the exact sign test: for one who looks once, after a number of votes fixed beforehand."""

    @property
    def shown(self) -> bool:
        """Whether the sequence leaves out a half."""
        return self.e_value >= 1 / LEVEL


def preference(first: int, second: int) -> Preference:
    """Estimate the share of people's choices that fall on the second of two models.

    One who looks after every vote, and stops when he likes what he sees, finds a difference between equal models
    sooner or later by any test for a fixed number of votes. So a share ``p`` is left out once the votes are
    1 / `LEVEL` times as likely under a uniform mixture of all shares as under ``p``: if ``p`` is true, that ratio is a
    martingale that begins at 1, and ever comes so high with probability `LEVEL` at most (Ville 1939; Robbins 1970,
    Annals of Mathematical Statistics 41(5); confidence sequences: Howard et al. 2021, Annals of Statistics 49(2)).

    Args:
        first: votes that choose the first model; ``second`` likewise.
    """
    votes = first + second
    mixture = float(special.betaln(second + 1, first + 1))

    def excess(p: float) -> float:
        """Compute the logarithm of the ratio, less that of the bound: convex, and below 0 at the votes' own share."""
        return mixture - float(special.xlogy(second, p) + special.xlog1py(first, -p)) + math.log(LEVEL)

    share = second / votes if votes else 0.5
    tiny = 1e-12
    return Preference(
        share=share,
        low=optimize.brentq(excess, tiny, share) if second else 0.0,
        high=optimize.brentq(excess, share, 1 - tiny) if first else 1.0,
        e_value=math.exp(min(700.0, mixture + votes * math.log(2))),
        p_value=float(stats.binomtest(second, votes).pvalue) if votes else 1.0,
    )
