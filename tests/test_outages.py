"""MLflow's server goes away, comes back and hangs, and the run goes on: every figure arrives, once, however late."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from command_line import Llmill, kill_tree
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow_server import Server, Told, stopped
from operator_api import until

from flows.engine.store import Store
from flows.listeners.mlflow.model_metrics import measured
from flows.listeners.mlflow.points import event_points
from flows.stages import DEFAULT

pytestmark = pytest.mark.timeout(1200)  # what the undisturbed run takes counts for the first test
EVENTS = "store/pretrain/*.partial/logs/events.jsonl"
OWN_TAGS = {"llmill.key", "mlflow.parentRunId", "llmill.prefect_flow_run_id", "llmill.prefect_url"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def undisturbed(make_llmill) -> tuple[Llmill, Told]:
    """A run that never lost its MLflow."""
    llmill = make_llmill()
    llmill.run()
    return llmill, Told(f"sqlite:///{llmill.home}/mlflow.db")


def start(llmill: Llmill, server: Server):
    return llmill.start("run", str(llmill.recipe), MLFLOW_TRACKING_URI=server.url)


def trained(llmill: Llmill, run, steps: int) -> None:
    """Wait until the run has made so many steps."""
    while not any(path.read_text().count('"step"') > steps for path in llmill.home.glob(EVENTS)):
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)


def ended_well(run) -> str:
    out, err = run.communicate(timeout=900)
    assert run.returncode == 0, out + err
    assert "Traceback" not in out + err
    return out


def left(llmill: Llmill) -> list[Path]:
    return sorted((llmill.home / "runs").glob("*/log.jsonl"))


def expected_points(llmill: Llmill) -> dict[str, set[tuple]]:
    """Stage -> every (metric, step, value, milliseconds) that its artifact and its events say MLflow should have."""
    points: dict[str, set[tuple]] = {}
    for artifact in Store(llmill.home).artifacts():
        sealed = {**artifact.metrics, "seconds": artifact.manifest["seconds"]}
        stamp = round(datetime.fromisoformat(artifact.manifest["finished"]).timestamp() * 1000)
        if artifact.stage == "export":  # and how good the exported model is
            found = measured(artifact)
            sealed |= found.trained
            for one in found.evaluated:
                sealed |= one.metrics
        points[artifact.stage] = {(name, 0, float(value), stamp) for name, value in sealed.items()}
        events = artifact.path / "logs" / "events.jsonl"
        for line in events.read_text().splitlines() if events.exists() else []:
            drawn = event_points(json.loads(line))
            points[artifact.stage] |= {(name, step, value, at) for name, value, at, step in drawn}
    return points


def told(server: Told) -> dict[str, Run]:
    """Each stage's run, and the parent as ``small``; there is one of each."""
    found = server.runs()
    named = {run.info.run_name.split()[0]: run for run in found}
    assert len(found) == len(named) == 1 + len(DEFAULT), [run.info.run_name for run in found]
    assert {run.info.status for run in found} == {"FINISHED"}
    for stage in DEFAULT:
        assert named[stage].data.tags["mlflow.parentRunId"] == named["small"].info.run_id
    return named


def points_of(server: Told, run: Run) -> list[tuple]:
    return [
        (point.key, point.step, point.value, point.timestamp)
        for name in run.data.metrics
        for point in server.client.get_metric_history(run.info.run_id, name)
    ]


def files_of(server: Told, run: Run, folder: str = "") -> set[str]:
    """All files of a run."""
    found: set[str] = set()
    for entry in server.client.list_artifacts(run.info.run_id, folder):
        found |= files_of(server, run, entry.path) if entry.is_dir else {entry.path}
    return found


