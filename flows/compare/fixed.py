"""Models on the sets and tasks that both were scored on, whatever documents their own corpora hold out.

A set is the same one where its file is (by its checksum) and all settings that change what is scored; so is a task.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from flows.compare.claims import ANY, NOT_COMPARED, SAME, SEEDS, Claim, Least, outcome
from flows.compare.rows import ABSENT, recipe_key
from flows.compare.subjects import Subject
from flows.engine.store import Artifact
from llm.score.mcnemar import mcnemar
from llm.score.seen import is_seen
from llm.score.statistics import MIN_DOCUMENTS, RESAMPLES, Estimate, Floats, holm, paired_bootstrap

BITS, GOLD, RIGHT = "bits_per_byte", "gold_bits_per_byte", "accuracy"
MEASURES = {
    BITS: "bits per byte",
    RIGHT: "accuracy",
    GOLD: "bits per byte of the answers",
}
"""Metric of a set or task -> its name on the screen."""
METRICS = {"sets": (BITS,), "tasks": (RIGHT, GOLD)}
"""Kind -> the metrics that are compared; by bits, the last one, runs can be ranked."""
KINDS = {"sets": ("set_documents.parquet", "set"), "tasks": ("items.parquet", "task")}
"""Where the rows of sets and of tasks are, and the column that names them."""
NOT_SCORED = frozenset({"stride"})
"""Settings that change none of the metrics compared here."""
DIGITS = 8
"""Digits of a checksum that are shown."""
DRAWN = 50_000_000
"""Documents or items that are drawn for a test, at most: seconds, however many there are."""

Row = Mapping[str, Any]
Key = tuple[str, str]
"""Kind and name of a set or task."""
Unit = tuple[float, float]
"""Bits and bytes of a document or answer; for accuracy whether an item is right, and 1."""


@dataclass(frozen=True)
class Value:
    """A metric of one model, with the ends of its 95% interval where there are any."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Answer:
    """Two models, or two recipes, on a set or a task by one metric."""

    name: str
    """The name of the set or task."""
    metric: str
    values: tuple[Value | None, Value | None]
    claim: Claim
    why: str = ""
    """Why they are not compared, or not on all items."""

    @property
    def compared(self) -> bool:
        return self.claim.outcome != NOT_COMPARED

    @property
    def difference(self) -> str:
        """``+0.0123 (+0.0021 to +0.0225)``, ``-4.0 points (-7.1 to -0.9)``; nothing where it is not known."""
        if (found := self.claim.estimate) is None:
            return ""
        middle, low, high = (self.number(one, "+") for one in (found.difference, found.low, found.high))
        return f"{middle}{' points' if self.metric == RIGHT else ''} ({low} to {high})"

    @property
    def outcome(self) -> str:
        """Who is better, or why that is not known."""
        if not self.compared:
            return f"not compared: {self.why}"
        missed = self.claim.missed
        unseen = "" if missed is None else "; how large a one may be missed is not known"
        if missed is not None and math.isfinite(missed):
            points = " points" if self.metric == RIGHT else ""
            unseen = f"; one of up to {self.number(missed)}{points} may be missed"
        found = self.claim.heading if missed is None else self.claim.outcome
        return found + unseen + (f" ({self.why})" if self.why else "")

    def in_words(self) -> str:
        """``novels (bits per byte): B is better than A: B − A = -0.0321 (-0.0400 to -0.0242)``."""
        claim = self.claim
        by = f": {claim.second} − {claim.first} = {self.difference}" if claim.estimate else ""
        return f"{self.name} ({MEASURES[self.metric]}): {self.outcome}{by}"

    def value_text(self, place: int) -> str:
        """One model's metric, with its interval where there is one."""
        value = self.values[place]
        if value is None:
            return ABSENT
        unit = "%" if self.metric == RIGHT else ""
        if value.low is None or value.high is None:
            return self.number(value.value) + unit
        return f"{self.number(value.value)}{unit} ({self.number(value.low)} to {self.number(value.high)})"

    def number(self, value: float, sign: str = "") -> str:
        """A value of the metric: a share in percent."""
        return f"{100 * value:{sign}.1f}" if self.metric == RIGHT else f"{value:{sign}.4f}"

    def as_json(self) -> dict[str, Any]:
        own = {"name": self.name, "metric": self.metric, "why": self.why}
        missed = self.claim.missed
        open_to = {"missed": missed if missed is not None and math.isfinite(missed) else None}
        values = [asdict(value) if value else None for value in self.values]
        return own | {"values": values} | self.claim.as_json() | open_to


@dataclass(frozen=True)
class Question:
    """Two models on the same documents or items, of which a test is to be made."""

    answer: Answer
    """The answer, but for the test."""
    more_bits: Floats
    """Bits that the second model needs more for each document."""
    bytes: Floats


