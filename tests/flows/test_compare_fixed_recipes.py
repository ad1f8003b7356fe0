"""Recipes over seeds on fixed sets and tasks: which is better, which one a sweep names, what is promoted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made_up_scores import Score, printed, quiz

from flows.compare.claims import (
    NONE,
    SECOND,
)
from flows.compare.compare import compare
from flows.compare.fixed import BITS, GOLD, RIGHT
from flows.compare.promote import by_name, held_out
from flows.compare.subjects import Subject
from flows.compare.sweep import best_of
from flows.compare.verdict import judge
from llm.score.statistics import holm


def test_recipes_of_several_seeds_are_compared_on_sets_and_tasks_whatever_they_hold_out(
    score: Score, files: dict[str, Path]
) -> None:
    """As corpora are: the difference must be larger than that between seeds."""
    fields = {"sets": {"novels": {"path": files["novels"]}}, "tasks": quiz(files)}
    by_lr: dict[float, list[Subject]] = {}
    for lr, more, spread, right in ((1.0, 0.0, 0.01, 0.5), (2.0, -0.1, 0.02, 0.6), (3.0, -0.15, 0.2, 0.55)):
        by_lr[lr] = [
            score(**fields, lr=lr, more=more + spread * step, right=right + 0.01 * step, held_out=f"{lr}")
            for step in (-1, 0, 1)
        ]
    comparison = compare([*by_lr[1.0], *by_lr[2.0]])
    json.dumps(comparison.as_json(), allow_nan=False)
    verdict = comparison.verdict
    found = {(one.name, one.metric): one for one in verdict.fixed_recipes}
    assert comparison.as_json()["verdict"]["ranked_by"] == "novels"
    assert {key: one.claim.outcome for key, one in found.items()} == {
        ("novels", BITS): SECOND,
        ("quiz", RIGHT): SECOND,
        ("quiz", GOLD): SECOND,
    }
    for (name, metric), one in found.items():
        means = [
            np.mean([subject.evaluation.metrics[f"{name}/{metric}"] for subject in by_lr[lr]])
            for lr in (1.0, 2.0)
        ]
        assert one.claim.estimate is not None
        if metric != GOLD:  # whose bits are over the answers that all tokenizers cut alike
            assert one.claim.estimate.difference == pytest.approx(means[1] - means[0])
    raw = [one.claim.estimate.p_value for one in found.values() if one.claim.estimate]
    assert [one.claim.adjusted for one in found.values()] == holm(raw)
    shown = " ".join(printed(comparison).split())
    assert "Recipes on sets and tasks, over seeds" in shown
    assert "recipe 2 (lr 2.0) is better than recipe 1 (lr 1.0)" in verdict.about_recipes
    assert "standard deviations 0.0" in verdict.about_recipes
    noisy = compare([*by_lr[1.0], *by_lr[3.0]]).verdict
    assert {one.claim.outcome for one in noisy.fixed_recipes if one.metric == BITS} == {NONE}
    assert "may be missed" in noisy.about_recipes
    one_seed = compare([*by_lr[1.0], by_lr[2.0][0]]).verdict
    assert not one_seed.fixed_recipes
    assert "can't be decided from one seed of each" in one_seed.about_recipes


def test_of_recipes_that_hold_out_other_documents_the_best_is_by_the_first_set(
    score: Score, files: dict[str, Path]
) -> None:
    fields = {"sets": {"novels": {"path": files["novels"]}}, "tasks": quiz(files)}
    subjects = [
        score(**fields, lr=lr, more=more, held_out=f"{lr}")
        for lr, more in ((1.0, 0.0), (1.0, 0.01), (2.0, -0.1), (2.0, -0.11))
    ]
    members: Any = [SimpleNamespace(name=f"member {place}") for place in range(4)]
    best, why = best_of(compare(subjects).verdict, members)
    assert best is members[3]
    assert "bits per byte on novels: its recipe is shown to be better than every other" in why
    best, why = best_of(compare(subjects[1:3]).verdict, members[1:3])
    assert best is members[2]
    assert "is not shown to be better" in why


def test_a_candidate_has_to_be_no_worse_on_what_is_named(score: Score, files: dict[str, Path]) -> None:
    fields = {"sets": {"novels": {"path": files["novels"]}}, "tasks": quiz(files)}
    champion, better = score(**fields), score(**fields, more=-0.05, right=0.9, held_out="b")
    verdict = judge([champion, better])
    assert not held_out(verdict).holds
    assert "--on NAME goes by a set or task" in held_out(verdict).says
    gates = {name: by_name(verdict, name) for name in ("novels", "quiz", "rumour")}
    assert [gates[name].holds for name in gates] == [True, True, False]
    assert "points right against the champion, at worst +" in gates["quiz"].says
    assert "neither was scored on it" in gates["rumour"].says
    back = judge([better, champion])
    assert not by_name(back, "novels").holds
    assert not by_name(back, "quiz").holds
    assert by_name(judge([champion, champion]), "novels").holds
    unscored = judge([champion, score(tasks=quiz(files))])
    assert by_name(unscored, "novels").says.endswith("only A was scored on it")
