"""A recipe with two models of one corpus, an evaluation and an export of each, and a second evaluation of one: killed,
resumed, deployed and compared.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from command_line import Llmill, kill_tree
from conftest import RECIPE
from mlflow import MlflowClient

from flows.engine.store import Store
from flows.recipe import load_recipe

TWO = (
    RECIPE.replace("tokens: 61_440", "tokens: 20_480")
    + """\
pretrain_small:
  stage: pretrain
  model: {{layers: 1, width: 32, heads: 2, context: 64, tie_embeddings: true}}
  tokens: 20_480
  batch_tokens: 1024
  lr: 3.0e-3
  runtime: {{checkpoint_every: 5}}
evaluate_small: {{stage: evaluate, max_new_tokens: 16}}
export_small: {{stage: export}}
evaluate_few: {{stage: evaluate, max_documents: 5, max_new_tokens: 4, inputs: {{model: pretrain}}}}
"""
)


@pytest.fixture(scope="module")
def two(make_llmill: Any) -> Llmill:
    """A home in which the recipe was killed within its second training, and run again."""
    llmill = make_llmill(recipe=TWO)
    run = llmill.start("run", str(llmill.recipe))
    store = llmill.home / "store"
    while not (
        list(store.glob("export/*/manifest.json"))
        and list(store.glob("pretrain/*.partial/logs/events.jsonl"))
    ):
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    kill_tree(run)
    out = llmill("run", str(llmill.recipe)).stdout
    assert "reused" in out
    return llmill


def test_each_step_has_its_artifact_and_each_export_is_of_its_own_model(two: Llmill) -> None:
    plan = json.loads(two("plan", str(two.recipe), "--json").stdout)
    assert [step["step"] for step in plan] == [step.name for step in load_recipe(two.recipe).steps]
    assert {step["action"] for step in plan} == {"reuse"}
    made = {step["step"]: step["fingerprint"] for step in plan}
    assert len(set(made.values())) == len(made)
    store = Store(two.home)
    for suffix in ("", "_small"):
        artifact = store.get("export", made[f"export{suffix}"])
        assert artifact
        assert artifact.inputs["model"].fingerprint == made[f"pretrain{suffix}"]
        assert artifact.inputs["scores"].fingerprint == made[f"evaluate{suffix}"]
    few = store.get("evaluate", made["evaluate_few"])
    assert few
    assert few.inputs["model"].fingerprint == made["pretrain"]


def test_mlflow_has_a_child_for_each_step_under_its_name(two: Llmill) -> None:
    client = MlflowClient(f"sqlite:///{two.home}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    children = {run.data.tags["llmill.step"]: run for run in runs if "llmill.step" in run.data.tags}
    assert len(children) == len(runs) - 1
    assert set(children) == {step.name for step in load_recipe(two.recipe).steps}
    assert children["evaluate_few"].data.tags["llmill.stage"] == "evaluate"
    [parent] = [run for run in runs if "llmill.step" not in run.data.tags]
    assert parent.info.status == "FINISHED"
    for name, child in children.items():
        assert parent.data.tags[f"llmill.{name}.run_id"] == child.info.run_id
    assert "evaluate_few/bits_per_byte" in parent.data.metrics


def test_all_models_of_a_run_are_compared_or_those_that_are_named(two: Llmill) -> None:
    def compared(*runs: str) -> list[str]:
        said = json.loads(two("compare", *runs, "--json").stdout)
        return [one["stages"]["evaluate"] for one in said["runs"]]

    plan = json.loads(two("plan", str(two.recipe), "--json").stdout)
    made = {step["step"]: step["fingerprint"] for step in plan}
    assert compared("latest") == [made[name] for name in ("evaluate", "evaluate_few", "evaluate_small")]
    assert compared("latest/evaluate_small", "latest/evaluate") == [made["evaluate_small"], made["evaluate"]]
    quiz = two.home.parent / "quiz.jsonl"
    quiz.write_text(
        json.dumps({"query": "one and one are", "choices": ["two", "three"], "gold": 0}, allow_nan=False)
    )
    for command in (
        ("compare", "latest/nothing", "latest"),
        ("score", "latest/nothing", "--tasks", str(quiz)),
    ):
        assert "no evaluation nothing" in two(*command, code=2).stderr, "and no hub is asked"


def test_a_step_of_another_name_is_traced_and_built_again_alone(two: Llmill) -> None:
    plan = json.loads(two("plan", str(two.recipe), "--json").stdout)
    made = {step["step"]: step["fingerprint"] for step in plan}
    trace = json.loads(two("trace", made["evaluate_small"], "--json").stdout)
    assert made["pretrain_small"] in [one["fingerprint"] for one in trace["made_from"]]
    assert made["pretrain"] not in [one["fingerprint"] for one in trace["made_from"]]
    assert ("evaluate_small", "ran") in {(run["name"], run["how"]) for run in trace["runs"]}
    before = two.payloads()
    out = two("run", str(two.recipe), "--only", "evaluate_small", "--force", "evaluate_small").stdout
    assert "evaluate_small" in out
    assert two.payloads() == before
