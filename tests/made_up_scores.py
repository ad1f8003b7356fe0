"""Models whose scores on sets and tasks are made up, sealed as real ones are."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models

from data_pipeline.train_tokenizer.tokenizer import END_OF_TEXT
from flows.compare.claims import (
    ANY,
    Least,
)
from flows.compare.compare import compare
from flows.compare.fixed import Answer
from flows.compare.show import show
from flows.compare.subjects import Finder, Subject, label
from flows.engine.store import Artifact, Store
from flows.listeners.terminal import Screen
from llm.evaluate.config import EvaluateConfig
from llm.score.config import FixedConfig, ScoreConfig, TaskConfig
from llm.score.fixed import Fixed

TEXTS: list[str] = list(
    json.loads((Path(__file__).parent / "ordinary_texts.json").read_text("utf-8")).values()
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
        seen: int = 0,
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
            for rows in (*found.sets.values(), *found.tasks.values()):
                for place, row in enumerate(rows):
                    row["seen"] = float(place < seen)
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


def printed(comparison: Any, columns: int = 200) -> str:
    screen = Screen()
    screen.width = columns
    screen.file = out = io.StringIO()
    show(comparison, screen)
    return out.getvalue()
