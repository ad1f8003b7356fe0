"""Models on fixed sets and tasks: planted differences are found, and only what is the same set or task is compared."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from tokenizers import Tokenizer, models

from data_pipeline.train_tokenizer.tokenizer import END_OF_TEXT
from flows.compare.cells import fixed
from flows.compare.claims import (
    ANY,
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
from flows.compare.fixed import BITS, GOLD, RIGHT, Answer
from flows.compare.log import note
from flows.compare.mcnemar import mcnemar
from flows.compare.page import page
from flows.compare.promote import by_name, held_out
from flows.compare.show import show
from flows.compare.subjects import Finder, Subject, label
from flows.compare.sweep import best_of
from flows.compare.verdict import judge
from flows.engine.store import Artifact, Store
from flows.listeners.terminal import Screen
from llm.evaluate.config import EvaluateConfig
from llm.score.config import FixedConfig, ScoreConfig, TaskConfig
from llm.score.fixed import Fixed
from llm.score.statistics import Estimate, holm

TEXTS: list[str] = list(
    json.loads((Path(__file__).parents[1] / "ordinary_texts.json").read_text("utf-8")).values()
)
ITEMS = 200
Score = Callable[..., Subject]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A set of texts in many scripts, another of them under the same name, and a task."""
    contents = {
        "novels": [{"text": text} for text in TEXTS],
        "others": [{"text": text} for text in TEXTS[::-1]],
        "short": [{"text": text} for text in TEXTS[:9]],
        "quiz": [{"query": text, "choices": ["да", "いいえ"], "gold": 0} for text in (TEXTS * ITEMS)[:ITEMS]],
    }
    paths = {}
    for name, rows in contents.items():
        paths[name] = tmp_path / f"{name}.jsonl"
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        paths[name].write_text("".join(lines), "utf-8")
    return paths


def seal(store: Store, stage: str, number: int, files: dict[str, Any], **fields: Any) -> Artifact:
    """Seal an artifact; ``files`` are bytes, or the functions that write them into a folder."""
    name = f"{number:02x}"
    if found := store.get(stage, name):
        return found
    folder, _ = store.begin(stage, name, {})
    for path, content in files.items():
        content(folder) if callable(content) else (folder / path).write_bytes(content)
    inputs = {
        type_: {"stage": one.stage, "fingerprint": one.fingerprint, "payload_sha256": one.payload_sha256}
        for type_, one in fields.pop("inputs", {}).items()
    }
    shared = {
        "version": 1,
        "config": {},
        "metrics": {},
        "finished": "2026-01-01",
        "seconds": 1.0,
        "recipe": "r",
    }
    return store.seal(stage, name, shared | {"inputs": inputs} | fields)


@pytest.fixture
def score(tmp_path: Path) -> Score:
    """``score(...)``: seal a model and its evaluation, whose scores are made up, and whose identity is a real one."""
    store, made = Store(tmp_path / "home"), list[int]()

    def evaluated(
        *,
        sets: dict[str, dict[str, Any]] | None = None,
        tasks: dict[str, dict[str, Any]] | None = None,
        scored: dict[str, dict[str, dict[str, Any]]] | None = None,
        evaluation: bool = True,
        more: float = 0.0,
        right: float = 0.5,
        sizes: int = 7,
        weights: int | None = None,
        lr: float | None = None,
        held_out: str = "a",
    ) -> Subject:
        number = len(made) + 1
        made.append(number)
        tokenizer = Tokenizer(models.WordLevel({END_OF_TEXT: 0, "x": 1}, unk_token="x"))
        own = weights or number
        sealed = {
            "tokenizer": seal(store, "train_tokenizer", 1, {"tokenizer.json": tokenizer.to_str().encode()})
        }
        sealed["model"] = seal(
            store, "pretrain", number, {"model.safetensors": bytes([own]), "model.json": b"{}"}, inputs=dict(sealed),
            config={"lr": lr or number, "seed": number},
        )  # fmt: skip
        rows = [{"id": f"{held_out}/{place}", "bytes": 100, "text_nats": 70.0 + own} for place in range(12)]
        held_out_rows = {"documents": lambda folder: pq.write_table(
            pa.Table.from_pylist(rows), folder / "documents.parquet")}  # fmt: skip

        def scores(config: FixedConfig, files: dict[str, Any], **metrics: float) -> Artifact:
            config = config.resolve()
            found = Fixed(
                {one.name: documents(one.name, one.path, more, own) for one in config.sets},
                {one.name: items(one, right, more, size=sizes, seed=own) for one in config.tasks},
            )
            return seal(
                store, config.stage, number, {"fixed": found.write, **files},
                inputs=sealed, config=config.identity(), metrics=metrics | found.metrics(),
            )  # fmt: skip

        if scored:
            scores(ScoreConfig.model_validate(listed(**scored)), {})
        if evaluation:
            config = EvaluateConfig.model_validate(listed(sets or {}, tasks or {}))
            scores(config, held_out_rows, bits_per_byte=1.0)
        key = sealed["model"].stage, sealed["model"].fingerprint
        return Finder(store).of_model(key, label(number - 1), f"run {number}")

    return evaluated


