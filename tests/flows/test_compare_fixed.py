"""Models on fixed sets and tasks: planted differences are found, and only what is the same set or task is compared."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_scores import Score, answers, printed, quiz

from flows.compare.cells import fixed
from flows.compare.claims import (
    FIRST,
    LESS,
    NONE,
    NOT_COMPARED,
    PERHAPS_LESS,
    SAME,
    SECOND,
    SEEDS,
    Least,
    outcome,
)
from flows.compare.compare import compare
from flows.compare.fixed import BITS, GOLD, RIGHT
from flows.compare.log import note
from flows.compare.page import page
from llm.score.statistics import Estimate, holm


def test_planted_differences_are_found_whichever_model_is_named_first(
    score: Score, files: dict[str, Path]
) -> None:
    fields = {"sets": {"novels": {"path": files["novels"]}}, "tasks": quiz(files)}
    worse, better = score(**fields), score(**fields, more=-0.05, right=0.6)
    for first, second, expected in ((worse, better, SECOND), (better, worse, FIRST)):
        found = answers(first, second)
        assert {key: one.claim.outcome for key, one in found.items()} == dict.fromkeys(
            [("novels", BITS), ("quiz", RIGHT), ("quiz", GOLD)], expected
        )
        for (name, metric), one in found.items():
            metrics = [subject.evaluation.metrics[f"{name}/{metric}"] for subject in (first, second)]
            assert one.claim.estimate is not None
            assert one.claim.estimate.difference == pytest.approx(metrics[1] - metrics[0])
            assert [value and value.value for value in one.values] == pytest.approx(metrics)
            assert not one.claim.estimate.low <= 0 <= one.claim.estimate.high
    raw = [one.claim.estimate.p_value for one in found.values() if one.claim.estimate]
    assert [one.claim.adjusted for one in found.values()] == holm(raw), "three questions are asked"
    assert found["quiz", RIGHT].difference.startswith("-10.0 points (-1")


def test_what_either_model_was_trained_on_is_said_with_the_difference_without_it(
    score: Score, files: dict[str, Path]
) -> None:
    fields = {"sets": {"novels": {"path": files["novels"]}}, "tasks": quiz(files)}
    first, second = score(**fields, right=0.5), score(**fields, more=0.1, right=0.6, seen=50)
    texts = len(files["novels"].read_text("utf-8").splitlines())
    for pair, sign in (((first, second), "+"), ((second, first), "-")):
        found = answers(*pair)
        assert found["quiz", RIGHT].why == (
            f"training documents hold 50 of 200, without which it is {sign}13.3 points"
        )
        assert f"without which it is {sign}13.3 points" in found["quiz", RIGHT].outcome
        assert found["quiz", GOLD].why.startswith("training documents hold 50 of 200, without which it is ")
        every = f"training documents hold {texts} of {texts}, and none is left"
        assert found["novels", BITS].why == every
        assert all(one.claim.estimate for one in found.values()), "all that both were scored on is tested"
    assert [one.why for one in answers(first, score(**fields)).values()] == ["", "", ""]


def test_models_that_do_not_differ_are_not_said_to_and_the_most_that_was_missed_is(
    score: Score, files: dict[str, Path]
) -> None:
    fields = {"sets": {"novels": {"path": files["novels"]}}, "tasks": quiz(files)}
    first, second = score(**fields), score(**fields)
    for one in answers(first, second).values():
        assert one.claim.outcome == NONE
        assert one.claim.estimate is not None
        assert one.claim.missed == max(-one.claim.estimate.low, one.claim.estimate.high)
        assert "one of up to " in one.outcome
    assert {one.claim.outcome for one in answers(first, first).values()} == {SAME}
    again = score(**fields, weights=1)
    assert {one.claim.outcome for one in answers(first, again).values()} == {SAME}


def test_of_two_seeds_of_one_recipe_none_is_better(score: Score, files: dict[str, Path]) -> None:
    fields = {"tasks": quiz(files), "lr": 1.0}
    found = answers(score(**fields), score(**fields, right=0.9))
    assert {one.claim.outcome for one in found.values()} == {SEEDS}


def test_what_has_one_name_and_is_not_the_same_is_not_compared_and_why_is_said(
    score: Score, files: dict[str, Path]
) -> None:
    first = score(
        sets={"novels": {"path": files["novels"]}, "cut": {"path": files["novels"]}}, tasks=quiz(files)
    )
    other = score(
        sets={"novels": {"path": files["others"]}, "cut": {"path": files["novels"], "max_documents": 11}},
        tasks=quiz(files, shots=2, delimiter="\n") | {"more": {"path": files["quiz"], "kind": "choice"}},
        more=1.0, right=1.0,
    )  # fmt: skip
    found = answers(first, other)
    assert {one.claim.outcome for one in found.values()} == {NOT_COMPARED}
    sums = [one.evaluation.manifest["config"]["sets"][0]["path"][:8] for one in (first, other)]
    assert {key: one.why for key, one in found.items()} == {
        (
            "novels",
            BITS,
        ): f"A and B were scored on different files of this name (sha256 {sums[0]} and {sums[1]})",
        ("cut", BITS): "A and B were scored with different settings: max_documents null and 11",
        (
            "quiz",
            RIGHT,
        ): 'A and B were scored with different settings: shots 0 and 2, delimiter " " and "\\n"',
        ("more", RIGHT): "only B was scored on it",
    }


def test_a_second_score_by_overlapping_windows_leaves_the_first_comparable(
    score: Score, files: dict[str, Path]
) -> None:
    sets = [{"novels": {"path": files["novels"], **more}} for more in ({}, {"stride": 8})]
    found = answers(score(sets=sets[0]), score(sets=sets[1], more=0.1))
    assert found["novels", BITS].claim.outcome == FIRST


def test_few_documents_are_not_compared(score: Score, files: dict[str, Path]) -> None:
    sets = {"short": {"path": files["short"]}}
    found = answers(score(sets=sets), score(sets=sets, more=1.0))
    assert found["short", BITS].outcome == "not compared: 9 documents are too few to compare, 10 are needed"


def test_answers_that_tokenizers_cut_otherwise_are_left_out_of_their_bits(
    score: Score, files: dict[str, Path]
) -> None:
    found = answers(score(tasks=quiz(files)), score(tasks=quiz(files), more=0.5, sizes=8))
    gold = found["quiz", GOLD]
    assert gold.claim.outcome == FIRST, "a quarter of the items remain"
    assert gold.why == "over 50 of 200 items, whose answers the tokenizers cut alike"
    assert gold.claim.estimate is not None
    first, second = gold.values
    assert first
    assert second
    assert second.value - first.value == pytest.approx(gold.claim.estimate.difference)


def test_all_questions_of_all_runs_are_adjusted_together(score: Score, files: dict[str, Path]) -> None:
    fields = {"sets": {"novels": {"path": files["novels"]}}, "tasks": quiz(files)}
    subjects = [
        score(**fields),
        score(**fields, right=0.51),
        score(**fields, right=0.52),
        score(tasks=quiz(files)),
    ]
    comparison = compare(subjects)
    found = comparison.verdict.fixed
    for shown in (printed(comparison), page(comparison)):
        assert "is shown of two runs at a time" in " ".join(shown.split())
    assert [f"{one.claim.second} {one.metric} {one.compared}" for one in found] == [
        *(f"{other} {metric} True" for other in "BC" for metric in (BITS, RIGHT, GOLD)),
        f"D {BITS} False", f"D {RIGHT} True", f"D {GOLD} True",
    ]  # fmt: skip
    raw = [one.claim.estimate.p_value for one in found if one.claim.estimate]
    assert [one.claim.adjusted for one in found if one.claim.estimate] == holm(raw)
    assert len(raw) == 8
    for one in found[:3]:
        [alone] = [other for other in compare(subjects[:2]).verdict.fixed if other.metric == one.metric]
        assert alone.claim.estimate == one.claim.estimate


def test_other_held_out_documents_leave_sets_and_tasks_to_decide(
    score: Score, files: dict[str, Path]
) -> None:
    sets = {"novels": {"path": files["novels"]}}
    first, second = score(sets=sets), score(sets=sets, more=-0.1, held_out="b")
    comparison = compare([first, second])
    said = comparison.verdict.about_models
    assert said.startswith(
        "held-out documents are not compared: A and B were evaluated on other documents (12 of 12"
    )
    assert "; by sets and tasks: novels (bits per byte): B is better than A: B − A = -0." in said
    assert "decided from one seed of each" in comparison.verdict.about_recipes
    assert [(row.name, row.comparable) for row in comparison.metrics if row.stage == "evaluate"] == [
        ("bits_per_byte", False),
        ("seconds", True),
    ]
    for shown in (printed(comparison), page(comparison), note(comparison).replace("\\", "")):
        assert "B is better than A" in " ".join(shown.split())
    nothing = compare([first, score(held_out="b")]).verdict
    assert nothing.about_models.startswith("can't be decided: A and C were evaluated on other documents")
    assert "score both on one set or task" in nothing.about_models
    assert "llmill compare RUN RUN --sets FILE --tasks FILE" in nothing.about_models


def test_what_only_score_made_is_compared_with_what_evaluations_made(
    score: Score, files: dict[str, Path]
) -> None:
    """And of several scores of a set, those of one kind; the screen says who has no held-out documents."""
    sets, few = (
        {"novels": {"path": files["novels"]}},
        {"novels": {"path": files["novels"], "max_documents": 50}},
    )
    first = score(sets=sets, tasks=quiz(files))
    second = score(sets=few, more=-0.1, scored={"sets": sets, "tasks": quiz(files)})
    third = score(evaluation=False, more=0.1, scored={"sets": sets, "tasks": quiz(files)})
    found = answers(first, second, third)
    assert [one.claim.outcome for one in compare([first, second]).verdict.fixed] == [SECOND, NONE, SECOND]
    assert {metric for _, metric in found} == {BITS, RIGHT, GOLD}
    said = compare([first, third]).verdict
    assert said.refused == "C is scored on sets and tasks only"
    assert "novels (bits per byte): A is better than C" in said.about_models
    assert "C is scored on sets and tasks only" in printed(compare([first, third]))
    alone = compare([third, third]).verdict
    assert alone.about_fixed == "C and C are the same model"


@pytest.mark.parametrize("columns", [80, 200])
def test_the_table_fits_the_terminal(score: Score, files: dict[str, Path], columns: int) -> None:
    fields = {"sets": {"novels": {"path": files["novels"]}}, "tasks": quiz(files)}
    comparison = compare([score(**fields), score(**fields, more=-0.05, right=0.51)])
    lines = printed(comparison, columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert {"novels", "quiz"} <= {line.partition(" ")[0] for line in lines}
    if columns == 200:
        [accuracy] = [" ".join(line.split()) for line in lines if "accuracy" in line]
        assert accuracy == (
            "quiz accuracy 50.0% (43.1 to 56.9) 51.0% (44.1 to 57.8) +1.0 points (-0.9 to +2.9) 0.250 "
            "no difference shown; one of up to 2.9 points may be missed"
        )


def test_text_of_people_is_shown_as_it_is(score: Score, files: dict[str, Path]) -> None:
    hostile = "<img src=x onerror=alert(1)> [red] 日本語 नमस्ते العربية \x1b]0;title\x07"
    comparison = compare([score(tasks=quiz(files)), score(tasks=quiz(files, delimiter=hostile))])
    assert "<img" not in page(comparison)
    assert "日本語 नमस्ते العربية" in page(comparison)
    assert "\x1b" not in printed(comparison)
    assert "[red] 日本語" in " ".join(printed(comparison, 1000).split())


def test_no_accuracy_is_shown_without_its_interval(score: Score, files: dict[str, Path]) -> None:
    comparison = compare([score(tasks=quiz(files)), score(tasks=quiz(files, seed=7), right=0.9)])
    [section] = fixed(comparison)
    [row] = section.rows
    assert row[:4] == ["quiz", "accuracy", "50.0% (43.1 to 56.9)", "90.0% (85.1 to 93.4)"]
    assert "seed 1234 and 7" in row[-1]
    assert not [one.name for one in comparison.metrics if "accuracy" in one.name or "centred" in one.name]
    assert "Sets and tasks" in page(comparison)
    assert "43.1 to" in printed(comparison)


@pytest.mark.parametrize(
    ("low", "high", "p", "expected"),
    [
        (0.02, 0.04, 0.01, FIRST),
        (-0.04, -0.02, 0.01, SECOND),
        (0.001, 0.009, 0.01, FIRST + LESS),
        (-0.009, -0.001, 0.01, SECOND + LESS),
        (0.005, 0.03, 0.01, FIRST + PERHAPS_LESS),
        (0.02, 0.04, 0.06, NONE),
    ],
)
def test_a_difference_is_held_against_the_least_that_matters(
    low: float, high: float, p: float, expected: str
) -> None:
    found = Estimate(difference=(low + high) / 2, low=low, high=high, p_value=p, smallest=1.0)
    assert outcome(found, p, 0.01) == expected
    opposite = {FIRST: SECOND, SECOND: FIRST}
    swapped = expected.replace(expected.partition(",")[0], opposite.get(expected.partition(",")[0], NONE))
    assert outcome(found, p, 0.01, more_is_better=True) == swapped
    assert outcome(found, p) == expected.partition(",")[0]


def test_the_least_of_accuracy_and_of_bits_are_apart(score: Score, files: dict[str, Path]) -> None:
    fields = {"sets": {"novels": {"path": files["novels"]}}, "tasks": quiz(files)}
    first, second = score(**fields), score(**fields, more=-0.05, right=0.6)
    found = answers(first, second, least=Least(bits_per_byte=0.2))
    assert found["novels", BITS].claim.outcome == SECOND + LESS
    assert found["novels", BITS].outcome == "B is better than A, by less than matters"
    assert found["quiz", RIGHT].claim.outcome == SECOND
    found = answers(first, second, least=Least(accuracy=0.1))
    assert found["quiz", RIGHT].outcome == "B is better than A, perhaps by less than matters"
