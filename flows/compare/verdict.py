"""Whether a model is better than another, and whether a recipe is: two claims, which are never mixed.

A model is what one run made; it is compared with another on the held-out documents, and on sets and tasks. A recipe is
all settings but the seeds; whether one is better than another can only be decided from several seeds of each.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from flows.compare.claims import ALIKE, ANY, SAME, SEEDS, UNKNOWN, Claim, Least, outcome
from flows.compare.fixed import Answer, compare_fixed
from flows.compare.fixed_recipes import Ranking, compare_recipes, ranked_on_fixed
from flows.compare.groups import Group, grouped
from flows.compare.rows import Row, recipe_rows
from flows.compare.scores import NotComparable, Scores, read_scores
from flows.compare.subjects import Subject
from llm.score.statistics import Estimate, holm, paired_bootstrap, seeds_test

HELD_OUT = "held-out documents"
MOST_IN_COMMAND = 3
ADD_SETS = (
    "score both on one set or task, without training any again: llmill compare RUN RUN --sets FILE --tasks FILE "
    "(docs/evaluate.md)"
)


@dataclass(frozen=True)
class Verdict:
    """All that the tests show."""

    refused: str = ""
    """Why nothing can be, by held-out documents."""
    scores: Scores | None = None
    ranking: Ranking | None = None
    """The measure that puts the runs in an order; None where they have none in common."""
    groups: list[Group] = field(default_factory=list)
    models: list[Claim] = field(default_factory=list)
    """Each later run against the first."""
    recipes: list[Claim] = field(default_factory=list)
    """Each pair of recipes."""
    advice: str = ""
    """The command whose runs would show what these can't."""
    fixed: list[Answer] = field(default_factory=list)
    """Each later run against the first, on sets and tasks."""
    fixed_recipes: list[Answer] = field(default_factory=list)
    """Each pair of recipes of several seeds, on sets and tasks."""
    least: Least = ANY

    @property
    def about_models(self) -> str:
        """The first claim, in a line; by sets and tasks where held-out documents say nothing."""
        if self.refused and self.about_fixed:
            return (
                f"held-out documents are not compared: {self.refused}; by sets and tasks: {self.about_fixed}"
            )
        if self.refused:
            return "; ".join(filter(None, [f"can't be decided: {self.refused}", self.advice]))
        return "; ".join(claim.in_words() for claim in self.models)

    @property
    def about_fixed(self) -> str:
        """Each later run against the first on all sets and tasks that both were scored on, in a line."""
        compared = [one for one in self.fixed if one.compared]
        said = (one.claim.in_words() if one.claim.outcome == SAME else one.in_words() for one in compared)
        return "; ".join(dict.fromkeys(said))

    @property
    def about_recipes(self) -> str:
        """The second claim, in a line."""
        if self.ranking is None:
            return f"can't be decided: {self.refused}"
        if len(self.groups) == 1:
            return one_recipe(self.groups[0], self.ranking)
        parts = [claim.in_words() for claim in self.recipes if claim.outcome != UNKNOWN]
        if any(len(group.models) < 2 for group in self.groups) and self.advice:
            parts.append(
                "whether a setting is better can't be decided from one seed of each: another seed of the same recipe "
                f"may differ as much; {self.advice}"
            )
        parts += [one.in_words() for one in self.fixed_recipes]
        return "; ".join(parts) or "nothing is said of recipes, for not all models were trained here"

    def as_json(self) -> dict[str, Any]:
        held_out = (
            {"documents": len(self.scores.ids), "bytes": self.scores.bytes.sum()} if self.scores else None
        )
        return {
            "refused": self.refused,
            "held_out": held_out,
            "about_models": self.about_models,
            "about_recipes": self.about_recipes,
            "models": [claim.as_json() for claim in self.models],
            "recipes": [claim.as_json() for claim in self.recipes],
            "groups": [group.as_json() for group in self.groups],
            "advice": self.advice,
            "about_sets_and_tasks": self.about_fixed,
            "sets_and_tasks": [answer.as_json() for answer in self.fixed],
            "recipes_on_sets_and_tasks": [answer.as_json() for answer in self.fixed_recipes],
            "ranked_by": self.ranking.name if self.ranking else "",
            "least": asdict(self.least),
        }