@dataclass(frozen=True)
class Scoring:
    """A model on one set or task."""

    artifact: Artifact
    kind: str
    name: str
    config: Mapping[str, Any]
    """The settings that decide what is scored, with the file's checksum as ``path``."""

    @cached_property
    def rows(self) -> list[Row]:
        """A row a document or item, in the order of the file."""
        file, column = KINDS[self.kind]
        found: list[Row] = pq.read_table(
            self.artifact.path / file, filters=[(column, "==", self.name)]
        ).to_pylist()
        return found

    def value(self, metric: str) -> Value | None:
        """Return a metric, with its interval where it has one."""
        metrics = self.artifact.metrics
        found = [metrics.get(f"{self.name}/{metric}{end}") for end in ("", "_low", "_high")]
        return None if found[0] is None else Value(found[0], *found[1:])


def scorings(subject: Subject) -> dict[Key, list[Scoring]]:
    """Kind and name of each set and task -> what was made of it; that of its own evaluation comes first."""
    found = defaultdict(list)
    for artifact in (subject.evaluation, *subject.scorings):
        for kind in KINDS:
            for one in artifact.manifest["config"].get(kind, ()):
                config = {key: value for key, value in one.items() if key not in NOT_SCORED}
                found[kind, one["name"]].append(
                    Scoring(artifact=artifact, kind=kind, name=one["name"], config=config)
                )
    return found


def matched(first: Sequence[Scoring], other: Sequence[Scoring]) -> tuple[Scoring | None, Scoring | None]:
    """The two that scored the same, where there are such; else the first of each."""
    alike = ((a, b) for a in first for b in other if a.config == b.config)
    return next(alike, (next(iter(first), None), next(iter(other), None)))


def compare_fixed(subjects: Sequence[Subject], least: Least = ANY) -> list[Answer]:
    """Compare each later model with the first on each set and task, with p-values adjusted for all that is asked."""
    asked = [one for other in subjects[1:] for one in ask(subjects[0], other)]
    tested = tests([one for one in asked if isinstance(one, Question)])
    answers = [one if isinstance(one, Answer) else next(tested) for one in asked]
    adjusted = iter(
        holm([one.claim.estimate.p_value for one in answers if one.claim.estimate], least.correction)
    )
    seeds = {one.label for one in subjects[1:] if recipe_key(one) == recipe_key(subjects[0])}
    return [
        replace(one, claim=judged(one, one.claim.estimate, next(adjusted), least=least, seeds=seeds))
        if one.claim.estimate
        else one
        for one in answers
    ]


def ask(first: Subject, other: Subject) -> Iterator[Question | Answer]:
    """Yield what can be asked of two models, and answers where nothing has to be or can be."""
    claim, made = Claim(first.label, other.label, NOT_COMPARED), (scorings(first), scorings(other))
    for kind, name in {**made[0], **made[1]}:
        pair = matched(*(one.get((kind, name), []) for one in made))
        answers = [
            Answer(
                name=name,
                metric=metric,
                values=(value(pair[0], metric), value(pair[1], metric)),
                claim=claim,
            )
            for metric in METRICS[kind]
        ]
        if pair[0] is None or pair[1] is None:
            only = (other if pair[0] is None else first).label
            yield replace(answers[0], why=f"only {only} was scored on it")
        elif why := unlike(pair[0].config, pair[1].config, f"{first.label} and {other.label}"):
            yield replace(answers[0], why=why)
        elif first.model == other.model:
            yield from (replace(one, claim=replace(claim, outcome=SAME)) for one in answers)
        elif kind == "sets":
            yield by_document(marked(answers[0], pair[0], pair[1]), pair[0], pair[1])
        else:
            yield by_item(marked(answers[0], pair[0], pair[1]), pair[0], pair[1])
            yield by_gold(marked(answers[1], pair[0], pair[1]), pair[0], pair[1])


def marked(answer: Answer, first: Scoring, other: Scoring) -> Answer:
    """Say what the difference is without what the training documents of either model hold, where they hold any."""
    places = {place for one in (first, other) for place, row in enumerate(one.rows) if is_seen(row)}
    if not places:
        return answer
    rows = first.rows
    seen = {row.get("item", place) for place, row in enumerate(rows) if place in places}
    units = [
        {place: unit for place, unit in units_of(one, answer.metric).items() if place not in seen}
        for one in (first, other)
    ]
    what = f"training documents hold {len(seen):,} of {len(rows):,}"
    if not (left := paired(units)):
        return replace(answer, why=f"{what}, and none is left")
    bits_2, sizes_2 = np.array(left).sum(axis=0).T
    difference = answer.number(float((bits_2[1] - bits_2[0]) / sizes_2[0]), "+")
    unit = " points" if answer.metric == RIGHT else ""
    return replace(answer, why=f"{what}, without which it is {difference}{unit}")


def value(scoring: Scoring | None, metric: str) -> Value | None:
    return scoring.value(metric) if scoring else None


def unlike(a: Mapping[str, Any], b: Mapping[str, Any], labels: str) -> str:
    """Say in what two configs of a set or task differ; nothing where they don't."""
    if a["path"] != b["path"]:
        files = " and ".join(str(one["path"])[:DIGITS] for one in (a, b))
        return f"{labels} were scored on different files of this name (sha256 {files})"
    differ = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    settings = ", ".join(f"{name} {shown(a.get(name))} and {shown(b.get(name))}" for name in differ)
    return f"{labels} were scored with different settings: {settings}" if differ else ""


def shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def by_document(answer: Answer, first: Scoring, other: Scoring) -> Question | Answer:
    """Pair a set's documents, in the order of its file, for ids need not be unique."""
    known, others = ([(row["id"], row["bytes"]) for row in one.rows] for one in (first, other))
    if known != others:
        return replace(answer, why="their documents differ: another version of llmill read the file")
    return question(answer, paired([units_of(one, BITS) for one in (first, other)]), "documents")


def by_item(answer: Answer, first: Scoring, other: Scoring) -> Answer:
    """Test the shares of a task's items that are right, item by item."""
    right, others = ({row["item"]: row["right"] for row in one.rows} for one in (first, other))
    if right.keys() != others.keys():
        return replace(answer, why="their items differ: another version of llmill read the file")
    only_first = sum(right[item] and not others[item] for item in right)
    only_second = sum(others[item] and not right[item] for item in right)
    return tested(answer, mcnemar(only_first, only_second, len(right)))


def by_gold(answer: Answer, first: Scoring, other: Scoring) -> Question | Answer:
    """Pair the right answers of a task's items, where both models were scored on the same bytes of them.

    Options are scored from where their tokens differ, which depends on the tokenizer.
    """
    units = paired([units_of(one, GOLD) for one in (first, other)])
    if len(units) < len(first.rows):
        part = f"over {len(units):,} of {len(first.rows):,} items, whose answers the tokenizers cut alike"
        answer = replace(answer, why="; ".join(filter(None, (part, answer.why))))
    return question(answer, units, "answers")


def units_of(scoring: Scoring, metric: str) -> dict[int, Unit]:
    """Number of a document or item -> what is summed over them."""
    found = {}
    for place, row in enumerate(scoring.rows):
        if metric == BITS:
            found[place] = row["text_nats"] / math.log(2), float(row["bytes"])
        elif metric == RIGHT:
            found[row["item"]] = float(row["right"]), 1.0
        else:
            gold = row["gold"]
            found[row["item"]] = row["nats"][gold] / math.log(2), float(row["bytes"][gold])
    return found


def paired(runs: Sequence[Mapping[int, Unit]]) -> list[list[Unit]]:
    """Return ``(D, runs)``: each unit that has the same size above 0 in all runs."""
    return [
        units
        for place in runs[0]
        if all(place in run for run in runs)
        for units in [[run[place] for run in runs]]
        if len({size for _, size in units}) == 1 and units[0][1] > 0
    ]


def question(answer: Answer, units: Sequence[Sequence[Unit]], of: str) -> Question | Answer:
    """Return what is to be tested, of two models' documents; an answer where they are few."""
    if len(units) < MIN_DOCUMENTS:
        why = f"{len(units)} {of} are too few to compare, {MIN_DOCUMENTS} are needed"
        return replace(answer, why=why)
    units_D22 = np.array(units)
    bits, sizes = units_D22[:, :, 0].T, units_D22[:, 0, 1]
    if answer.metric == GOLD:
        first, second = (Value(float(total)) for total in bits.sum(axis=1) / sizes.sum())
        answer = replace(answer, values=(first, second))
    return Question(answer, bits[1] - bits[0], sizes)


def tests(questions: Sequence[Question]) -> Iterator[Answer]:
    """Yield an answer to each question; those about the same documents share the draws."""
    alike = defaultdict(list)
    for place, one in enumerate(questions):
        alike[one.bytes.tobytes()].append(place)
    found: dict[int, Estimate] = {}
    for places in alike.values():
        sizes = questions[places[0]].bytes
        resamples = min(RESAMPLES, max(2000, DRAWN // len(sizes)))
        more = np.array([questions[place].more_bits for place in places])
        found |= dict(zip(places, paired_bootstrap(more, sizes, resamples), strict=True))
    for place, one in enumerate(questions):
        yield tested(one.answer, found[place])


def tested(answer: Answer, estimate: Estimate) -> Answer:
    return replace(answer, claim=replace(answer.claim, estimate=estimate))


def judged(
    answer: Answer, estimate: Estimate, adjusted: float, *, least: Least, seeds: Collection[str]
) -> Claim:
    """Say which model is better; of two seeds of one recipe, none.

    Args:
        seeds: labels of the models of the first one's recipe.
    """
    if answer.claim.second in seeds:
        return replace(answer.claim, adjusted=adjusted, outcome=SEEDS)
    return decided(answer, estimate, adjusted, least)


def decided(answer: Answer, estimate: Estimate, adjusted: float, least: Least) -> Claim:
    """Say which is better by the answer's metric."""
    right = answer.metric == RIGHT
    smallest = least.accuracy if right else least.bits_per_byte
    found = outcome(estimate, adjusted, smallest, more_is_better=right)
    return replace(answer.claim, adjusted=adjusted, outcome=found)
