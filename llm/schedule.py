"""The learning rate as a pure function of the step: linear warm-up, then half a cosine down to a floor
(Loshchilov and Hutter 2016, arXiv:1608.03983, without restarts)."""

from __future__ import annotations

import math


def learning_rate(step: int, *, steps: int, warmup: int, peak: float, floor_ratio: float) -> float:
    """The rate for ``step`` in ``range(steps)``.

    Rises over steps 0 .. warmup - 1 as peak (step + 1) / warmup, is ``peak`` at step ``warmup``, and reaches
    ``peak * floor_ratio`` at the last step.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (floor_ratio + (1 - floor_ratio) * (1 + math.cos(math.pi * min(1.0, share))) / 2)