def assert_whole(llmill: Llmill, server: Server, undisturbed: tuple[Llmill, Told]) -> None:
    """MLflow has all that it has of the undisturbed run, each point once, at its own time."""
    ours, theirs = told(server), told(undisturbed[1])
    assert llmill.payloads() == undisturbed[0].payloads()
    for stage, expected in expected_points(llmill).items():
        found = points_of(server, ours[stage])
        assert len(found) == len(set(found))
        assert {point for point in found if not point[0].startswith("system/")} == expected, stage
    for name, run in ours.items():
        other = theirs[name]
        assert run.data.params == other.data.params
        assert run.data.tags.keys() - OWN_TAGS == other.data.tags.keys() - OWN_TAGS
        assert {key for key, *_ in points_of(server, run)} == {
            key for key, *_ in points_of(undisturbed[1], other)
        }
        inputs = [(one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs]
        assert sorted(inputs) == sorted(
            (one.dataset.name, one.dataset.digest) for one in other.inputs.dataset_inputs
        )
        assert files_of(server, run) == files_of(undisturbed[1], other)
    losses = [
        sorted((step, value) for name, step, value, _ in points_of(where, runs["pretrain"]) if "loss" in name)
        for where, runs in ((server, ours), (undisturbed[1], theirs))
    ]
    assert losses[0] == losses[1]
    parent = ours["small"].data.tags
    for stage in DEFAULT:
        assert parent[f"llmill.{stage}.run_id"] == ours[stage].info.run_id
    assert left(llmill) == []


def test_a_server_that_comes_and_goes_has_all_in_the_end(make_llmill, undisturbed, server: Server) -> None:
    llmill = make_llmill()
    run = start(llmill, server)
    until(lambda: list(llmill.home.glob("store/download/*/manifest.json")), bool, 120)
    assert server.process is None
    with stopped(run.pid):  # else it may be over before a server is up
        server.start()
    until(server.runs, bool, 60)  # what had waited arrives while the run is at work
    trained(llmill, run, 20)
    server.kill()
    out = ended_well(run)
    assert f"MLflow at {server.url} does not answer; the run goes on" in out
    assert out.count("does not answer") == 1
    assert "llmill sync" in out
    assert left(llmill)
    said = llmill("sync", MLFLOW_TRACKING_URI=server.url, code=2)
    assert "what is left stays" in said.stderr
    server.start()
    assert "sent what 1 run(s) had left" in llmill.afresh("sync", MLFLOW_TRACKING_URI=server.url).stdout
    assert_whole(llmill, server, undisturbed)
    assert "nothing is left" in llmill("sync", MLFLOW_TRACKING_URI=server.url).stdout


@pytest.mark.long
def test_a_run_killed_while_the_server_is_away_is_told_whole_by_the_next_one(
    make_llmill, undisturbed, server: Server
) -> None:
    llmill = make_llmill()
    run = start(llmill, server)
    trained(llmill, run, 20)
    kill_tree(run)
    assert len(left(llmill)) == 1
    server.start()
    ended_well(start(llmill, server))
    assert_whole(llmill, server, undisturbed)


@pytest.mark.long
def test_a_server_that_hangs_holds_nothing_up_and_has_all_when_it_wakes(
    make_llmill, undisturbed, server: Server
) -> None:
    llmill = make_llmill()
    server.start()
    run = start(llmill, server)
    trained(llmill, run, 20)
    with server.hanging():
        begun = time.time()
        ended_well(run)
        over = time.time()
    sealed = [artifact.manifest for artifact in Store(llmill.home).artifacts()]
    at_work = sum(one["seconds"] for one in sealed if one["stage"] in ("pretrain", "evaluate", "export"))
    assert over - begun < at_work + 30
    llmill("sync", MLFLOW_TRACKING_URI=server.url)
    assert_whole(llmill, server, undisturbed)


def test_figures_that_are_meant_for_another_mlflow_are_not_sent_to_this_one(make_llmill, tmp_path) -> None:
    llmill = make_llmill()
    llmill.run("--only", "download", MLFLOW_TRACKING_URI="http://user:hunter2@127.0.0.1:9")
    assert left(llmill)
    kept = [path for path in llmill.home.rglob("*") if path.is_file()]
    assert not [path for path in kept if b"hunter2" in path.read_bytes()]
    said = llmill("sync").stdout
    assert "MLFLOW_TRACKING_URI=http://127.0.0.1:9 llmill sync" in said
    assert left(llmill)
    assert "sent what 1 run(s) had left" in llmill("sync", "--here").stdout
    client = MlflowClient(f"sqlite:///{llmill.home}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert {run.info.run_name.split()[0] for run in runs} == {"small", "download"}
