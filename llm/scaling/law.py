"""The law L(N, D) = E + A / N^alpha + B / D^beta of loss by parameters and tokens (Hoffmann et al. 2022,
arXiv:2203.15556), fitted as there: by the Huber loss of log L (approach 3), and the least loss for some FLOPs by a
parabola through the runs of each budget (approach 2). What is not certain comes from a bootstrap over runs and their
seeds, from residuals, and from how far the law was off when it foresaw the largest budget from the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

Values = npt.NDArray[np.float64]
HUBER = 1e-3
"""Residual of log L from which it counts linearly, Hoffmann's."""
RESAMPLES = 200
DRAWS = 25
"""Predictions that are drawn from each resample."""
LEAST_BUDGETS = 3
"""Fewer can't show how far off the law is on a larger one."""
FREE = 5
"""Numbers that are fitted."""
BOUNDS = ((-12.0, 4.0), (-12.0, 4.0), (-6.0, 4.0), (0.02, 2.0), (0.02, 2.0))
"""Bounds of the logs of the three terms at the middle of the runs, over the loss there, and of the exponents."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A training of a ladder."""

    parameters: int
    """Numbers in matrices: blocks and head."""
    tokens: int
    flops: float
    loss: float
    """In any unit; of runs on the same held-out text."""
    budget: float
    """FLOPs that it was made for."""


@dataclass(frozen=True)
class Law:
    """A fitted law."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss of a training."""
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    def optimum(self, flops: float) -> float:
        """Return the parameters that reach the least loss for ``flops`` = 6 N D."""
        share = 1 / (self.alpha + self.beta)
        return float(
            (self.alpha * self.A / (self.beta * self.B)) ** share * (flops / 6) ** (self.beta * share)
        )


@dataclass(frozen=True)
class Interval:
    """A number and the bounds that hold it nine times in ten."""

    middle: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def fit(rungs: Sequence[Rung], weights: Values | None = None, near: Law | None = None) -> Law:
    """Fit the law to runs, each with a weight; from many starts, or from one law only.

    The terms are fitted at the middle of the runs, where they say least about one another.
    """
    n = np.log([one.parameters for one in rungs])
    d = np.log([one.tokens for one in rungs])
    log_loss = np.log([one.loss for one in rungs])
    weights = np.ones(len(rungs)) if weights is None else weights
    n0, d0, l0 = n.mean(), d.mean(), log_loss.mean()
    logs = np.array([n - n0, d - d0])

    def objective(point: Values) -> tuple[float, Values]:
        exponents = point[3:]
        terms = np.exp(
            np.vstack([point[:2, None] - exponents[:, None] * logs, np.full((1, len(n)), point[2])])
        )
        total = terms.sum(axis=0)
        residual = np.log(total) + l0 - log_loss
        small = np.abs(residual) <= HUBER
        value = np.where(small, residual**2 / 2, HUBER * (np.abs(residual) - HUBER / 2))
        slope = weights * np.where(small, residual, HUBER * np.sign(residual)) / total
        of_terms = (slope * terms).sum(axis=1)
        of_exponents = -(slope * terms[:2] * logs).sum(axis=1)
        return float(weights @ value) / HUBER, np.concatenate([of_terms, of_exponents]) / HUBER

    starts: Iterable[Sequence[float]]
    if near is None:
        starts = itertools.product((-2.5, -1.0), (-2.5, -1.0), (-2.0, -0.3), (0.2, 0.6), (0.2, 0.6))
    else:
        terms = [near.A * math.exp(-near.alpha * n0), near.B * math.exp(-near.beta * d0), near.E]
        starts = [[*(math.log(max(one, 1e-9)) - l0 for one in terms), near.alpha, near.beta]]
    found = [minimize(objective, start, jac=True, method="L-BFGS-B", bounds=BOUNDS) for start in starts]
    a, b, e, alpha, beta = min(found, key=lambda one: float(one.fun)).x.tolist()
    return Law(
        E=math.exp(e + l0),
        A=math.exp(a + l0 + alpha * n0),
        alpha=alpha,
        B=math.exp(b + l0 + beta * d0),
        beta=beta,
    )