def listed(
    sets: dict[str, dict[str, Any]], tasks: dict[str, dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    named = {"sets": sets, "tasks": tasks}
    return {kind: [{"name": name, **one} for name, one in given.items()] for kind, given in named.items()}


def documents(name: str, path: Path, more: float, seed: int) -> list[dict[str, Any]]:
    """A row a text: about two bits a byte and ``more``, with noise of the model's own."""
    noise = np.random.default_rng(seed).normal(0, 0.02, 1000)
    rows = []
    for place, line in enumerate(path.read_text("utf-8").splitlines()):
        size = len(json.loads(line)["text"].encode())
        bits = (2 + more + noise[place]) * size
        rows.append({"set": name, "id": f"{name}/{place % 3}", "bytes": size, "tokens": size,
                     "text_nats": bits * math.log(2), "bits_per_byte": bits / size, "as_it_is": True})  # fmt: skip
    return [{**row, "sliding_nats": None} for row in rows]


def items(task: TaskConfig, right: float, more: float, *, size: int, seed: int) -> list[dict[str, Any]]:
    """A row an item, of which the first ones are right; answers' bits have noise of the model's own."""
    noise = np.random.default_rng(seed).normal(0, 0.02, ITEMS)
    count = min(task.max_items or ITEMS, ITEMS)
    return [
        {"task": task.name, "item": place, "gold": 0, "right": place < right * count,
         "chosen_by_mean": 0, "chosen_by_sum": 0, "chosen_by_bytes": 0,
         "nats": [(1 + more + noise[place]) * size, 9.0], "tokens": [1, 1],
         "bytes": [size if place % 4 else 7, 6], "cut": 0}
        for place in range(count)
    ]  # fmt: skip


def quiz(files: dict[str, Path], **fields: Any) -> dict[str, dict[str, Any]]:
    return {"quiz": {"path": files["quiz"], "kind": "choice", **fields}}


def answers(*subjects: Subject, least: Least = ANY) -> dict[tuple[str, str], Answer]:
    comparison = compare(subjects, least)
    json.dumps(comparison.as_json(), allow_nan=False)
    return {(one.name, one.metric): one for one in comparison.verdict.fixed}


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


def printed(comparison: Any, columns: int = 200) -> str:
    screen = Screen()
    screen.width = columns
    screen.file = out = io.StringIO()
    show(comparison, screen)
    return out.getvalue()


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


def test_of_equal_shares_one_in_twenty_is_said_to_differ_and_the_interval_covers_the_true_one() -> None:
    """Over the whole distribution of outcomes, by arithmetic: 60 items, of which the models differ in a third."""
    items, differ = 60, 1 / 3
    for effect in (0.0, 0.1):
        chances = [(differ - effect) / 2, (differ + effect) / 2, 1 - differ]
        alarms = covered = total = 0.0
        for only_first in range(items + 1):
            for only_second in range(items + 1 - only_first):
                counts = [only_first, only_second, items - only_first - only_second]
                chance = stats.multinomial.pmf(counts, items, chances)
                if chance < 1e-9:
                    continue
                said = mcnemar(only_first, only_second, items)
                total += chance
                alarms += chance * (said.p_value < 0.05)
                covered += chance * (said.low <= effect <= said.high)
        assert total == pytest.approx(1, abs=1e-5)
        assert 0.945 < covered < 0.965
        if not effect:
            assert 0.04 < alarms < 0.052


def test_shares_by_hand() -> None:
    said = mcnemar(2, 10, 100)
    exact = stats.binomtest(2, 12).pvalue
    assert said.p_value == pytest.approx(exact - stats.binom.pmf(2, 12, 0.5))
    assert said.difference == 0.08
    first, second = 3 / 102, 11 / 102
    half = 1.959964 * math.sqrt((first + second - (second - first) ** 2) / 102)
    assert (said.low, said.high) == pytest.approx((second - first - half, second - first + half), rel=1e-6)
    assert mcnemar(0, 0, 5).p_value == 1
    assert mcnemar(3, 3, 9).p_value == 1
    assert mcnemar(0, 0, 5).low < 0 < mcnemar(0, 0, 5).high
