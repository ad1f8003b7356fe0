"""How a training's loss went, over steps, tokens and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flows.compare.rows import Row
from flows.compare.subjects import Subject
from flows.engine.store import Artifact
from llm.pretrain.config import tokens_at
from llm.score.statistics import Floats
from llm.training.events import read_events

MOST_POINTS = 400
"""Points of a curve as it is shown, at most: means of neighbours where there were more steps."""
EVENTS = Path("logs") / "events.jsonl"
AXES = ("tokens", "steps", "seconds")


@dataclass(frozen=True)
class Curve:
    """A loss at some steps."""

    steps: NDArray[np.int64]
    tokens: NDArray[np.int64]
    seconds: Floats
    """Seconds of training until then, the time between a kill and the next start left out."""
    values: Floats

    def as_json(self) -> dict[str, list[float]]:
        return {name: [round(float(one), 6) for one in getattr(self, name)] for name in (*AXES, "values")}


@dataclass(frozen=True)
class Curves:
    """The curves of one training."""

    training: Curve
    """Nats a token."""
    held_out: Curve
    """Bits a byte, as validation measured it."""

    def as_json(self) -> dict[str, Any]:
        return {
            "training_nats_per_token": self.training.as_json(),
            "held_out_bits_per_byte": self.held_out.as_json(),
        }


def trained(subject: Subject) -> bool:
    """Whether a training here made the model, which was checked on held-out text."""
    checks = subject.made.path / "validation.parquet"
    return checks.exists() and "bits_per_byte" in pq.read_schema(checks).names


def read_curves(training: Artifact) -> Curves:
    """The curves of a sealed training."""
    losses = pq.read_table(training.path / "losses.parquet")
    checks = pq.read_table(training.path / "validation.parquet")
    steps, tokens = losses["step"].to_numpy(), losses["tokens"].to_numpy()
    clock = clock_of(training.path / EVENTS)
    at = checks["step"].to_numpy()
    held_out = Curve(
        steps=at,
        tokens=tokens_at(training.manifest, at),
        seconds=seconds_at(at, clock),
        values=checks["bits_per_byte"].to_numpy(),
    )
    whole = Curve(
        steps=steps, tokens=tokens, seconds=seconds_at(steps, clock), values=losses["loss"].to_numpy()
    )
    return Curves(thinned(whole), held_out)


def curve_rows(curves: Sequence[Curves], stage: str) -> list[Row]:
    """Where each training of a stage stood at quarters of the tokens that all of them read."""
    if not curves:
        return []
    trainings = [one.training for one in curves]
    common = min(int(one.tokens[-1]) for one in trainings)
    rows = []
    for quarter in (1, 2, 3, 4):
        tokens = common * quarter // 4
        for name, of in (("loss", "values"), ("seconds", "seconds")):
            values = [float(np.interp(tokens, one.tokens, getattr(one, of))) for one in trainings]
            rows.append(Row(stage, f"{name} at {tokens:,} tokens", values))
    return rows


def clock_of(events: Path) -> dict[int, float]:
    """Step -> seconds of training until it was done for the last time."""
    clock: dict[int, float] = {}
    seconds, before = 0.0, None
    for event in read_events(events):
        if before is not None and event["event"] != "start":
            seconds += max(0.0, event["time"] - before)
        before = event["time"]
        if event["event"] in ("step", "skip"):
            clock[event["step"]] = seconds
    return clock


def seconds_at(steps: NDArray[np.int64], clock: dict[int, float]) -> Floats:
    """Seconds at each step; in between where a step was not logged."""
    known = sorted(clock)
    found: Floats = np.interp(steps, known, [clock[step] for step in known])
    return found


def thinned(curve: Curve) -> Curve:
    """At most `MOST_POINTS` of it: the means of as many groups of neighbours."""
    if len(curve.steps) <= MOST_POINTS:
        return curve
    groups = np.array_split(np.arange(len(curve.steps)), MOST_POINTS)
    last = [group[-1] for group in groups]
    means = np.array([curve.values[group].mean() for group in groups])
    return Curve(
        steps=curve.steps[last], tokens=curve.tokens[last], seconds=curve.seconds[last], values=means
    )
