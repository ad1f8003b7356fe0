"""Votes of people on pairs of answers, one a line of a file, and the tally of two models.

Votes that prefer neither answer are kept too; they say nothing of which model is better, and so take no part in the
test.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from data_pipeline.core.config import Config
from data_pipeline.core.errors import UserError
from data_pipeline.core.files import append_line
from data_pipeline.core.text import p_text
from llm.score.preference import Preference, preference

Choice = Literal["left", "right", "tie", "both_bad"]


class Model(Config):
    """A model as a vote names it."""

    name: str
    fingerprint: str


class Answer(Model):
    """An answer, and the model that gave it."""

    text: str
    finish: Literal["stop", "length"]
    """Whether the model ended it, or there was no more room."""


class Vote(Config):
    """A vote, and all that it was about."""

    id: str
    time: str
    """When it was given, in ISO 8601."""
    vote: Choice
    messages: tuple[dict[str, str], ...]
    """The conversation that both models answered."""
    left: Answer
    right: Answer
    seed: int
    """Fixes which model was left, and each model's draws."""
    temperature: float
    top_p: float
    max_tokens: int
    """Length of an answer, at most. The settings are those of both answers."""

    @model_validator(mode="after")
    def _is_of_two(self) -> Self:
        if len(self.pair) < 2:
            raise ValueError("both answers are of one model")
        return self

    @property
    def chosen(self) -> Answer | None:
        """The better answer; None where neither is."""
        return {"left": self.left, "right": self.right}.get(self.vote)

    @property
    def rejected(self) -> Answer | None:
        """The other one."""
        return {"left": self.right, "right": self.left}.get(self.vote)

    @property
    def pair(self) -> frozenset[str]:
        """The fingerprints of the two models."""
        return frozenset((self.left.fingerprint, self.right.fingerprint))


@dataclass(frozen=True)
class Votes:
    """All votes of a home."""

    votes: Sequence[Vote]
    """In the order in which they were given."""
    damaged: int
    """Lines that hold none: torn by a kill, or damaged from outside."""


def votes_file(home: Path) -> Path:
    """Return where a home keeps its votes."""
    return home / "votes" / "votes.jsonl"


def append_vote(file: Path, vote: Vote) -> None:
    """Keep a vote; it is on disk when this returns.

    Raises:
        OSError: it can't be.
    """
    append_line(file, json.dumps(vote.model_dump(), ensure_ascii=False, allow_nan=False))


def read_votes(file: Path) -> Votes:
    """Read all votes; none where the file is not there.

    Raises:
        UserError: it can't be read.
    """
    try:
        lines = file.read_bytes().split(b"\n") if file.exists() else []
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    votes, damaged = [], 0
    for line in filter(bytes.strip, lines):
        try:
            votes.append(Vote.model_validate_json(line))
        except ValueError:
            damaged += 1
    return Votes(votes, damaged)


