"""Sets and tasks that a model is scored on while it is trained: whole trainings, and what is refused before one."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import forks
import hypothesis
import pytest
from disturbed import Stage
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.core.errors import UserError
from data_pipeline.stage import LocalContext
from llm.evaluate.config import EvaluateConfig
from llm.evaluate.stage import evaluate
from llm.model.transformer import load_model
from llm.pretrain.config import PretrainConfig
from llm.pretrain.scoring import MOST_SCORING, affordable
from llm.pretrain.stage import pretrain
from llm.pretrain.summary import describe_scoring
from llm.score.config import ValidateOn
from llm.training.events import read_events
from llm.training.scores import Scorer

STEPS, BATCH_TOKENS, ITEMS = 10, 8 * 64, 3
SPREAD = {"1 rank": {}, "2 ranks, ZeRO 3": {"ranks": 2, "zero_stage": 3}}
Runs = dict[str, Path]


def config(validate_on: dict[str, Any] | None = None, **runtime: Any) -> PretrainConfig:
    """Ten steps; after each second a checkpoint."""
    scored = {"validate_on": validate_on} if validate_on else {}
    return PretrainConfig.model_validate(
        {
            "model": {"layers": 2, "heads": 2, "width": 32, "context": 64, "tie_embeddings": True},
            "tokens": STEPS * BATCH_TOKENS,
            "batch_tokens": BATCH_TOKENS,
            "lr": 3e-3,
            "precision": "fp32",
            "runtime": {
                "checkpoint_every": 2,
                "micro_batch": 4,
                "validation": {"every": 4, "tokens": 1024},
                "samples": {"every": 0},
                **scored,
                **runtime,
            },
        }
    )


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A set and a task, of each of which some are scored."""
    folder = tmp_path_factory.mktemp("scored")
    texts = [{"words": f"def f{number}(x):\n    return x * {number}\n"} for number in range(ITEMS + 2)]
    pairs = [
        {"sentence_good": f"import os{number}", "sentence_bad": f"os{number} import"}
        for number in range(ITEMS + 2)
    ]
    for name, rows in (("set", texts), ("task", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "sets": [{"name": "code", "path": str(folder / "set.jsonl"), "text": "words"}],
        "tasks": [{"name": "order", "path": str(folder / "task.jsonl"), "kind": "pairs"}],
        "items": ITEMS,
        "every": 4,
    }


@pytest.fixture(scope="module")
def scored(corpus: dict[str, Path], wanted: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Trainings in which it is scored."""
    root = tmp_path_factory.mktemp("scored-runs")
    for name, runtime in SPREAD.items():
        pretrain(config(wanted, **runtime), corpus, root / name, LocalContext(launcher=forks.launch))
    return {name: root / name for name in SPREAD}


def scores(run: Path) -> list[dict[str, Any]]:
    """The events of scores, less what a clock says."""
    found = [event for event in read_events(run / "logs" / "events.jsonl") if event["event"] == "scores"]
    return [{name: event[name] for name in event.keys() - {"time", "seconds"}} for event in found]


def checksums(run: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.iterdir() if path.is_file()
    }


@pytest.mark.parametrize("name", SPREAD)
def test_scores_in_training_move_no_bit_of_it(
    scored: Runs, corpus: dict[str, Path], tmp_path: Path, name: str
) -> None:
    pretrain(config(**SPREAD[name]), corpus, tmp_path, LocalContext(launcher=forks.launch))
    assert checksums(tmp_path) == checksums(scored[name])
    assert scores(tmp_path) == []


@pytest.mark.parametrize("name", SPREAD)
def test_the_last_scores_are_those_that_evaluate_gives_the_saved_model(
    scored: Runs, corpus: dict[str, Path], wanted: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """And those before it are others, of the steps with a validation."""
    chosen = {
        "sets": [{**wanted["sets"][0], "max_documents": ITEMS}],
        "tasks": [{**wanted["tasks"][0], "max_items": ITEMS}],
    }
    inputs = {**corpus, "model": scored[name]}
    evaluation = EvaluateConfig.model_validate({"max_documents": 1, "prompts": (), **chosen})
    metrics = evaluate(evaluation, inputs, tmp_path, LocalContext())
    assert (metrics["code/documents"], metrics["order/items"]) == (ITEMS, ITEMS)
    found = scores(scored[name])
    assert [one["step"] for one in found] == [4, 8, STEPS]
    names = ("code/bits_per_byte", "order/gold_bits_per_byte", "order/accuracy")
    assert found[-1] == {
        "event": "scores",
        "step": STEPS,
        "tokens": STEPS * BATCH_TOKENS,
        **{name: pytest.approx(metrics[name], rel=1e-6) for name in names},
    }
    assert len({one["code/bits_per_byte"] for one in found}) == 3


@pytest.mark.long
def test_a_killed_training_repeats_no_scores_and_misses_none(
    corpus: dict[str, Path], wanted: dict[str, Any], scored: Runs, tmp_path: Path
) -> None:
    given = config(wanted)
    stage = Stage(given, corpus, tmp_path)
    stage.wait_for("scores", 4)
    stage.kill()
    assert not (tmp_path / "model.safetensors").exists()
    pretrain(given, corpus, tmp_path, LocalContext(launcher=forks.launch))
    assert scores(tmp_path) == scores(scored["1 rank"])
    assert checksums(tmp_path) == checksums(scored["1 rank"])


def test_what_scoring_cost_is_noted_and_too_much_of_it_is_a_warning(scored: Runs) -> None:
    events = read_events(scored["1 rank"] / "logs" / "events.jsonl")
    (last, _), (cost, _) = describe_scoring(events)
    assert re.fullmatch(
        r"after step 10: code/bits_per_byte [\d.]+, order/gold_bits_per_byte [\d.]+, order/accuracy [\d.]+",
        last,
    )
    assert re.match(r"scored 3 time\(s\) while training, in [\d.]+ s: [\d.]+% of its time", cost)

    def attempt(start: float, seconds: float) -> list[dict[str, Any]]:
        """A hundred seconds."""
        return [
            {"event": "start", "time": start},
            {"event": "scores", "step": 1, "time": start + 50, "seconds": seconds},
            {"event": "step", "step": 2, "time": start + 100},
        ]

    [_, (cost, warning)] = describe_scoring(attempt(0, 1) + attempt(1000, 3))
    assert (cost, warning) == ("scored 2 time(s) while training, in 4.0 s: 2.0% of its time", False)
    [_, (cost, warning)] = describe_scoring(attempt(0, 1) + attempt(1000, 3.2))
    assert warning
    assert cost.endswith("2.1% of its time; raise pretrain.runtime.validate_on.every, or lower its items")
    assert describe_scoring(attempt(0, 1)[:1]) == []


def test_a_file_that_is_spoilt_while_a_model_is_trained_gives_warnings_and_the_model(
    corpus: dict[str, Path], wanted: dict[str, Any], scored: Runs, tmp_path: Path
) -> None:
    path = tmp_path / "spoilt.jsonl"
    path.write_bytes(Path(wanted["sets"][0]["path"]).read_bytes())

    def spoil_and_launch(*given: Any, **named: Any) -> None:
        path.write_text("{}")
        forks.launch(*given, **named)

    given = config({"sets": [{**wanted["sets"][0], "path": str(path)}], "every": 4})
    pretrain(given, corpus, tmp_path / "out", LocalContext(launcher=spoil_and_launch))
    found = read_events(tmp_path / "out" / "logs" / "events.jsonl")
    warnings = [event["message"] for event in found if event["event"] == "warning"]
    why = f"{path}, row 1: it has no text in the field words"
    assert warnings == [f"no scores after step {step}: {why}" for step in (4, 8, STEPS)]
    assert checksums(tmp_path / "out") == checksums(scored["1 rank"])


def test_files_are_read_once_in_a_training(
    corpus: dict[str, Path], wanted: dict[str, Any], scored: Runs, tmp_path: Path
) -> None:
    copies = {}
    for kind in ("sets", "tasks"):
        path = tmp_path / f"{kind}.jsonl"
        path.write_bytes(Path(wanted[kind][0]["path"]).read_bytes())
        copies[kind] = [{**wanted[kind][0], "path": str(path)}]
    model = load_model(scored["1 rank"])
    scorer = Scorer(ValidateOn.model_validate(copies), corpus["tokenizer"], model.config.context)
    first = scorer.scores(model)
    for path in tmp_path.iterdir():
        path.unlink()
    assert scorer.scores(model) == first
    assert len(first) == 3


def must_not_start(*_: object, **__: object) -> None:
    raise AssertionError("ranks were started")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("sets", {"path": "none.jsonl"}, "pretrain.runtime.validate_on.sets: none.jsonl can't be read"),
        ("sets", {"text": "body"}, "set.jsonl, row 1: it has no text in the field body"),
        ("sets", {"sha256": "0" * 64}, "pretrain.runtime.validate_on.sets: .* has the sha256 .*, not 000"),
        ("tasks", {"path": "none.jsonl"}, "pretrain.runtime.validate_on.tasks: none.jsonl can't be read"),
        ("tasks", {"kind": "choice"}, "task.jsonl, line 1: no item of kind choice: it lacks query"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_a_rank_starts(
    corpus: dict[str, Path],
    wanted: dict[str, Any],
    tmp_path: Path,
    part: str,
    change: dict[str, Any],
    message: str,
) -> None:
    given = config({**wanted, part: [{**wanted[part][0], **change}]})
    with pytest.raises(UserError, match=message):
        given.resolve()
    with pytest.raises(UserError, match=message):
        pretrain(given, corpus, tmp_path, LocalContext(launcher=must_not_start))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"name": "order"}, "two of .* are called order"), ({"stride": 8}, "leave it out of code")],
)
def test_what_has_no_place_in_an_event_is_refused(
    wanted: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        config({**wanted, "sets": [{**wanted["sets"][0], **change}]})


def test_scores_are_no_part_of_the_identity_and_files_are_found_from_any_folder(
    wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(wanted["sets"][0]["path"])
    monkeypatch.chdir(path.parent)
    given = config({**wanted, "sets": [{**wanted["sets"][0], "path": path.name}]}).resolve()
    assert given.runtime.validate_on.paths[0] == path
    assert given.identity() == config().resolve().identity()
    assert (given.scores_every, config().scores_every) == (4, 0)


@hypothesis.given(st.integers(1, 100_000), st.integers(1, 1000), st.floats(1e-7, 10))
def test_scores_cost_little_where_it_is_left_open_how_often_they_come(
    steps: int, checks: int, cost: float
) -> None:
    """With a validation, and no seldomer than they must; once at least, after the last step."""
    every = affordable(steps, checks, cost)
    most = max(1, int(MOST_SCORING / cost))
    assert every % checks == 0
    assert math.ceil(steps / every) <= most
    assert every == checks or math.ceil(steps / (every - checks)) > most


def test_how_often_follows_from_tokens_and_stands_in_the_plan(wanted: dict[str, Any]) -> None:
    """A scoring reads 144 bytes, which count as 48 tokens."""
    left_open = {name: value for name, value in wanted.items() if name != "every"}

    def planned(steps: int, chosen: dict[str, Any] = left_open, **runtime: Any) -> PretrainConfig:
        return config(chosen, **runtime).model_copy(update={"tokens": steps * BATCH_TOKENS}).resolve()

    few, many, spread, often = planned(8), planned(1000), planned(1000, ranks=2), planned(1000, wanted)
    found = [one.scores_every for one in (few, many, many.resolve(), spread, often)]
    assert found == [8, 8, 8, 12, 4]
    head, read = "sets and tasks are scored", "about 48 tokens each time, in all"
    assert [one.predict({}, 1) for one in (few, many, often)] == [
        [f"{head} once, after the last step: {read} 1.17% of the training's tokens"],
        [f"{head} 125 times, each 8 steps: {read} 1.17% of the training's tokens"],
        [
            f"{head} 250 times, each 4 steps: {read} 2.34% of the training's tokens, more than 2%: raise "
            "pretrain.runtime.validate_on.every, or lower its items"
        ],
    ]