@dataclass(frozen=True)
class Ladder:
    """Runs, and the law through them."""

    rungs: tuple[Rung, ...]
    seed: int = 0
    """Seed of the resamples."""

    @cached_property
    def law(self) -> Law:
        """The law through all runs."""
        return fit(self.rungs)

    @property
    def budgets(self) -> list[float]:
        """FLOPs that runs were made for, rising."""
        return sorted({one.budget for one in self.rungs})

    @cached_property
    def residuals(self) -> Values:
        """Logs of the runs' losses over the law's."""
        return np.array(
            [math.log(one.loss / self.law.loss(one.parameters, one.tokens)) for one in self.rungs]
        )

    @cached_property
    def resampled(self) -> list[Law]:
        """Laws through resamples: of the runs' settings with replacement, and of the seeds of each."""
        draw = np.random.default_rng(self.seed)
        groups: dict[tuple[int, int], list[int]] = {}
        for place, one in enumerate(self.rungs):
            groups.setdefault((one.parameters, one.tokens), []).append(place)
        members = list(groups.values())
        laws = []
        for _ in range(RESAMPLES):
            weights = np.zeros(len(self.rungs))
            for group in draw.integers(len(members), size=len(members)):
                for place in draw.choice(members[group], size=len(members[group])):
                    weights[place] += 1
            laws.append(fit(self.rungs, weights, near=self.law))
        return laws

    @cached_property
    def drift(self) -> float:
        """Error (root mean square, of log L) of the law of the smaller budgets on the largest one, for each factor e of
        FLOPs that lies between that and the next; 0 where there are too few budgets to say."""
        if len(self.budgets) < LEAST_BUDGETS:
            return 0.0
        largest, before = self.budgets[-1], self.budgets[-2]
        law = fit([one for one in self.rungs if one.budget < largest], near=None)
        off = [
            math.log(one.loss / law.loss(one.parameters, one.tokens))
            for one in self.rungs
            if one.budget == largest
        ]
        return math.sqrt(sum(one**2 for one in off) / len(off)) / math.log(largest / before)

    def forecast(self, *, parameters: int, tokens: int, flops: float) -> Interval:
        """Foresee the loss of a training, with the bounds of a single run."""
        draw = np.random.default_rng(self.seed)
        spread = math.sqrt(len(self.rungs) / max(1, len(self.rungs) - FREE))
        beyond = max(0.0, math.log(flops / self.budgets[-1]))
        logs = np.log([one.loss(parameters, tokens) for one in self.resampled])[:, None]
        chance = draw.choice(self.residuals, size=(len(logs), DRAWS)) * spread
        chance = chance + draw.normal(size=(len(logs), DRAWS)) * self.drift * beyond
        low, high = np.exp(np.quantile(logs + chance, (0.05, 0.95))).tolist()
        return Interval(self.law.loss(parameters, tokens), low, high)

    def optimum(self, flops: float) -> Interval:
        """Return the parameters of the least loss for some FLOPs (approach 3)."""
        low, high = np.quantile([one.optimum(flops) for one in self.resampled], (0.05, 0.95)).tolist()
        return Interval(self.law.optimum(flops), low, high)

    def exponent(self) -> Interval:
        """Return the exponent a of N ~ C^a of the least loss (approach 3)."""
        low, high = np.quantile(
            [one.beta / (one.alpha + one.beta) for one in self.resampled], (0.05, 0.95)
        ).tolist()
        return Interval(self.law.beta / (self.law.alpha + self.law.beta), low, high)

    def valley(self, budget: float) -> float | None:
        """Return the parameters of the least loss of a budget, by a parabola in log N through its runs (approach 2);
        None where the least lies at an end, or nowhere."""
        mine = [one for one in self.rungs if one.budget == budget]
        logs = np.log([one.parameters for one in mine])
        if len(set(logs.tolist())) < 3:
            return None
        curve, slope, _ = np.polyfit(logs - logs.mean(), [one.loss for one in mine], 2).tolist()
        if curve <= 0:
            return None
        least = logs.mean() - slope / (2 * curve)
        return float(math.exp(least)) if logs.min() <= least <= logs.max() else None
