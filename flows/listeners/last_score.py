"""The bits per byte of a run, beside those of the model that its recipe made before, as the store has them.

Not as MLflow has them: that may be away, and slow, when a notice is sent.
"""

from __future__ import annotations

from itertools import takewhile
from math import isfinite
from pathlib import Path

from flows.engine.events import StepReused, StepSealed
from flows.engine.store import Artifact, Store
from flows.headline import BITS

SAME_TEXTS = ("documents", "bytes")
"""Metrics of an evaluation that are equal where the held-out texts are, whatever the tokenizer."""
ID_DIGITS = 8


def score_line(evaluated: StepSealed | StepReused, recipe: str, store: Path) -> str:
    """Bits per byte of an evaluation, and how they differ from the one before, in words; empty where it has none."""
    score = evaluated.metrics.get(BITS)
    if not isinstance(score, float) or not isfinite(score):
        return ""
    said = f"{'' if evaluated.step == evaluated.stage else f'{evaluated.step}: '}bits per byte {score:.4f}"
    before = evaluation_before(Store(store.parent), recipe, evaluated.step, evaluated.fingerprint)
    if before is None:
        return f"{said} (first run)"
    earlier, ids = before.metrics[BITS], (before.fingerprint, evaluated.fingerprint)
    if any(before.metrics.get(name) != evaluated.metrics.get(name) for name in SAME_TEXTS):
        return f"{said}; the model before had {earlier:.4f}, on other held-out texts"
    difference = f"{abs(score - earlier):.4f}"
    if not float(difference):
        return f"{said}, as the model before"
    way = "lower (better)" if score < earlier else "higher (worse)"
    compare = f"`llmill compare {' '.join(one[:ID_DIGITS] for one in ids)}`"
    return (
        f"{said}, {difference} {way} than the model before; {compare} says whether that is more than chance"
    )


def evaluation_before(store: Store, recipe: str, step: str, fingerprint: str) -> Artifact | None:
    """Find the newest evaluation by a step of a recipe, of those that were sealed before the one of ``fingerprint``."""
    ours = [
        one
        for one in store.artifacts("evaluate")
        if one.manifest.get("recipe") == recipe and one.manifest.get("step", one.stage) == step
    ]
    earlier = takewhile(lambda one: one.fingerprint != fingerprint, ours)
    return next((one for one in reversed([*earlier]) if BITS in one.metrics), None)
