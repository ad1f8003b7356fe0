"""How often sets and tasks are scored while a model is trained, so that it costs little of the training.

It is decided by numbers of tokens, not by a clock: so a training that resumes scores at the same steps. To read a token
is a third of the work of training on it (Kaplan et al. 2020, arXiv:2001.08361, section 2.1), but scores are computed in
fp32, which takes up to three times as long as bf16 does on a CPU, and the other ranks wait. So a token that is scored
counts as one trained on, on each rank.
"""

from __future__ import annotations

import math

MOST_SCORING = 0.02
"""Share of a training that scores in its loop may take: of its tokens where it is left open how often they are made, of
its time before a warning."""


def affordable(steps: int, checks: int, cost: float) -> int:
    """Return the steps between scores: ``checks``, or the multiple of it by which all of them cost `MOST_SCORING`.

    Args:
        steps: those of the training; it is scored after the last one in any case.
        checks: steps between validations.
        cost: tokens scored at once, on all ranks, as a share of those that are trained on.
    """
    times = max(1, int(MOST_SCORING / cost))
    return checks * math.ceil(steps / (checks * times))


def describe(steps: int, every: int, tokens: int, cost: float) -> str:
    """Describe for a person how often it is scored and what that costs; arguments as of `affordable`."""
    times = math.ceil(steps / every)
    when = f"{times:,} times, each {every:,} steps" if times > 1 else "once, after the last step"
    share = times * cost
    key = "pretrain.runtime.validate_on"
    advice = f"raise {key}.every, or lower its items" if times > 1 else f"lower {key}.items"
    dear = f", more than {MOST_SCORING:.0%}: {advice}" if share > MOST_SCORING else ""
    return (
        f"sets and tasks are scored {when}: about {tokens:,} tokens each time, "
        f"in all {share:.2%} of the training's tokens{dear}"
    )
