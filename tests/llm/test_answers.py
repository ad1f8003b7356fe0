"""Answers that a model writes: greedy, up to a stop, and right by exact match in any script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from data_pipeline.core.errors import UserError
from data_pipeline.stage import LocalContext
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer
from llm.evaluate.config import EvaluateConfig
from llm.evaluate.stage import evaluate
from llm.model.config import ModelConfig
from llm.model.transformer import Transformer, load_model
from llm.score.answers import AT_ONCE, before, matches
from llm.score.config import TaskConfig, ValidateOn
from llm.score.items import read_items

QUESTIONS = ["def f(", "import", "首都は", "ما عاصمة", "เมืองหลวงคือ", "राजधानी है", "x = 🍞 +"] * 3


def config_of(path: Path, **fields: Any) -> EvaluateConfig:
    task = {"name": "quiz", "path": path, "kind": "generation", **fields}
    return EvaluateConfig.model_validate({"max_documents": 3, "prompts": (), "tasks": [task]})


@torch.inference_mode()
def greedy(model: Transformer, tokens: list[int], most: int, end: int) -> list[int]:
    """The likeliest tokens one by one, each by a pass over all before it."""
    new: list[int] = []
    while len(new) < most:
        token = int(model(torch.tensor([[*tokens, *new]]))[0, -1].argmax())
        if token == end:
            break
        new.append(token)
    return new


def test_an_answer_is_what_the_model_writes_greedily_before_a_stop(
    tiny: Callable[..., ModelConfig],
    saved_model: Callable[..., Path],
    corpus: dict[str, Path],
    tmp_path: Path,
) -> None:
    inputs = {**corpus, "model": saved_model(tiny(context=64))}
    model, tokenizer = load_model(inputs["model"]), load_tokenizer(inputs["tokenizer"])
    end = end_of_text(tokenizer)
    written = [
        tokenizer.decode(greedy(model, [end, *tokenizer.encode(one).ids], 8, end), skip_special_tokens=True)
        for one in QUESTIONS
    ]
    stop = next(letter for text in written for letter in text.strip()[1:] if letter.strip())
    answers = [before(text, [stop]) for text in written]
    assert len(QUESTIONS) > AT_ONCE
    assert any(answer != text.strip() for answer, text in zip(answers, written, strict=True)), (
        "the stop is met"
    )
    path = tmp_path / "quiz.jsonl"
    items = [
        {
            "question": question,
            "answers": ["of another answer", f"«{answer.upper()}»." if place % 3 else "no"],
        }
        for place, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True))
    ]
    path.write_text("".join(json.dumps(one, allow_nan=False) + "\n" for one in items))
    metrics = evaluate(
        config_of(path, delimiter="", max_new_tokens=8, stop=[stop]), inputs, tmp_path / "out", LocalContext()
    )
    rows = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert [row["answer"] for row in rows] == answers
    right = [bool(place % 3) and matches(answer, [answer.upper()]) for place, answer in enumerate(answers)]
    assert [row["right"] for row in rows] == right
    assert metrics["quiz/accuracy"] == sum(right) / len(rows)
    assert metrics["quiz/gold_bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("answer", "right", "same"),
    [
        ("Paris.", "paris", True),
        ("“Paris”", "Paris", True),
        ("(  New   York )", "new york", True),
        ("東京。", "東京", True),
        ("「東京」", "東京", True),
        ("ＴＯＫＹＯ", "tokyo", True),
        ("القاهرة؟", "القاهرة", True),
        ("दिल्ली।", "दिल्ली", True),
        ("กรุงเทพฯ", "กรุงเทพ", False),
        ("-5", "5", False),
        ("5%", "5", False),
        ("3.5", "35", False),
        ("$5", "5", False),
        ("#5", "5", False),
        ("STRASSE", "straße", True),
        ("", "no", False),
        ("🍞!", "🍞", True),
        ("in Paris", "Paris", False),
    ],
)
def test_answers_are_compared_but_for_case_spaces_and_marks_around_them(
    answer: str, right: str, same: bool
) -> None:
    assert matches(answer, ["something else", right]) is same


def test_an_answer_ends_before_the_first_stop_but_may_begin_behind_a_line_break() -> None:
    assert before("\n\n Paris \nQ: next", ["\n"]) == "Paris"
    assert before("Paris; London\n", ["\n", ";"]) == "Paris"
    assert before("Paris", []) == "Paris"


def test_what_is_set_of_other_kinds_and_in_the_loop_is_refused(tmp_path: Path) -> None:
    task = {"name": "quiz", "path": tmp_path / "quiz.jsonl", "kind": "generation"}
    with pytest.raises(ValueError, match="are for tasks of kind generation"):
        TaskConfig.model_validate({**task, "kind": "choice", "stop": ["."]})
    with pytest.raises(ValueError, match="leave quiz out"):
        ValidateOn.model_validate({"tasks": [task]})
    for wrong, why in (
        ({"question": "q", "answers": []}, "must list an answer"),
        ({"question": "q"}, "it lacks answers"),
    ):
        task["path"].write_text(json.dumps(wrong, allow_nan=False))
        config = config_of(task["path"]).resolve()
        with pytest.raises(UserError, match=why):
            read_items(config.tasks[0], config.task_files[0])
