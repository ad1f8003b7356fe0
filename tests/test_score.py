"""``llmill score``: any model on fixed sets and tasks, sealed, tracked, and not scored twice."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from command_line import Llmill, kill_tree
from corpora import prose, read_documents
from mlflow import MlflowClient
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from data_pipeline.core.errors import UserError
from data_pipeline.tokenize.shards import TokenShards
from flows.compare.scores_table import cell, questions
from flows.compare.scoring import kind_of, scoring_config
from flows.engine.store import Store

TEXTS = [
    "Guten Morgen, Welt!",
    "吾輩は猫である。名前はまだ無い。",
    "สวัสดีชาวโลก",
    "नमस्ते दुनिया",
    "مرحبا",
    "def f(x):\r\n\treturn x  # 🦊",
]
ITEMS: dict[str, list[dict[str, Any]]] = {
    "fruit": [
        {"query": f"{n} apples and one more are", "choices": [f"{n + 1}", f"{n}"], "gold": n % 2}
        for n in range(8)
    ],
    "agreement": [
        {"sentence_good": f"{n} cats sleep.", "sentence_bad": f"{n} cats sleeps."} for n in range(8)
    ],
    "words": [{"context": "import os, sys", "continuation": "import re"}] * 3,
    "who": [{"context_options": ["The dog ate", "The sky ate"], "continuation": "its food.", "gold": 0}] * 4,
}


def write(folder: Path) -> tuple[Path, dict[str, Path]]:
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    tasks = {}
    for name, items in ITEMS.items():
        tasks[name] = folder / f"{name}.jsonl"
        tasks[name].write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return texts, tasks


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return write(tmp_path_factory.mktemp("given"))


@pytest.fixture
def options(given: tuple[Path, dict[str, Path]]) -> list[str]:
    texts, tasks = given
    return ["--sets", str(texts), *(word for path in tasks.values() for word in ("--tasks", str(path)))]


@pytest.fixture
def llmill(copy_finished: Callable[[Path], Llmill], tmp_path: Path) -> Llmill:
    return copy_finished(tmp_path / "home")


@pytest.fixture
def theirs(llmill: Llmill, tmp_path: Path) -> Path:
    """A model that was made elsewhere, with a tokenizer beside it."""
    [exported] = Store(llmill.home).artifacts("export")
    folder = tmp_path / "their model"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=512, max_position_embeddings=64, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in exported.path.glob("*token*"):
        shutil.copy(path, folder)
    return folder


def test_ours_and_theirs_are_rows_of_one_table_and_nothing_is_scored_twice(
    llmill: Llmill, theirs: Path, options: list[str], tmp_path: Path
) -> None:
    [exported], [trained] = Store(llmill.home).artifacts("export"), Store(llmill.home).artifacts("pretrain")
    copy = shutil.copytree(exported.path, tmp_path / "a copy of ours")
    out = llmill("score", "latest", str(theirs), *options).stdout
    for shown in ("texts", "bits per byte", "fruit", "right", "words", "all tasks", "their model"):
        assert shown in out
    rows = json.loads(llmill("score", trained.fingerprint, str(theirs), *options, "--json").stdout)
    assert [row["model"] for row in rows] == [f"pretrain {trained.fingerprint[:8]}", "their model"]
    assert len(Store(llmill.home).artifacts("score")) == 2
    again = llmill("score", str(copy), exported.fingerprint, *options)
    assert again.stdout.count("was scored on these already") == 2
    assert len(Store(llmill.home).artifacts("score")) == 2
    metrics = rows[0]["metrics"]
    assert metrics["texts/documents"] == len(TEXTS)
    assert metrics["texts/bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert {name: metrics[f"{name}/items"] for name in ITEMS} == {
        name: len(items) for name, items in ITEMS.items()
    }
    assert rows[0]["metrics"]["texts/bits_per_byte"] != rows[1]["metrics"]["texts/bits_per_byte"]

    client = MlflowClient(f"sqlite:///{llmill.home}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("score").experiment_id])
    whole = {
        run.info.run_name.partition(" · ")[0]: run
        for run in runs
        if "mlflow.parentRunId" not in run.data.tags
    }
    assert len(whole) == 2
    logged = whole["their model"].data.metrics
    assert logged["score/texts/bits_per_byte"] == rows[1]["metrics"]["texts/bits_per_byte"]
    assert logged["score/fruit/accuracy"] == rows[1]["metrics"]["fruit/accuracy"]


@pytest.mark.long
def test_models_made_anywhere_are_compared_once_they_are_scored(
    llmill: Llmill, theirs: Path, options: list[str]
) -> None:
    assert "is not evaluated" in llmill("compare", "latest", str(theirs), code=2).stderr
    first = json.loads(llmill("compare", "latest", str(theirs), *options, "--json").stdout)
    assert {one["name"] for one in first["verdict"]["sets_and_tasks"]} == {"texts", *ITEMS}
    assert first["verdict"]["refused"] == "B is scored on sets and tasks only"
    assert first["runs"][1]["name"] == "their model"
    assert len(Store(llmill.home).artifacts("score")) == 2
    out = llmill("compare", "latest", str(theirs)).stdout
    assert "fruit (accuracy)" in " ".join(out.split())
    [mine, other] = (one.fingerprint for one in Store(llmill.home).artifacts("score"))
    by_scores = json.loads(llmill("compare", mine, other, "--json").stdout)["verdict"]
    assert by_scores["sets_and_tasks"] == first["verdict"]["sets_and_tasks"]


@pytest.mark.long
def test_a_model_of_an_architecture_that_we_have_not_is_scored_and_compared(
    llmill: Llmill, theirs: Path, options: list[str], tmp_path: Path
) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    foreign = shutil.copytree(theirs, tmp_path / "a pythia")
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=512, max_position_embeddings=64, **shape)).save_pretrained(
        foreign
    )
    said = llmill("score", str(foreign), *options)
    assert "so transformers computes it; it can be scored, and nothing else" in " ".join(said.stdout.split())
    found = json.loads(llmill("compare", str(theirs), str(foreign), *options, "--json").stdout)
    assert {one["name"] for one in found["verdict"]["sets_and_tasks"]} == {"texts", *ITEMS}
    assert [run["name"] for run in found["runs"]] == ["their model", "a pythia"]


def test_a_scoring_that_is_killed_is_resumed_to_the_same_bytes(
    llmill: Llmill, options: list[str], copy_finished: Callable[[Path], Llmill], tmp_path: Path
) -> None:
    other = copy_finished(tmp_path / "undisturbed")
    other("score", "latest", *options)
    running = llmill.start("score", "latest", *options)
    while not list((llmill.home / "store" / "score").glob("*.partial/scratch/tasks/fruit.parquet")):
        assert running.poll() is None
        os.sched_yield()
    kill_tree(running)
    running.communicate(timeout=900)
    llmill("score", "latest", *options)
    [one], [two] = Store(llmill.home).artifacts("score"), Store(other.home).artifacts("score")
    assert one.payload_sha256 == two.payload_sha256
    assert pq.read_table(one.path / "items.parquet").num_rows == sum(map(len, ITEMS.values()))


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_tasks_of_the_harness_stand_in_the_same_table(llmill: Llmill, theirs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "fruit.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS["fruit"]))
    described = {
        "task": "their_fruit", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / "fruit.yaml").write_text(json.dumps(described))
    named = ["--harness", "their_fruit", "--harness-tasks", str(folder)]
    out = llmill("score", "latest", str(theirs), "--tasks", str(data), *named)
    assert "their_fruit" in out.stdout
    assert "acc (harness)" in out.stdout
    assert "it/s]" not in out.stdout + out.stderr, "no bars of others"
    rows = json.loads(llmill("score", "latest", str(theirs), "--tasks", str(data), *named, "--json").stdout)
    found = [row["metrics"] for row in rows]
    assert all(one["harness/their_fruit/acc_low"] <= one["harness/their_fruit/acc"] for one in found)
    assert all(one["harness/their_fruit/items"] == one["fruit/items"] == 8 for one in found)
    assert len(Store(llmill.home).artifacts("score")) == 2
    client = MlflowClient(f"sqlite:///{llmill.home}/mlflow.db")
    logged = client.search_runs([client.get_experiment_by_name("score").experiment_id])
    values = [run.data.metrics.get("score/harness/their_fruit/acc") for run in logged]
    assert {one["harness/their_fruit/acc"] for one in found} <= {*values}
    said = llmill("score", "latest", "--harness-tasks", str(folder), code=2).stderr
    assert "name those that are to be run with --harness" in said
    assert "no task nobody" in llmill("score", "latest", "--harness", "nobody", code=2).stderr


def test_mistakes_are_said_before_anything_runs(llmill: Llmill, options: list[str], tmp_path: Path) -> None:
    assert "name a set or a task at least" in llmill("score", "latest", code=2).stderr
    assert "no run is called nobody" in llmill("score", "nobody", *options, code=2).stderr
    [tokenizer] = Store(llmill.home).artifacts("train_tokenizer")
    assert "is no model" in llmill("score", tokenizer.fingerprint, *options, code=2).stderr
    (tmp_path / "empty").mkdir()
    said = llmill("score", str(tmp_path / "empty"), *options, code=2).stderr
    assert "config.json" in said
    assert not Store(llmill.home).artifacts("score")


def test_what_is_to_be_scored_is_taken_from_files_and_from_lists(
    given: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    texts, tasks = given
    assert {name: kind_of(path) for name, path in tasks.items()} == {
        "fruit": "choice", "agreement": "pairs", "words": "continuation", "who": "schema",
    }  # fmt: skip
    listed = tmp_path / "suite.yaml"
    listed.write_text(
        f"evaluate:\n  sets: [{{name: ours, path: {texts}}}]\n"
        f"  tasks: [{{name: fruit, path: {tasks['fruit']}, kind: choice, shots: 1, max_items: 3}}]\n"
    )
    config = scoring_config([listed], [listed, tasks["who"]], 5)
    assert [(one.name, one.max_documents) for one in config.sets] == [("ours", 5)]
    assert [(one.name, one.shots, one.max_items) for one in config.tasks] == [("fruit", 1, 3), ("who", 0, 5)]
    for text, why in (("a: 1\n", "lists no sets"), ("[", "not valid YAML"), ("sets: [1]\n", "lists no sets")):
        listed.write_text(text)
        with pytest.raises(UserError, match=why):
            scoring_config([listed], [], None)
    strange = tmp_path / "strange.jsonl"
    for text, why in (('{"a": 1}\n', "those of no kind"), ("[]\n", "no JSON object"), ("", "no JSON object")):
        strange.write_text(text)
        with pytest.raises(UserError, match=why):
            scoring_config([], [strange], None)
    with pytest.raises(UserError, match="two of score"):
        scoring_config(
            [texts],
            [texts.with_name("fruit.jsonl"), shutil.copy(tasks["fruit"], tmp_path / "texts.jsonl")],
            None,
        )


def test_a_share_stands_with_its_interval_and_the_mean_comes_last() -> None:
    metrics = {
        "a/accuracy": 0.5,
        "a/accuracy_low": 0.25,
        "a/accuracy_high": 0.75,
        "b/bits_per_byte": 1.0,
        "centred_mean": 0.1,
    }
    theirs = {
        "harness/a/acc": 0.5,
        "harness/a/acc_low": 0.25,
        "harness/a/acc_high": 0.75,
        "harness/a/items": 9.0,
    }
    assert questions([metrics | theirs])[2:] == [("harness/a", "acc"), ("all tasks", "centred_mean")]
    assert cell(theirs, "harness/a", "acc") == "0.5000 [0.2500, 0.7500]"
    assert questions([metrics]) == [("a", "accuracy"), ("b", "bits_per_byte"), ("all tasks", "centred_mean")]
    assert cell(metrics, "a", "accuracy") == "50.0% [25.0%, 75.0%]"
    assert cell(metrics, "b", "bits_per_byte") == "1.0000"
    assert cell({}, "b", "bits_per_byte") == ""


@pytest.mark.long
def test_an_evaluation_finds_what_its_model_was_trained_on(llmill: Llmill, tmp_path: Path) -> None:
    [documents], [tokens] = (Store(llmill.home).artifacts(stage) for stage in ("dedup", "tokenize"))
    texts = read_documents(documents.path)
    splits = ("train", "val")
    names = [[name for batch in TokenShards(tokens.path, one) for name in batch.ids][:3] for one in splits]
    queries = [*(texts[name][500:1500] for chosen in names for name in chosen), prose(5)]
    items = [{"query": text, "choices": ["a", "b"], "gold": 0} for text in queries]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = f"evaluate.tasks=[{{name: quiz, path: {tmp_path / 'quiz.jsonl'}, kind: choice}}]"
    planned = llmill("plan", str(llmill.recipe), "--set", task).stdout
    assert planned.count("quiz: not among clean.decontamination.sets") == 1
    shown = llmill("run", str(llmill.recipe), "--set", task)
    evaluation = Store(llmill.home).artifacts("evaluate")[-1]
    rows = pq.read_table(evaluation.path / "items.parquet").to_pylist()
    assert [row["seen"] > 0.5 for row in rows] == [True] * len(names[0]) + [False] * (len(names[1]) + 1)
    metrics, unseen = evaluation.metrics, [row for row in rows if not row["seen"]]
    assert metrics["quiz/seen"] == len(rows) - len(unseen) < len(rows)
    assert metrics["quiz/accuracy_unseen"] == sum(row["right"] for row in unseen) / len(unseen)
    said = f"quiz: {len(rows) - len(unseen)} of {len(rows)} items occur in the training documents"
    assert said in " ".join((shown.stdout + shown.stderr).split())
