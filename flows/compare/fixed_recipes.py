"""Recipes on sets and tasks, over seeds: whether a corpus or a setting is better, whatever documents it holds out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from flows.compare.claims import NOT_COMPARED, Claim, Least
from flows.compare.fixed import (
    METRICS,
    RIGHT,
    Answer,
    Key,
    Scoring,
    Value,
    decided,
    paired,
    scorings,
    units_of,
)
from flows.compare.groups import Group
from flows.compare.subjects import Subject
from llm.score.statistics import MIN_DOCUMENTS, Floats, holm, seeds_test


@dataclass(frozen=True)
class Ranking:
    """One measure by which all runs can be put in an order; fewer bits are better."""

    name: str
    """``held-out documents``, or the name of a set or task."""
    bits_per_byte: Sequence[float]
    """Each run's."""


def ranked_on_fixed(subjects: Sequence[Subject]) -> Ranking | None:
    """Rank runs by the first set that all were scored on, or by the answers of the first such task."""
    made = [scorings(one) for one in subjects]
    common = [key for key in made[0] if shared(made, key)]
    for kind, name in sorted(common, key=lambda key: key[0] != "sets"):
        metric = METRICS[kind][-1]
        values = [one.value(metric) for one in shared(made, (kind, name))]
        if all(values):
            return Ranking(name, [one.value for one in values if one])
    return None


def compare_recipes(subjects: Sequence[Subject], groups: Sequence[Group], least: Least) -> list[Answer]:
    """Compare each pair of recipes that have several seeds, with p-values adjusted for all that is asked."""
    made = [scorings(one) for one in subjects]
    several = [group for group in groups if len(group.models) > 1]
    found = [answer for pair in combinations(several, 2) for answer in ask(made, *pair)]
    adjusted = holm([one.claim.estimate.p_value for one in found if one.claim.estimate], least.correction)
    return [
        replace(one, claim=decided(one, one.claim.estimate, p, least))
        for one, p in zip(found, adjusted, strict=True)
        if one.claim.estimate
    ]


def ask(made: Sequence[Mapping[Key, list[Scoring]]], first: Group, second: Group) -> Iterator[Answer]:
    """Yield the tests of two recipes on what all their models were scored on."""
    runs = [made[place] for place in (*first.models, *second.models)]
    for kind, name in runs[0]:
        found = shared(runs, (kind, name))
        for metric in METRICS[kind] if found else ():
            units = paired([units_of(one, metric) for one in found])
            if len(units) < MIN_DOCUMENTS:
                continue
            yield tested(name, metric, np.array(units), groups=(first, second))


def shared(made: Sequence[Mapping[Key, list[Scoring]]], key: Key) -> list[Scoring]:
    """Return what each run was scored with alike on a set or task; nothing where one was not."""
    for one in made[0].get(key, ()):
        found = [next((two for two in run.get(key, ()) if two.config == one.config), None) for run in made]
        if all(found):
            return [scoring for scoring in found if scoring]
    return []


def tested(name: str, metric: str, units_DR2: Floats, *, groups: tuple[Group, Group]) -> Answer:
    """Test two recipes by Welch's test over seeds and documents, or items."""
    first, second = groups
    bits_RD, sizes_D = units_DR2[:, :, 0].T, units_DR2[:, 0, 1]
    values_R = bits_RD.sum(axis=1) / sizes_D.sum()
    count = len(first.models)
    more_D = bits_RD[count:].mean(axis=0) - bits_RD[:count].mean(axis=0)
    estimate = seeds_test(values_R[:count], values_R[count:], more_D, sizes_D)
    parts = values_R[:count], values_R[count:]
    sds = " and ".join(in_unit(float(part.std(ddof=1)), metric) for part in parts)
    return Answer(
        name=name,
        metric=metric,
        values=(Value(float(parts[0].mean())), Value(float(parts[1].mean()))),
        claim=Claim(first.name, second.name, NOT_COMPARED, estimate=estimate),
        why=f"{len(parts[0])} and {len(parts[1])} seeds, standard deviations {sds}",
    )


def in_unit(value: float, metric: str) -> str:
    return f"{100 * value:.1f} points" if metric == RIGHT else f"{value:.4f}"
