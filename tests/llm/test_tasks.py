"""Tasks in an evaluation: files of items, a row for each, and the metrics that they come to."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.stage import LocalContext
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer
from llm.evaluate.config import EvaluateConfig
from llm.evaluate.stage import evaluate
from llm.model.config import ModelConfig
from llm.model.transformer import load_model
from llm.score.encode import encode
from llm.score.prompts import render
from llm.score.replicas import Replicas
from llm.score.scorer import score
from llm.score.task import first_token, summarise

Make = Callable[..., ModelConfig]
Save = Callable[..., Path]
CHOICES = [
    {"query": f"x{number} =", "choices": ["None", "self.x", "東京 🍞"], "gold": number % 3}
    for number in range(9)
]
CONTINUATIONS = [{"context": "def f(", "continuation": "self):"}, {"context": "भारत", "continuation": "में"}]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_items(name: str, items: list[Any]) -> Path:
        path = tmp_path / name
        text = "".join(json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n\n" for item in items)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write_items


def config_of(**tasks: dict[str, Any]) -> EvaluateConfig:
    return EvaluateConfig.model_validate(
        {"max_documents": 3, "prompts": (), "tasks": [{"name": name, **task} for name, task in tasks.items()]}
    )


def test_each_item_has_a_row_and_each_task_its_metrics(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path, write: Callable[..., Path]
) -> None:
    inputs = {**corpus, "model": saved_model(tiny(context=64))}
    config = config_of(
        choices={"path": write("a.jsonl.gz", CHOICES), "kind": "choice", "max_items": 8},
        words={"path": write("b.jsonl", CONTINUATIONS), "kind": "continuation", "delimiter": ""},
    )
    metrics = evaluate(config, inputs, tmp_path / "out", LocalContext())
    rows = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert [(row["task"], row["item"]) for row in rows] == [
        *(("choices", place) for place in range(8)), ("words", 0), ("words", 1),
    ]  # fmt: skip
    assert [(row["question"], row["options"]) for row in rows] == [
        *((item["query"], item["choices"]) for item in CHOICES[:8]), ("def f(", ["self):"]), ("भारत", ["में"]),
    ]  # fmt: skip

    model, tokenizer = load_model(inputs["model"]), load_tokenizer(inputs["tokenizer"])
    right = 0
    for row, item in zip(rows[:8], CHOICES[:8], strict=True):
        options = encode(render("choice", item), tokenizer, end_of_text(tokenizer), 64)
        [(_, scored)] = score(Replicas([model]), [options])
        assert row["nats"] == pytest.approx([one.nats.sum() for one in scored], rel=1e-5)
        texts = [tokenizer.decode(one.tokens[one.start :]) for one in options]
        assert row["bytes"] == [len(text.encode()) for text in texts]
        means = [nats / tokens for nats, tokens in zip(row["nats"], row["tokens"], strict=True)]
        a_byte = [nats / size for nats, size in zip(row["nats"], row["bytes"], strict=True)]
        for rule, values in (("mean", means), ("sum", row["nats"]), ("bytes", a_byte)):
            assert row[f"chosen_by_{rule}"] == values.index(min(values))
        assert row["right"] == (row["chosen_by_mean"] == item["gold"])
        right += row["right"]
    assert metrics["choices/accuracy"] == right / 8
    assert metrics["choices/centred"] == pytest.approx((right / 8 - 1 / 3) / (2 / 3))
    gold = [(row["nats"][row["gold"]], row["bytes"][row["gold"]]) for row in rows[:8]]
    bits = sum(nats for nats, _ in gold) / math.log(2) / sum(size for _, size in gold)
    assert metrics["choices/gold_bits_per_byte"] == pytest.approx(bits)
    assert metrics["centred_mean"] == pytest.approx(
        np.mean([metrics["choices/centred"], metrics["words/centred"]])
    )
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| choices | 8 |" in report


def test_a_killed_evaluation_scores_no_task_twice_and_comes_out_the_same(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path, write: Callable[..., Path]
) -> None:
    inputs = {**corpus, "model": saved_model(tiny(context=64))}
    tasks = {"path": write("a.jsonl", CHOICES), "kind": "choice"}
    config = config_of(first=tasks, second={**tasks, "shots": 2, "delimiter": "\n"})
    whole = evaluate(config, inputs, tmp_path / "whole", LocalContext())

    class Killed(Exception):
        pass

    class Context(LocalContext):
        def progress(self, done: float, total: float | None, unit: str) -> None:
            if (
                unit.startswith("items")
                and (tmp_path / "killed" / "scratch" / "tasks" / "first.parquet").exists()
            ):
                raise Killed

    with pytest.raises(Killed):
        evaluate(config, inputs, tmp_path / "killed", Context())
    kept = tmp_path / "killed" / "scratch" / "tasks" / "first.parquet"
    before = kept.stat().st_mtime_ns
    assert evaluate(config, inputs, tmp_path / "killed", LocalContext()) == whole
    assert kept.stat().st_mtime_ns == before
    for name in ("items.parquet", "report.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([1], "it is no JSON object"),
        ({"query": "a", "choices": ["b", "c"]}, "it lacks gold"),
        ({"query": "a", "choices": ["b"], "gold": 0}, "choices must list two options at least"),
        ({"query": "a", "choices": ["b", 3], "gold": 0}, "its texts must be strings"),
        ({"query": 1, "choices": ["b", "c"], "gold": 0}, "its texts must be strings"),
        ({"query": "a", "choices": ["b", " "], "gold": 0}, "what is scored is empty"),
        (
            {"query": "a", "choices": ["b", "c"], "gold": 2},
            "gold is 2, and there are 2 options, counted from 0",
        ),
        ({"query": "a", "choices": ["b", "c"], "gold": True}, "gold is True"),
    ],
)
def test_what_is_no_item_is_named_by_its_line(
    tiny: Make,
    saved_model: Save,
    corpus: dict[str, Path],
    tmp_path: Path,
    write: Callable[..., Path],
    item: Any,
    message: str,
) -> None:
    path = write("a.jsonl", [CHOICES[0], item])
    config = config_of(bad={"path": path, "kind": "choice"})
    with pytest.raises(UserError, match=f"line 3: no item of kind choice: {message}"):
        evaluate(config, {**corpus, "model": saved_model(tiny())}, tmp_path / "out", LocalContext())


def test_a_task_is_known_by_what_its_file_holds_and_none_leaves_the_identity_as_it_was(
    write: Callable[..., Path],
) -> None:
    one, same = write("a.jsonl", CHOICES), write("b.jsonl", CHOICES)
    first, second = (
        config_of(a={"path": path, "kind": "choice"}).resolve().identity() for path in (one, same)
    )
    assert first == second
    other = config_of(a={"path": write("c.jsonl", CHOICES[1:]), "kind": "choice"}).resolve().identity()
    assert other != first
    assert "tasks" not in EvaluateConfig().resolve().identity()
    with pytest.raises(UserError, match=r"evaluate\.tasks: .* can't be read"):
        config_of(a={"path": "nowhere.jsonl", "kind": "choice"}).resolve()
    with pytest.raises(ValueError, match=r"two of evaluate\.sets and tasks are called a"):
        EvaluateConfig.model_validate({"tasks": [{"name": "a", "path": one, "kind": "choice"}] * 2})


def test_the_token_before_every_text_is_the_tokenizers_own(corpus: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(corpus["tokenizer"])
    assert first_token(tokenizer, corpus["tokenizer"]) == end_of_text(tokenizer)
    named = tokenizer.id_to_token(7)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": named}}, allow_nan=False)
    )
    assert first_token(tokenizer, tmp_path) == 7


def test_an_interval_surrounds_the_accuracy() -> None:
    """That of 8 right of 10 as Wilson's formula gives it."""
    rows = [
        {"right": n < 8, "nats": [1.0, 2.0], "bytes": [1, 1], "gold": 0, "cut": int(n == 0),
         **dict.fromkeys(("chosen_by_mean", "chosen_by_sum", "chosen_by_bytes"), 0)}
        for n in range(10)
    ]  # fmt: skip
    found = summarise(rows)
    z, p, n = 1.959964, 0.8, 10
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    assert [found["accuracy_low"], found["accuracy_high"]] == pytest.approx(expected, abs=1e-6)
    assert found["items_cut"] == 1
    assert found["centred"] == pytest.approx(0.6)
