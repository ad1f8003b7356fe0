"""A recipe that ends in a classifier: run, exported, used, and compared with another one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from command_line import Llmill
from mlflow import MlflowClient
from transformers import pipeline
from tuned import written

from flows.engine.store import Store

RECIPE = """\
name: spam
adopt: {{type: model, path: {model}}}
classify:
  data: {{path: {texts}}}
  epochs: 6
  batch_rows: 2
  context: 64
  lr: 3.0e-3
  held_out: 0.3
  runtime: {{checkpoint_every: 20, validation: {{every: 20}}}}
export: {{name: spam}}
"""


@pytest.fixture(scope="module")
def spam(copy_finished: Callable[[Path], Llmill], tmp_path_factory: pytest.TempPathFactory) -> Llmill:
    folder = tmp_path_factory.mktemp("spam")
    finished = copy_finished(folder / "home")
    [export] = Store(finished.home).artifacts("export")
    rows = [
        {"text": f"{word} {number}", "label": label}
        for number in range(30)
        for label, words in (("spam", ("WIN!!", "赢取大奖", "ฟรี")), ("ham", ("hello", "你好", "مرحبا")))
        for word in words
    ]
    recipe = folder / "spam.yaml"
    texts = written(folder / "texts.jsonl", [*rows, {"text": "without a label"}])
    recipe.write_text(RECIPE.format(model=export.path, texts=texts))
    return Llmill(home=finished.home, recipe=recipe)


def labelled(llmill: Llmill, *arguments: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli.start", "classify", *arguments]
    return subprocess.run(
        command, env=llmill.environment(), input=lines, capture_output=True, text=True, timeout=900
    )


@pytest.mark.long
def test_it_runs_is_used_and_is_compared(spam: Llmill) -> None:
    out = " ".join(spam.run().stdout.split())
    assert "1 rejected: 1 no label" in out
    assert f'llmill classify --home {spam.home} "..."' in out
    store = Store(spam.home)
    [made] = store.artifacts("classify")
    assert made.metrics["accuracy"] > made.metrics["accuracy_commonest"]
    export = store.artifacts("export")[-1]
    assert export.inputs["model"].fingerprint == made.fingerprint
    client = MlflowClient(f"sqlite:///{spam.home}/mlflow.db")
    [step] = client.search_runs(
        [one.experiment_id for one in client.search_experiments()], "tags.`llmill.step` = 'classify'"
    )
    drawn = {one.path.rpartition("/")[2] for one in client.list_artifacts(step.info.run_id)}
    assert {"loss.png", "confusion.png", "calibration.png"} <= drawn

    asked = ["WIN!! 77", "你好 78"]
    rows = [json.loads(line) for line in labelled(spam, "--json", *asked).stdout.splitlines()]
    theirs = pipeline("text-classification", model=str(export.path), tokenizer=str(export.path))
    for text, row in zip(asked, rows, strict=True):
        [found] = theirs(text)
        assert row["labels"] == [found["label"]]
        assert row["probabilities"][found["label"]] == pytest.approx(found["score"], abs=1e-4)
    of_folder = labelled(spam, "--model", str(export.path), lines="WIN!! 77\n\n你好 78\n")
    assert [line.split()[0] for line in of_folder.stdout.splitlines()] == [row["labels"][0] for row in rows]

    mlflow.set_tracking_uri(f"sqlite:///{spam.home}/mlflow.db")
    served = mlflow.pyfunc.load_model("models:/spam/1").predict(asked)
    assert served["label"].tolist() == [row["labels"][0] for row in rows]

    spam.run("--set", "classify.lr=1.0e-6", "--set", "classify.epochs=0.1")
    worse = max(store.artifacts("classify"), key=lambda one: str(one.manifest["finished"]))
    answer: dict[str, Any] = json.loads(spam("compare", worse.fingerprint, made.fingerprint, "--json").stdout)
    assert answer["texts"] == made.metrics["held_out_texts"]
    assert answer["left_out"] == 0
    assert [one["accuracy"] for one in answer["classifiers"]] == [
        worse.metrics["accuracy"],
        made.metrics["accuracy"],
    ]
    [claim] = answer["claims"]
    assert claim["outcome"] == "second is better"
    assert claim["difference"] == pytest.approx(made.metrics["accuracy"] - worse.metrics["accuracy"])
    shown = spam("compare", worse.fingerprint, made.fingerprint).stdout
    assert "B is better than A: B − A = +" in shown


@pytest.mark.parametrize(
    ("arguments", "lines", "said"),
    [
        ((), "", "standard input is empty"),
        (("x", "--model", "nobody"), "", "nobody is no model that gives labels"),
        (("x", "--home", "{tmp}"), "", "no classifier in"),
    ],
)
def test_what_can_not_be_done_is_said(
    spam: Llmill, tmp_path: Path, arguments: tuple[str, ...], lines: str, said: str
) -> None:
    done = labelled(spam, *(one.format(tmp=tmp_path) for one in arguments), lines=lines)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.long
def test_a_model_that_continues_texts_is_not_compared_with_one_that_gives_labels(spam: Llmill) -> None:
    [made] = [one for one in Store(spam.home).artifacts("classify") if one.metrics["steps"] > 5]
    done = spam("compare", made.fingerprint, "latest", code=2)
    assert done.returncode == 2
    assert "latest gives no labels" in done.stderr