def judge(subjects: Sequence[Subject], least: Least = ANY) -> Verdict:
    """Both claims about some runs.

    Args:
        least: smaller differences don't matter, and are called so.
    """
    verdict = Verdict(fixed=compare_fixed(subjects, least), least=least)
    try:
        scores = read_scores(subjects)
        ranking: Ranking | None = Ranking(HELD_OUT, scores.bits_per_byte.tolist())
    except NotComparable as error:
        scores, ranking = None, ranked_on_fixed(subjects)
        shared = any(one.compared for one in verdict.fixed)
        verdict = replace(verdict, refused=str(error), advice="" if shared else ADD_SETS)
    if ranking is None:
        return verdict
    groups = grouped(subjects, ranking.bits_per_byte)
    verdict = replace(
        verdict, ranking=ranking, groups=groups, fixed_recipes=compare_recipes(subjects, groups, least)
    )
    if scores is None:
        one_seed = len(groups) > 1 and any(len(group.models) < 2 for group in groups)
        needed = one_seed and all(one.made.stage != "adopt" for one in subjects)
        return replace(verdict, advice=advice(subjects)) if needed else verdict
    recipes = recipe_claims(subjects, scores, groups, least=least)
    return replace(
        verdict,
        scores=scores,
        models=model_claims(subjects, scores, groups, least=least),
        recipes=recipes,
        advice=advice(subjects) if any(claim.outcome == UNKNOWN for claim in recipes) else "",
    )


def model_claims(
    subjects: Sequence[Subject], scores: Scores, groups: Sequence[Group], *, least: Least
) -> list[Claim]:
    """Each later run against the first."""
    first, others = subjects[0], subjects[1:]
    tested = [place for place, other in enumerate(others, 1) if other.model != first.model]
    estimates = iter(paired_bootstrap(scores.bits[tested] - scores.bits[0], scores.bytes) if tested else ())
    found = [next(estimates) if place in tested else None for place in range(1, len(subjects))]
    adjusted = iter(holm([one.p_value for one in found if one], least.correction))
    claims = []
    for other, estimate in zip(others, found, strict=True):
        if estimate is None:
            claims.append(Claim(first.label, other.label, SAME))
            continue
        p = next(adjusted)
        together = any({first.label, other.label} <= set(group.runs) for group in groups)
        claims.append(
            Claim(
                first=first.label,
                second=other.label,
                outcome=SEEDS if together else outcome(estimate, p, least.bits_per_byte),
                estimate=estimate,
                adjusted=p,
            )
        )
    return claims


def recipe_claims(
    subjects: Sequence[Subject], scores: Scores, groups: Sequence[Group], *, least: Least
) -> list[Claim]:
    """Each pair of recipes; of a recipe with a single seed, nothing is known, unless both make the same models."""
    pairs = list(combinations(groups, 2))
    makes = {group.label: {subjects[place].model for place in group.models} for group in groups}
    alike = [makes[first.label] == makes[second.label] for first, second in pairs]
    found = [None if same else over_seeds(scores, *pair) for pair, same in zip(pairs, alike, strict=True)]
    adjusted = iter(holm([one.p_value for one in found if one], least.correction))
    claims = []
    for (first, second), same, estimate in zip(pairs, alike, found, strict=True):
        if same:
            claims.append(Claim(first.name, second.name, ALIKE))
            continue
        if estimate is None:
            claims.append(Claim(first.name, second.name, UNKNOWN))
            continue
        p = next(adjusted)
        claims.append(
            Claim(
                first=first.name,
                second=second.name,
                outcome=outcome(estimate, p, least.bits_per_byte),
                estimate=estimate,
                adjusted=p,
            )
        )
    return claims


def over_seeds(scores: Scores, first: Group, second: Group) -> Estimate | None:
    if min(len(first.models), len(second.models)) < 2:
        return None
    more = scores.bits[second.models].mean(axis=0) - scores.bits[first.models].mean(axis=0)
    return seeds_test(np.array(first.bits_per_byte), np.array(second.bits_per_byte), more, scores.bytes)


def one_recipe(group: Group, ranking: Ranking) -> str:
    """Describe several runs of one recipe, between which there is no difference to claim."""
    if group.spread is None:
        return "no difference: they are the same model"
    low, high = min(group.bits_per_byte), max(group.bits_per_byte)
    on = f" on {ranking.name}" if ranking.name != HELD_OUT else ""
    return (
        f"no difference: these are seeds of one recipe ({len(group.models)} models, {low:.4f} to {high:.4f} bits per "
        f"byte{on}, standard deviation {group.spread:.4f})"
    )


def advice(subjects: Sequence[Subject]) -> str:
    """Return what to run so that recipes can be compared."""
    rows = recipe_rows(subjects)
    can_be_set = all(row.stage != "download" and row.name != "version" for row in rows)
    if not can_be_set or len(rows) > MOST_IN_COMMAND:
        return "run each recipe with --set pretrain.seed=1, 2 and 3, and compare all these runs"
    grids = [word for row in rows for word in ("--grid", f"{row.stage}.{row.name}={values_text(row)}")]
    return f"this would show it: {shlex.join(['llmill', 'sweep', 'RECIPE', *grids, '--seeds', '3'])}"


def values_text(row: Row) -> str:
    different = dict.fromkeys(
        json.dumps(value, allow_nan=False) if not isinstance(value, str) else value for value in row.values
    )
    return ",".join(different)
