"""A budget of false findings over all comparisons that are looked at in a home, however many there come to be.

LOND (Javanmard and Montanari 2015, arXiv:1502.06197): look m is tested at the level of its share of the budget times
one more than the looks before it that found something. Of the looks that find something, those that find what is not
there are then no more than the budget, on average, if the looks are independent or depend on each other positively
(Zrnic, Ramdas and Jordan 2021, arXiv:1812.05068). Within a look, claims are adjusted by Holm's method.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import write_durably
from flows.compare.claims import FIRST, SECOND
from flows.compare.subjects import Subject
from flows.compare.verdict import Verdict
from flows.engine.store import shared_lock
from llm.score.statistics import LEVEL

FILE = "findings.json"
DECAY = 1.5
ZETA = 2.612375348685488
"""Sum of m^-1.5 over all m."""


@dataclass(frozen=True)
class Look:
    """A comparison that is paid from a budget."""

    key: str
    """The scores that are compared: the same ones are one look, however often."""
    number: int
    found: int
    """Looks before it that found something."""
    budget: float

    @property
    def level(self) -> float:
        """The level at which it is tested; never a laxer one than without a budget."""
        return min(LEVEL, share(self.number) * self.budget * (self.found + 1))

    @property
    def correction(self) -> float:
        """Factor of p-values by which `LEVEL` means this level."""
        return LEVEL / self.level

    def in_words(self) -> str:
        before = f"{self.found} of the looks before it found something" if self.number > 1 else "the first"
        return (
            f"look {self.number} of a home that allows {self.budget:.3g} of what is found to be false ({before}): "
            f"p-values are multiplied by {self.correction:.3g}, beside Holm's method; intervals are not widened"
        )


def share(number: int) -> float:
    """Return the part of the budget that look ``number``, from 1, has; all together are 1."""
    return number**-DECAY / ZETA


def look(home: Path, subjects: Sequence[Subject], budget: float) -> Look:
    """Return the look that a comparison is: a new one, or one that was looked at before.

    Raises:
        UserError: the home has another budget, or its record is damaged.
    """
    record = read(home)
    if record and record["budget"] != budget:
        raise UserError(
            f"--budget {budget:g}: {home} has a budget of {record['budget']:g}, of which {len(record['looks'])} looks "
            f"are paid;\nit can't be changed between looks: give that, or begin anew without {home / FILE}"
        )
    looks = record["looks"] if record else []
    key = key_of(subjects)
    place = next((place for place, one in enumerate(looks) if one["key"] == key), len(looks))
    return Look(key, number=place + 1, found=sum(one["found"] for one in looks[:place]), budget=budget)


def pay(home: Path, paid: Look, verdict: Verdict, names: Sequence[str]) -> None:
    """Record a look and whether it found something; one that is recorded already stays as it is."""
    with shared_lock(home / f".{FILE}.lock"):
        record = read(home) or {"budget": paid.budget, "looks": []}
        if any(one["key"] == paid.key for one in record["looks"]):
            return
        record["looks"].append(
            {
                "key": paid.key,
                "found": found_something(verdict),
                "names": list(names),
                "time": int(time.time()),
            }
        )
        write_durably(home / FILE, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False))


def read(home: Path) -> dict[str, Any]:
    """Read the record of a home; empty where nothing was paid.

    Raises:
        UserError: it is damaged.
    """
    path = home / FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"budget": float(record["budget"]), "looks": list(record["looks"])}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} can't be read, so no budget can be paid from: {error}") from None


def key_of(subjects: Sequence[Subject]) -> str:
    """Return the fingerprints of all scores that are compared, in any order."""
    scores = {one.fingerprint for subject in subjects for one in (subject.evaluation, *subject.scorings)}
    return " ".join(sorted(scores))


def found_something(verdict: Verdict) -> bool:
    """Say whether any claim of a verdict is that one is better."""
    answers = (one.claim for one in (*verdict.fixed, *verdict.fixed_recipes))
    claims = (*verdict.models, *verdict.recipes, *answers)
    return any(claim.outcome.startswith((FIRST, SECOND)) for claim in claims)
