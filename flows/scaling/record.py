"""Ladders and forecasts as files of a home: what was measured, what was foreseen before it was, and how that came out.

A forecast names the fingerprint of an evaluation that is not there yet, and the SHA-256 of the forecast before it: so
none can be changed, taken out or put in later without its being seen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import write_durably
from flows.engine.store import Store, canonical_json
from flows.headline import BITS
from llm.scaling.law import Interval, Ladder, Rung

LADDERS, FORECASTS = "ladders", "forecasts"
LATEST = "latest"


@dataclass(frozen=True, kw_only=True)
class Record:
    """A ladder as it was made."""

    name: str
    recipe: str
    made: str
    """Time, in ISO 8601."""
    key: str
    """The key by which its run is found in MLflow."""
    text: Mapping[str, str]
    """Fingerprints of the tokens and the tokenizer, and what decides which documents are evaluated."""
    flops_per_second: float
    """Rate of the largest budget's trainings, with their start."""
    rungs: Sequence[Rung]

    @property
    def ladder(self) -> Ladder:
        """Its runs, and the law through them."""
        return Ladder(tuple(self.rungs))


def write_ladder(home: Path, record: Record) -> Path:
    """Write a ladder; return where."""
    path = home / LADDERS / f"{record.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")
    return path


def read_ladder(home: Path, name: str) -> Record:
    """Read a ladder by its name; ``latest`` is the last that was made.

    Raises:
        UserError: there is none of that name.
    """
    found = {path.stem: path for path in sorted((home / LADDERS).glob("*.json"))}
    if not found:
        raise UserError(f"no ladder {name}: {home} has none yet; llmill ladder RECIPE --flops ... makes one")
    records = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items()}
    if name == LATEST:
        name = max(records, key=lambda one: str(records[one]["made"]))
    if name not in records:
        raise UserError(f"no ladder is called {name}; there are {', '.join(records)}")
    values = records[name]
    return Record(**{**values, "rungs": [Rung(**one) for one in values["rungs"]]})


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The loss of a training that has not run, as it was foreseen."""

    number: int
    made: str
    ladder: str
    recipe: str
    settings: Sequence[str]
    parameters: int
    tokens: int
    flops: float
    beyond: float
    """FLOPs over those of the ladder's largest budget."""
    middle: float
    low: float
    high: float
    """Bits per byte, with the bounds that hold it nine times in ten."""
    evaluation: str
    """Fingerprint of the evaluation that will measure it."""
    before: str
    """SHA-256 of the forecast before it; empty for the first."""

    @property
    def sha256(self) -> str:
        """The name that the next one has for it."""
        return hashlib.sha256(canonical_json(asdict(self)).encode()).hexdigest()

    @property
    def interval(self) -> Interval:
        """The loss that is foreseen."""
        return Interval(self.middle, self.low, self.high)

    def measured(self, store: Store) -> float | None:
        """Return what came of it; None where it has not run."""
        made = store.get("evaluate", self.evaluation)
        return made.metrics.get(BITS) if made else None


def read_forecasts(home: Path) -> list[Forecast]:
    """Read all forecasts of a home, in their order.

    Raises:
        UserError: one was changed, taken out or put in.
    """
    found: list[Forecast] = []
    for path in sorted((home / FORECASTS).glob("[0-9]*.json")):
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sha256 = values.pop("sha256")
        one = Forecast(**values)
        if one.sha256 != sha256 or one.before != (found[-1].sha256 if found else ""):
            raise UserError(f"{path} is not what was written, or one before it was changed or taken out")
        found.append(one)
    return found


def write_forecast(home: Path, forecast: Forecast) -> Path:
    """Seal a forecast; return where.

    Raises:
        FileExistsError: another has that number.
    """
    path = home / FORECASTS / f"{forecast.number:05d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {**asdict(forecast), "sha256": forecast.sha256}
    whole = path.with_name(f".{os.getpid()}.json")
    write_durably(whole, json.dumps(values, indent=1, allow_nan=False) + "\n")
    try:
        os.link(whole, path)  # which replaces nothing, and is whole at once
    finally:
        whole.unlink()
    return path
