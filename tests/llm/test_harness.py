"""Tasks of lm-evaluation-harness, held to our own scores of the same items."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.stage import LocalContext
from data_pipeline.train_tokenizer.tokenizer import end_token
from llm.model.config import ModelConfig
from llm.score.config import HarnessConfig, ScoreConfig
from llm.score.stage import score

Make = Callable[..., ModelConfig]
Save = Callable[..., Path]
ITEMS = [
    {"query": f"x{number} =", "choices": ["None", "self.x + y", "東京 🍞", f"{number}"], "gold": number % 4}
    for number in range(24)
]
"""Items whose options begin differently, for our scores leave out what all have in common."""

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)


def write_task(folder: Path, name: str, query: str, **more: Any) -> Path:
    """Write a task in the harness's format, with its data beside it."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS), encoding="utf-8")
    described = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": query,
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(described | more))  # JSON is YAML
    return data


def config_of(folder: Path, *names: str, **more: Any) -> ScoreConfig:
    return ScoreConfig.model_validate({"harness": {"tasks": names, "include": folder}, **more})


@needs_harness
def test_the_harness_agrees_with_our_own_scores(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path
) -> None:
    inputs = {**corpus, "model": saved_model(tiny(context=64, init_std=0.3))}
    tasks, out = tmp_path / "tasks", tmp_path / "out"
    # Ours reads a first token before every text; of a tokenizer that adds none, the harness takes it from the task.
    data = write_task(tasks, "fruit", end_token(corpus["tokenizer"]) + "{{query}}")
    write_task(tasks, "long", "{{query}} " + "and " * 80 + "=")
    own, context = {"name": "fruit", "path": data, "kind": "choice"}, LocalContext()
    config = config_of(tasks, "fruit", "long", tasks=[own])
    metrics = score(config, inputs, out, context)
    rows = pq.read_table(out / "items.parquet").to_pylist()
    by_characters = [
        int(np.argmin([nats / len(text) for nats, text in zip(row["nats"], row["options"], strict=True)]))
        for row in rows
    ]
    assert metrics["harness/fruit/acc"] == metrics["fruit/accuracy_by_sum"]
    right = [chosen == row["gold"] for chosen, row in zip(by_characters, rows, strict=True)]
    assert metrics["harness/fruit/acc_norm"] == np.mean(right)
    assert 0 < metrics["harness/fruit/acc"] < 1
    share, count = metrics["harness/fruit/acc"], len(ITEMS)
    error = (share * (1 - share) / (count - 1)) ** 0.5
    ends = [metrics[f"harness/fruit/acc_{end}"] for end in ("low", "high")]
    assert ends == pytest.approx([share - 1.959964 * error, share + 1.959964 * error])
    assert metrics["harness/fruit/items"] == count
    assert "| fruit | 24 | 0 | acc_norm |" in (out / "report.md").read_text()
    [said] = [note for note in context.notes if note.startswith("lm-evaluation-harness: ")]
    assert "exceeds model's maximum length" in said, "what it cuts off is reported"
    assert said.endswith("more such)")

    # After a kill, what was run is not run again.
    kept = out / "scratch" / "harness" / "0.json"
    first = json.loads(kept.read_text())
    first["metrics"]["fruit/acc"] = 2.0
    kept.write_text(json.dumps(first))
    assert score(config, inputs, out, LocalContext()) == metrics | {"harness/fruit/acc": 2.0}
    assert len(json.loads((out / "harness.json").read_text())) == 2


@needs_harness
def test_mistakes_in_tasks_are_said(tmp_path: Path) -> None:
    from llm.score.harness import Tasks  # the extra

    folder = tmp_path / "tasks"
    write_task(folder, "fruit", "{{query}}")
    outside = write_task(tmp_path, "elsewhere", "{{query}}")
    kwargs = {"data_files": {"test": [str(outside)]}}
    write_task(folder, "reads_elsewhere", "{{query}}", dataset_kwargs=kwargs)
    write_task(folder, "broken", "{{query}}", test_split="nobody")
    tasks = Tasks(folder)
    for name, why in (
        ("nobody", "no task nobody in lm-evaluation-harness nor in"),
        ("reads_elsewhere", f"reads {outside}, where a change would not be seen"),
        ("broken", "broken can't be loaded"),
    ):
        with pytest.raises(UserError, match=why):
            tasks.load([name])
    assert tasks.load(["fruit"]) is tasks.load(["fruit"])


@needs_harness
def test_a_scoring_is_known_by_the_harness_and_the_content_of_its_tasks(tmp_path: Path) -> None:
    data = write_task(tmp_path / "tasks", "fruit", "{{query}}")
    before = config_of(tmp_path / "tasks", "fruit").resolve().identity()
    (tmp_path / "tasks").rename(tmp_path / "moved")
    assert config_of(tmp_path / "moved", "fruit").resolve().identity() == before
    with (tmp_path / "moved" / data.name).open("a") as file:
        file.write(json.dumps(ITEMS[0]) + "\n")
    after = config_of(tmp_path / "moved", "fruit").resolve().identity()
    assert after["harness"].pop("include") != before["harness"].pop("include")
    assert after == before
    with pytest.raises(UserError, match="is no folder"):
        config_of(tmp_path / "tasks", "fruit").resolve()


def test_a_scoring_without_the_harness_is_known_as_before(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    config = ScoreConfig.model_validate({"sets": [{"name": "a", "path": tmp_path / "a.txt"}]})
    assert list(config.resolve().identity()) == ["sets"]


def test_what_is_lacking_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(UserError, match=r"pip install 'llmill\[harness\]'"):
        HarnessConfig(tasks=("arc_easy",)).pinned()