@dataclass(frozen=True)
class Tally:
    """The votes between two models."""

    first: Model
    second: Model
    first_better: int
    second_better: int
    ties: int
    both_bad: int

    @property
    def votes(self) -> int:
        """All votes."""
        return self.first_better + self.second_better + self.ties + self.both_bad

    @property
    def preference(self) -> Preference:
        """The share that chooses the second model, of those that choose one."""
        return preference(self.first_better, self.second_better)

    @property
    def summary(self) -> str:
        """Whether a preference is shown, and not which, so that who reads it can vote on."""
        shown = "a preference is shown" if self.preference.shown else "no preference shown yet"
        return f"{counted(self.votes)}{self.without}: {shown}"

    @property
    def without(self) -> str:
        """The votes that choose neither, in brackets: `` (3 ties, 1 both bad)``."""
        ties = [f"{self.ties} tie{'' if self.ties == 1 else 's'}"] if self.ties else []
        bad = [f"{self.both_bad} both bad"] if self.both_bad else []
        return f" ({', '.join(ties + bad)})" if ties or bad else ""

    @property
    def led(self) -> Tally:
        """The same, with the leading model second."""
        if self.second_better >= self.first_better:
            return self
        return replace(
            self,
            first=self.second,
            second=self.first,
            first_better=self.second_better,
            second_better=self.first_better,
        )

    def in_words(self) -> str:
        """Report which model people prefer: ``B is preferred to A: ...``."""
        led, choosing = self.led, self.first_better + self.second_better
        found, name = led.preference, led.second.name
        heading = f"no preference shown between {self.first.name} and {self.second.name}"
        if found.shown:
            heading = f"{name} is preferred to {led.first.name}"
        if not choosing:
            return f"{heading}: {counted(self.votes)}{self.without}, none for one of them"
        return (
            f"{heading}: {counted(self.votes)}{self.without}; {name} is better in {led.second_better} of "
            f"{choosing} that choose one, {found.share:.0%} (95% interval {found.low:.0%} to {found.high:.0%}, however "
            f"often one looks; sign test, for who looks only once: p {p_text(found.p_value)})"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the counts and the test; shares are those of the second model."""
        found = self.preference
        outcome = "no preference shown"
        if found.shown:
            outcome = "second is preferred" if found.share > 0.5 else "first is preferred"
        return {
            "first": self.first.model_dump(),
            "second": self.second.model_dump(),
            "first_better": self.first_better,
            "second_better": self.second_better,
            "ties": self.ties,
            "both_bad": self.both_bad,
            "outcome": outcome,
            "share": found.share,
            "low": found.low,
            "high": found.high,
            "e_value": found.e_value,
            "p_value": found.p_value,
        }


def counted(votes: int) -> str:
    """``1 vote``, ``16 votes``."""
    return f"{votes:,} vote{'' if votes == 1 else 's'}"


def tally(votes: Sequence[Vote], first: Model, second: Model) -> Tally:
    """Count the votes between two models, whichever of them was left."""
    pair = {first.fingerprint, second.fingerprint}
    found = Counter(
        vote.chosen.fingerprint if vote.chosen else vote.vote for vote in votes if vote.pair == pair
    )
    return Tally(
        first=first,
        second=second,
        first_better=found[first.fingerprint],
        second_better=found[second.fingerprint],
        ties=found["tie"],
        both_bad=found["both_bad"],
    )


def tallies(votes: Sequence[Vote]) -> list[Tally]:
    """Count the votes of each pair of models; a model is called as it was called last."""
    models = {one.fingerprint: Model(name=one.name, fingerprint=one.fingerprint)
              for vote in votes for one in (vote.left, vote.right)}  # fmt: skip
    pairs = dict.fromkeys(vote.pair for vote in votes)
    named = (
        sorted((models[one] for one in pair), key=lambda one: (one.name, one.fingerprint)) for pair in pairs
    )
    return [tally(votes, first, second) for first, second in named]


def unfit(vote: Vote) -> str:
    """Return why a vote is no row of a training on preferences; empty where it is one."""
    if vote.chosen is None or vote.rejected is None:
        return "tie" if vote.vote == "tie" else "both bad"
    if not vote.chosen.text.strip():
        return "an empty answer is better"
    return "both answers are the same" if vote.chosen.text == vote.rejected.text else ""


def preference_row(vote: Vote) -> dict[str, Any]:
    """Return a vote that is not `unfit` as a row that a training on preferences reads."""
    assert vote.chosen
    assert vote.rejected
    return {
        "prompt": list(vote.messages),
        "chosen": [{"role": "assistant", "content": vote.chosen.text}],
        "rejected": [{"role": "assistant", "content": vote.rejected.text}],
        "chosen_fingerprint": vote.chosen.fingerprint,
        "rejected_fingerprint": vote.rejected.fingerprint,
        "vote": vote.id,
    }
