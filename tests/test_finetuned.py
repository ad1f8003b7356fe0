"""A recipe that goes on with a finetuning: run, one step again, compared with the base model, exported, talked to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Llmill
from conftest import RECIPE
from mlflow import MlflowClient
from transformers import AutoTokenizer

from flows.engine.store import Store

FINETUNE = """\
finetune:
  data: {{path: {corpus}.conversations.jsonl, license: CC-BY-4.0, origin: made for a test}}
  epochs: 6
  batch_rows: 4
  held_out: 0.2
  lr: 3.0e-3
  answers: 1
  answer_tokens: 4
  runtime: {{checkpoint_every: 5, validation: {{every: 5, tokens: 2048}}}}
"""
SETS = "sets: [{{name: talk, path: {corpus}.set.jsonl}}]"
BASE = f"evaluate_base: {{{{stage: evaluate, max_new_tokens: 4, {SETS}, inputs: {{{{model: pretrain}}}}}}}}\n"
ALIGN = """\
align:
  data: {{path: {corpus}.preferences.jsonl}}
  inputs: {{model: finetune}}
  batch_rows: 2
  held_out: 0.2
  lr: 1.0e-4
  answers: 2
  answer_tokens: 4
  runtime: {{checkpoint_every: 5, validation: {{every: 5, tokens: 2048}}}}
evaluate_aligned: {{stage: evaluate, max_new_tokens: 4, inputs: {{model: align}}}}
"""
TUNED = RECIPE.replace("evaluate: {{", f"{FINETUNE}evaluate: {{{{{SETS}, ") + BASE + ALIGN


@pytest.fixture(scope="module")
def tuned(make_llmill: Any) -> Llmill:
    llmill: Llmill = make_llmill(recipe=TUNED)
    text = llmill.recipe.read_text(encoding="utf-8")
    path = re.search(r"\S+\.conversations\.jsonl", text)
    assert path
    rows: list[Any] = [
        {"instruction": f"{word} {number}", "output": f"{word}!"}
        for number in range(10)
        for word in ("import", "日本", "ไทย", "مرحبا", "नमस्ते", "🦊")
    ]
    texts = [{"text": f"{row['instruction']}\n{row['output']}"} for row in rows[:30]]
    pairs = [{"prompt": row["instruction"], "chosen": row["output"], "rejected": "no"} for row in rows]
    files = {"conversations": [*rows, {"text": "no conversation"}], "set": texts, "preferences": pairs}
    for kind, wanted in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in wanted)
        Path(path[0].replace("conversations", kind)).write_text("".join(lines), encoding="utf-8")
    return llmill


@pytest.mark.long
def test_it_runs_and_is_run_again_alone_compared_and_talked_to(tuned: Llmill) -> None:
    out = " ".join(tuned.run().stdout.split())
    assert "1 rejected (no known fields)" in out
    store = Store(tuned.home)
    [model], [exported] = store.artifacts("finetune"), store.artifacts("export")
    assert exported.inputs["model"].fingerprint == model.fingerprint
    assert model.metrics["val_loss"] < model.metrics["val_loss_before"]
    card = (exported.path / "README.md").read_text(encoding="utf-8")
    assert "trained on conversations" in card
    assert "made for a test | CC-BY-4.0 |" in card
    assert AutoTokenizer.from_pretrained(exported.path).chat_template

    client = MlflowClient(f"sqlite:///{tuned.home}/mlflow.db")
    [experiment] = [one for one in client.search_experiments() if one.name != "Default"]
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.data.metrics["finetune/val_loss"] == model.metrics["val_loss"]
    history = client.get_metric_history(parent.info.run_id, "finetune/train/loss")
    assert len({point.step for point in history}) == model.metrics["steps"]
    over_tokens = client.get_metric_history(parent.info.run_id, "finetune/tokens/val_bits_per_byte")
    assert 0 in {point.step for point in over_tokens}
    [child] = [run for run in runs if run.data.tags.get("llmill.step") == "finetune"]
    assert "loss.png" in {one.path.rpartition("/")[2] for one in client.list_artifacts(child.info.run_id)}

    [aligned] = store.artifacts("align")
    assert aligned.inputs["model"].fingerprint == model.fingerprint
    assert parent.data.metrics["align/accuracy"] == aligned.metrics["accuracy"]
    assert client.get_metric_history(parent.info.run_id, "align/val/accuracy")
    assert {"evaluate", "evaluate_base", "evaluate_aligned"} <= {
        run.data.tags.get("llmill.step") for run in runs
    }

    name = parent.info.run_name
    found = json.loads(
        tuned("compare", f"{name}/evaluate_base", f"{name}/evaluate", "--json", "--no-log").stdout
    )
    [answer] = found["verdict"]["sets_and_tasks"]
    assert answer["outcome"] in ("first is better", "second is better", "no difference shown")
    assert not found["curves"], "a pretraining and a finetuning are not drawn over each other"

    again = json.loads(tuned("plan", str(tuned.recipe), "--set", "finetune.lr=0.001", "--json").stdout)
    actions = {step["step"]: step["action"] for step in again}
    assert {name for name, action in actions.items() if action != "reuse"} == {
        "finetune",
        "evaluate",
        "export",
        "align",
        "evaluate_aligned",
    }
    tuned.run("--set", "finetune.lr=0.001", "--set", "finetune.lora={rank: 2}")
    both = [one.fingerprint for one in store.artifacts("finetune")]
    assert len(both) == 2
    found = json.loads(tuned("compare", "latest~1/evaluate", "latest/evaluate", "--json", "--no-log").stdout)
    assert {row["name"] for row in found["settings"] if row["stage"] == "finetune"} >= {"lr"}
    assert found["curves"]["A"]["held_out_bits_per_byte"]["tokens"][0] == 0

    said = subprocess.run(
        [sys.executable, "-m", "flows.cli.start", "chat", "--max-tokens", "4"],
        env=tuned.environment(), input="import 3\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "align" in said.stderr, "the newest model"
    assert "trained on no conversations" not in said.stderr
