"""What a run leaves in MLflow, read back through its client."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command_line import Llmill, kill_tree
from mlflow import MlflowClient
from mlflow.entities import Run

from flows.recipe import flatten
from flows.stages import BY_NAME


@pytest.fixture(scope="module")
def client(finished: Llmill) -> MlflowClient:
    return MlflowClient(f"sqlite:///{finished.home}/mlflow.db")


@pytest.fixture(scope="module")
def runs(client: MlflowClient) -> list[Run]:
    """All runs of the experiment, oldest first."""
    experiment = client.get_experiment_by_name("small")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


@pytest.fixture(scope="module")
def parent(runs: list[Run]) -> Run:
    return runs[0]


@pytest.fixture(scope="module")
def children(parent: Run, runs: list[Run]) -> dict[str, Run]:
    return {
        run.info.run_name: run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }


@pytest.fixture(scope="module")
def manifests(finished: Llmill) -> dict[str, dict]:
    loaded = [json.loads(path.read_text()) for path in finished.home.glob("store/*/*/manifest.json")]
    return {manifest["stage"]: manifest for manifest in loaded}


def test_a_run_is_a_parent_with_a_child_for_each_stage_that_ran(parent, children):
    assert parent.info.run_name.startswith("small ")
    assert parent.info.status == "FINISHED"
    assert set(children) == set(BY_NAME)
    assert {child.info.status for child in children.values()} == {"FINISHED"}


def test_params_are_the_identity_of_each_config(parent, children, manifests):
    for stage, manifest in manifests.items():
        identity = flatten(manifest["config"])
        assert {key: text(value) for key, value in identity.items()} == children[stage].data.params
        on_parent = {key.removeprefix(f"{stage}."): value for key, value in parent.data.params.items()
                     if key.startswith(f"{stage}.")}  # fmt: skip
        assert on_parent == children[stage].data.params


def text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_metrics_are_those_of_the_manifest_and_the_headlines_stand_on_the_parent(parent, children, manifests):
    for stage, manifest in manifests.items():
        logged = children[stage].data.metrics
        assert manifest["metrics"].items() <= logged.items()
        assert logged["seconds"] == pytest.approx(manifest["seconds"])
        for name in BY_NAME[stage].headline:
            if name in manifest["metrics"]:
                assert parent.data.metrics[f"{stage}/{name}"] == manifest["metrics"][name]


def test_training_is_there_step_by_step_once(client, finished, children):
    [path] = finished.home.glob("store/pretrain/*/losses.parquet")
    losses = pq.read_table(path).to_pylist()
    history = client.get_metric_history(children["pretrain"].info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(row["step"], row["loss"]) for row in losses]
    assert len({point.timestamp for point in history}) > 1
    told = ("lr", "lr_matrices", "update_ratio_matrices", "grad_norm", "tokens_per_second")
    for name in (*(f"train/{name}" for name in told), "val/bits_per_byte"):
        assert client.get_metric_history(children["pretrain"].info.run_id, name), name


def test_the_digest_of_a_dataset_input_is_the_fingerprint_of_the_artifact(children, manifests):
    for stage, child in children.items():
        inputs = {entry.dataset.name: entry.dataset.digest for entry in child.inputs.dataset_inputs}
        recorded = {name: source["fingerprint"] for name, source in manifests[stage]["inputs"].items()}
        assert inputs == recorded
        assert set(inputs) == set(BY_NAME[stage].inputs)
        assert child.data.tags["llmill.fingerprint"] == manifests[stage]["fingerprint"]


def test_manifest_report_and_payload_are_artifacts(client, children, parent, manifests):
    for stage, child in children.items():
        names = {entry.path for entry in client.list_artifacts(child.info.run_id)}
        assert {"manifest.json", "report.md"} <= names, stage
        assert names & {"payload", "payload.json"}, stage
        local = Path(client.download_artifacts(child.info.run_id, "manifest.json"))
        assert json.loads(local.read_text()) == manifests[stage]
    assert {"recipe.yaml", "summary.md"} <= {
        entry.path for entry in client.list_artifacts(parent.info.run_id)
    }


def test_a_run_that_reuses_everything_can_be_compared_with_the_one_that_built_it(client, finished, parent):
    finished.run()
    experiment = client.get_experiment_by_name("small")
    newest = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])[0]
    assert newest.info.run_id != parent.info.run_id
    assert newest.data.params == parent.data.params
    shared = {name: value for name, value in parent.data.metrics.items() if "/" in name}
    assert shared.items() <= newest.data.metrics.items()
    for stage in BY_NAME:
        assert newest.data.tags[f"llmill.{stage}.how"] == "reused"
        assert newest.data.tags[f"llmill.{stage}.run_id"] == parent.data.tags[f"llmill.{stage}.run_id"]


def test_a_killed_run_is_continued_under_the_same_runs_and_no_step_is_logged_twice(make_llmill):
    llmill = make_llmill()
    run = llmill.start("run", str(llmill.recipe))
    events = "store/pretrain/*.partial/logs/events.jsonl"
    while not any(path.read_text().count('"step"') > 20 for path in llmill.home.glob(events)):
        assert run.poll() is None
        time.sleep(0.01)
    kill_tree(run)
    llmill.run()
    client = MlflowClient(f"sqlite:///{llmill.home}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert len(runs) == 1 + len(BY_NAME)
    [training] = [run for run in runs if run.info.run_name == "pretrain"]
    steps = [point.step for point in client.get_metric_history(training.info.run_id, "train/loss")]
    assert steps == sorted(set(steps))
    assert len(steps) == training.data.metrics["steps"]
