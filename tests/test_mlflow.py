"""What a run leaves in MLflow, read back through its client."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from command_line import Llmill, kill_tree
from forks import ROOT
from mlflow import MlflowClient
from mlflow.entities import Run
from operator_api import until

from flows.engine.ports import free_port
from flows.listeners.mlflow.points import is_drawn
from flows.recipe import flatten
from flows.stages import BY_NAME, DEFAULT


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
    return {stage: finished.manifest(stage) for stage in DEFAULT}


def test_a_run_is_a_parent_with_a_child_for_each_stage_that_ran(parent, children):
    assert parent.info.run_name.startswith("small · ")
    assert parent.info.status == "FINISHED"
    assert set(children) == set(DEFAULT)
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
    losses = pq.read_table(finished.made("pretrain") / "losses.parquet").to_pylist()
    history = client.get_metric_history(children["pretrain"].info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(row["step"], row["loss"]) for row in losses]
    assert len({point.timestamp for point in history}) > 1
    told = ("lr", "lr_matrices", "update_ratio_matrices", "grad_norm", "tokens_per_second")
    for name in (*(f"train/{name}" for name in told), "val/bits_per_byte"):
        assert client.get_metric_history(children["pretrain"].info.run_id, name), name


def test_norms_by_layer_are_on_the_trainings_run_alone(client, finished, children, parent):
    last = finished.manifest("pretrain")["metrics"]["steps"]
    layers = ("embedding", "block_00", "final_norm")
    for name in (f"norms/{norm}/{layer}" for norm in ("grad", "update", "update_ratio") for layer in layers):
        [point] = client.get_metric_history(children["pretrain"].info.run_id, name)
        assert (point.step, point.value > 0) == (last, True), name
    assert not any(name.startswith("norms/") for name in parent.data.metrics)


def samples_of(client: MlflowClient, run: Run) -> list[list]:
    """Rows of the table of a run that MLflow shows as one."""
    name = "samples.json"
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": name, "type": "table"}]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, name)).read_text(encoding="utf-8"))
    assert table["columns"] == ["step", "tokens", "prompt", "text"]
    return table["data"]


def test_samples_by_step_are_a_table_of_the_training_and_of_the_whole_run(client, children, parent):
    rows = samples_of(client, children["pretrain"])
    prompts = ("", "The ")
    assert [row[:3] for row in rows] == [
        [step, step * 1024, prompt] for step in (20, 40, 60) for prompt in prompts
    ]
    assert all(isinstance(text, str) for *_, text in rows)
    assert samples_of(client, parent) == rows


def test_a_whole_run_has_the_curves_over_steps_and_over_tokens(client, finished, parent):
    losses = pq.read_table(finished.made("pretrain") / "losses.parquet").to_pylist()
    checks = pq.read_table(finished.made("pretrain") / "validation.parquet").to_pylist()
    tokens = {row["step"]: row["tokens"] for row in losses}
    wanted = {
        "train/loss": [(row["step"], row["loss"]) for row in losses],
        "tokens/train_loss": [(row["tokens"], row["loss"]) for row in losses],
        "val/bits_per_byte": [(row["step"], row["bits_per_byte"]) for row in checks],
        "tokens/val_bits_per_byte": [(tokens[row["step"]], row["bits_per_byte"]) for row in checks],
    }
    for name, points in wanted.items():
        history = client.get_metric_history(parent.info.run_id, name)
        assert [(point.step, point.value) for point in history] == points, name
    assert client.get_metric_history(parent.info.run_id, "train/tokens_per_second")
    assert client.get_metric_history(parent.info.run_id, "system/cpu_utilization_percentage")


def test_a_whole_run_lists_its_data_sets_and_its_models(client, parent, manifests):
    listed = {one.dataset.name: one.dataset.digest for one in parent.inputs.dataset_inputs}
    assert listed == {
        step: manifests[step]["fingerprint"] for step in ("download", "clean", "dedup", "tokenize")
    }
    models = [client.get_logged_model(one.model_id) for one in parent.outputs.model_outputs]
    assert sorted(model.model_type for model in models) == ["checkpoint", "export"]
    assert {model.tags["llmill.fingerprint"] for model in models} == {
        manifests[step]["fingerprint"] for step in ("pretrain", "export")
    }


def test_a_registered_model_shows_how_good_it_is_and_on_which_data(client, manifests):
    [version] = client.search_model_versions("name = 'small'")
    scores, trained = manifests["evaluate"]["metrics"], manifests["pretrain"]["metrics"]
    assert scores["documents"] < 10, "of so few there is no interval"
    said = f"{scores['bits_per_byte']:.4f}"
    assert version.tags["bits_per_byte"] == said
    assert version.tags["tokens"] == f"{trained['tokens']:,.0f}"
    assert version.tags["recipe"] == "small"
    assert said in version.description
    known = f"tags.`llmill.fingerprint` = '{manifests['export']['fingerprint']}'"
    [model] = client.search_logged_models([client.get_experiment_by_name("small").experiment_id], known)
    figures = {metric.key: metric for metric in model.metrics}
    assert figures["bits_per_byte"].value == scores["bits_per_byte"]
    assert figures["bits_per_byte"].dataset_digest == manifests["tokenize"]["fingerprint"]
    assert figures["parameters"].value == trained["parameters"]


def test_of_a_long_training_a_whole_run_has_what_a_chart_needs():
    for steps in (100, 1_000, 30_000, 1_000_000):
        drawn = [step for step in range(1, steps + 1) if is_drawn(step)]
        assert len(drawn) <= 2_000
        assert all(after - before <= max(1, after // 64) for before, after in pairwise(drawn))


def test_the_digest_of_a_dataset_input_is_the_fingerprint_of_the_artifact(children, manifests):
    for stage, child in children.items():
        contexts = {id(entry): entry.tags[0].value for entry in child.inputs.dataset_inputs}
        assert set(contexts.values()) <= ({"input", "eval"} if stage == "export" else {"input"})
        inputs = {
            entry.dataset.name: entry.dataset.digest
            for entry in child.inputs.dataset_inputs
            if contexts[id(entry)] == "input"
        }
        recorded = manifests[stage]["inputs"]
        assert inputs == {source["stage"]: source["fingerprint"] for source in recorded.values()}
        takes = {one.rstrip("?") for one in BY_NAME[stage].takes} - {*BY_NAME[stage].only_named}
        assert set(recorded) == takes
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


def test_pages_say_what_came_of_a_run_and_the_table_opens_with_what_counts(
    client, parent, children, finished
):
    note = parent.data.tags["mlflow.note.content"]
    for stage in DEFAULT:
        assert f"| {stage} | ran |" in note
    written = (finished.made("evaluate") / "samples.jsonl").read_text()
    sample = json.loads(written.splitlines()[1])
    assert sample["prompt"] + sample["text"] in note
    assert "llmill run" in note
    for stage, child in children.items():
        report = (finished.made(stage) / "report.md").read_text()
        assert child.data.tags["mlflow.note.content"] == report
    experiment = client.get_experiment_by_name("small")
    assert experiment.tags["mlflow.experiment.primaryMetric.name"] in parent.data.metrics


def test_the_table_of_runs_has_a_view_whose_columns_are_all_filled(client, parent):
    tags = client.get_experiment(parent.info.experiment_id).tags
    view = json.loads(tags["mlflow.sharedViewState.llmill"])
    assert view["name"] == "llmill"
    columns = json.loads(view["state"])["selectedColumns"]
    filled = {f"metrics.`{name}`" for name in parent.data.metrics}
    filled |= {f"params.`{name}`" for name in parent.data.params} | {"attributes.`Description`"}
    assert len(columns) > 5
    assert set(columns) <= filled


def test_each_stage_has_what_it_asked_of_the_machine(client, children):
    for stage, child in children.items():
        for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"):
            points = client.get_metric_history(child.info.run_id, f"system/{name}")
            assert points, (stage, name)
            for point in points:
                assert point.value >= 0
                assert child.info.start_time <= point.timestamp <= child.info.end_time + 1000


def test_what_was_validated_is_a_model_with_its_figures(client, children, finished):
    training = children["pretrain"]
    found = client.search_logged_models([training.info.experiment_id], "model_type = 'checkpoint'")
    checks = pq.read_table(finished.made("pretrain") / "validation.parquet").to_pylist()
    assert len(checks) > 2
    by_step = {int(model.params["step"]): model for model in found}
    assert sorted(by_step) == [check["step"] for check in checks]
    for check in checks:
        figures = {metric.key: metric.value for metric in by_step[check["step"]].metrics}
        assert figures["val/bits_per_byte"] == check["bits_per_byte"]
    kept = [step for step, model in by_step.items() if model.tags["llmill.weights"].startswith("sealed in")]
    assert kept == [checks[-1]["step"]]
    points = client.get_metric_history(training.info.run_id, "val/bits_per_byte")
    assert [point.step for point in points] == sorted(by_step), "none is there twice"


@pytest.fixture(scope="module")
def version(client: MlflowClient, finished: Llmill):
    [version] = client.search_model_versions("name = 'small'")
    return version


def test_the_export_is_a_registered_model_and_the_candidate(client, version, manifests, children):
    assert version.tags["llmill.fingerprint"] == manifests["export"]["fingerprint"]
    assert version.run_id == children["export"].info.run_id
    assert client.get_model_version_by_alias("small", "candidate").version == version.version
    assert f"llmill trace {manifests['export']['fingerprint']}" in version.description


def test_every_tag_of_a_run_and_its_models_is_documented(client, runs, version):
    documented = set(re.findall(r"`(llmill\.[\w.]+)`", (ROOT / "docs" / "mlflow.md").read_text()))
    models = client.search_logged_models([runs[0].info.experiment_id])
    given = {tag for tagged in [*(run.data for run in runs), version, *models] for tag in tagged.tags}
    named = {re.sub(rf"^llmill\.({'|'.join(DEFAULT)})\.", "llmill.STEP.", tag) for tag in given}
    assert len(named) > 10
    assert {tag for tag in named if tag.startswith("llmill.")} <= documented


@pytest.mark.long
def test_mlflow_serves_the_registered_model_and_loads_it(finished: Llmill, tmp_path: Path):
    """``mlflow models serve`` and ``mlflow.transformers.load_model``, each in a process of its own, say the same."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it looks for uvicorn there
    uri = {"MLFLOW_TRACKING_URI": f"sqlite:///{finished.home}/mlflow.db", "PATH": programs}
    program = (
        "import json, mlflow.transformers as t; p = t.load_model('models:/small@candidate'); "
        "print(json.dumps(p('def f', max_new_tokens=4, do_sample=False)[0]['generated_text']))"
    )
    environment = {**os.environ, **uri}
    loaded = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=900
    )
    assert loaded.returncode == 0, loaded.stderr
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/small@candidate"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [*command, "--env-manager", "local", "--port", str(port)],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        until(lambda: pinged(port) or server.poll() is not None, bool, 200)
        assert server.poll() is None, (tmp_path / "log").read_text()
        body = {"inputs": ["def f"], "params": {"max_new_tokens": 4, "do_sample": False}}
        answer = httpx.post(f"http://127.0.0.1:{port}/invocations", json=body, timeout=60)
        assert answer.json() == {"predictions": [json.loads(loaded.stdout.splitlines()[-1])]}, answer.text
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def pinged(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ping", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_a_run_that_reuses_everything_can_be_compared_with_the_one_that_built_it(client, finished, parent):
    finished.run()
    experiment = client.get_experiment_by_name("small")
    newest = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])[0]
    assert newest.info.run_id != parent.info.run_id
    assert newest.data.params == parent.data.params
    measured = {name for name in parent.data.metrics if "/" not in name or name.startswith("system/")}
    shared = {name: value for name, value in parent.data.metrics.items() if name not in measured}
    assert shared.items() <= newest.data.metrics.items()
    for name in ("train/loss", "tokens/train_loss", "tokens/val_bits_per_byte"):
        drawn, again = (
            [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
            for run in (parent, newest)
        )
        assert drawn == again, name
    for stage in DEFAULT:
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
    assert len(runs) == 1 + len(DEFAULT)
    [training] = [run for run in runs if run.info.run_name == "pretrain"]
    steps = [point.step for point in client.get_metric_history(training.info.run_id, "train/loss")]
    assert steps == sorted(set(steps))
    assert len(steps) == training.data.metrics["steps"]
    rows = samples_of(client, training)
    assert [row[0] for row in rows] == [20, 20, 40, 40, 60, 60]
    assert samples_of(client, parents[0]) == rows
