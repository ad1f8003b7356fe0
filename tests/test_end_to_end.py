"""The whole line through the real command line, a real Prefect server and MLflow: what users rely on."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from command_line import Llmill, kill_tree
from mlflow import MlflowClient

from flows.engine.store import Store

STAGES = ["download", "clean", "dedup", "train_tokenizer", "tokenize", "pretrain", "evaluate", "export"]


def test_a_run_seals_every_stage_and_says_so(finished: Llmill):
    assert sorted(name.split("/")[0] for name in finished.payloads()) == sorted(STAGES)
    assert list(finished.home.glob("store/*/*.partial")) == []
    assert finished.afresh("verify").stdout.count("✓") == len(STAGES)
    assert f"{len(STAGES)} sealed" in finished.afresh("status").stdout


def test_a_second_run_reuses_everything(finished: Llmill):
    before = finished.payloads()
    result = finished.afresh("run", str(finished.recipe))
    assert "every step was reused" in result.stdout
    assert result.stderr == ""
    assert finished.payloads() == before


@pytest.mark.long
def test_runs_from_scratch_seal_the_same_bytes_whatever_the_workers(finished: Llmill, make_llmill):
    other = make_llmill()
    other.run("--set", "runtime.task_runner=threads", "--set", "runtime.workers=1")
    assert other.payloads() == finished.payloads()


def test_what_is_under_runtime_changes_nothing(finished: Llmill):
    settings = ["runtime.workers=7", "pretrain.runtime.micro_batch=2", "pretrain.runtime.zero_stage=1",
                "pretrain.runtime.log_every=3", "runtime.upload_mb=0"]  # fmt: skip
    assert finished.actions(*settings) == ["reuse"] * 8


def test_the_command_line_tells_the_plan(finished: Llmill):
    setting = "evaluate.seed=1"
    said = finished.afresh("plan", str(finished.recipe), "--set", setting, "--json").stdout
    assert json.loads(said) == list(finished.plan(setting).values())


@pytest.mark.parametrize(
    ("setting", "first"),
    [
        ("clean.min_chars=20", "clean"),
        ("dedup.threshold=0.9", "dedup"),
        ("train_tokenizer.vocab_size=500", "train_tokenizer"),
        ("tokenize.val_fraction=0.2", "tokenize"),
        ("pretrain.lr=1e-3", "pretrain"),
        ("evaluate.seed=1", "evaluate"),
    ],
)
def test_a_changed_field_runs_its_stage_and_those_after_it(finished: Llmill, setting, first):
    plan = finished.plan(setting)
    place = STAGES.index(first)
    assert [step["action"] for step in plan.values()] == ["reuse"] * place + ["run"] * (8 - place)
    key, _, value = setting.partition("=")
    assert any(
        key.partition(".")[2] in line and line.endswith(f"-> {float(value):g}") for line in plan[first]["why"]
    )
    later = [step["why"] for name, step in plan.items() if STAGES.index(name) > place]
    assert all("input" in line for lines in later for line in lines)


def test_a_changed_file_is_a_new_corpus_and_a_moved_one_is_not(
    finished: Llmill, make_llmill, corpus, tmp_path
):
    moved = tmp_path / "elsewhere"
    shutil.copytree(corpus, moved)
    path = f"download.sources.0.path={moved}"
    assert finished.actions(path) == ["reuse"] * 8
    with open(moved / "argparse.txt", "a") as file:
        file.write("# changed")
    assert finished.actions(path) == ["run"] * 8


def test_kill_9_at_a_random_moment_of_each_stage_changes_no_sealed_byte(finished: Llmill, make_llmill):
    """Every stage is killed at work, pretrain twice, each time at a random moment of its work."""
    llmill = make_llmill()
    dice = random.Random(20261122)
    seconds = {stage: finished.manifest(stage)["seconds"] for stage in STAGES}
    for stage in [*STAGES[:6], "pretrain", *STAGES[6:]]:
        for attempt in range(1, 11):
            if killed_at_work(llmill, stage, dice.uniform(0, 0.5 * seconds[stage] / attempt)):
                break
            for sealed in llmill.home.glob(
                f"store/{stage}/[0-9a-f]*"
            ):  # too late, or it had little left to do
                shutil.rmtree(sealed)
        else:
            pytest.fail(f"{stage} was never killed at work")
    llmill.run()
    assert llmill.payloads() == finished.payloads()
    assert llmill("verify").returncode == 0
    attempts = {one.stage: one.manifest["attempts"] for one in Store(llmill.home).artifacts()}
    most = {
        stage: 3 if stage == "pretrain" else 2 for stage in STAGES
    }  # fewer where a kill met the first moment
    assert sum(attempts.values()) > 8
    assert all(1 <= attempts[stage] <= most[stage] for stage in STAGES)


def killed_at_work(llmill: Llmill, stage: str, delay: float) -> bool:
    """Start a run, ``kill -9`` all of it ``delay`` seconds into ``stage``; whether that left it unfinished."""
    before = set(llmill.home.glob(f"store/{stage}/*.partial"))
    run = llmill.start("run", str(llmill.recipe))
    while run.poll() is None and not resumed_or_begun(llmill, stage, before):
        time.sleep(0.005)
    time.sleep(delay)
    if run.poll() is not None:
        assert run.returncode == 0, run.communicate()
        return False
    kill_tree(run)
    return any(llmill.home.glob(f"store/{stage}/*.partial"))


def resumed_or_begun(llmill: Llmill, stage: str, before: set[Path]) -> bool:
    """Whether ``stage`` is at work: its folder is new, or a run has just begun it again."""
    found = set(llmill.home.glob(f"store/{stage}/*.partial"))
    if found - before or not found:
        return bool(found)
    return any(time.time() - path.stat().st_mtime < 0.5 for path in next(iter(found)).glob(".origin.json"))


@pytest.mark.long
def test_two_runs_at_once_build_nothing_twice(finished: Llmill, make_llmill):
    llmill = make_llmill()
    runs = [llmill.start("run", str(llmill.recipe)) for _ in range(2)]
    outputs = [run.communicate(timeout=900) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert llmill.payloads() == finished.payloads()
    reports = [out for out, _ in outputs]
    built = [
        sum(line.strip().startswith(f"✓ {stage} ") for out in reports for line in out.splitlines())
        for stage in STAGES
    ]
    assert built == [1] * len(STAGES), outputs


def test_only_from_and_force_do_what_they_say(finished: Llmill, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(finished.home, home)
    llmill = Llmill(home, finished.recipe)
    setting = "train_tokenizer.vocab_size=500"
    change = ("--set", setting)
    refused = llmill.run("--only", "tokenize", *change, code=2)
    assert "--only tokenize needs train_tokenizer, which is not sealed" in refused.stderr
    llmill.run("--only", "train_tokenizer", *change)
    assert llmill.actions(setting) == ["reuse"] * 4 + ["run"] * 4
    refused = llmill.run("--from", "pretrain", *change, code=2)
    assert "--from pretrain needs tokenize, which is not sealed" in refused.stderr
    before = llmill.payloads()
    forced = llmill.run("--only", "clean", "--force", "clean")
    assert "✓ clean" in forced.stdout
    assert llmill.payloads() == before
    assert "no such step" in llmill.run("--only", "cleam", code=2).stderr


def test_an_artifact_built_again_with_other_bytes_rebuilds_what_was_made_from_it(finished: Llmill, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(finished.home, home)
    llmill = Llmill(home, finished.recipe)
    path = llmill.made("tokenize") / "manifest.json"
    manifest = json.loads(path.read_text())
    path.chmod(0o644)
    path.write_text(json.dumps({**manifest, "payload_sha256": "0" * 64}))
    plan = llmill.plan()
    assert plan["pretrain"]["action"] == "run"
    assert "tokenize was built again" in plan["pretrain"]["why"][0]


def test_the_exported_model_speaks(finished: Llmill):
    command = ["generate", "--prompt", "def main(", "--max-tokens", "30", "--seed", "5"]
    said = [start(*command).stdout for start in (finished, finished.afresh)]
    assert said[0] == said[1]
    assert said[0].startswith("def main(")
    assert len(said[0]) > len("def main(") + 10


def test_a_run_that_is_told_to_stop_stops_whole_and_says_how_to_go_on(make_llmill):
    llmill = make_llmill()
    run = llmill.start("run", str(llmill.recipe))
    while not list(llmill.home.glob("store/pretrain/*.partial/logs/events.jsonl")):
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    family = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=900)
    assert run.returncode == 130, (out, err)
    assert "the same command resumes it" in err
    assert "Traceback" not in out + err
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert [path.parent.name for path in llmill.home.glob("store/*/*.partial")] == ["pretrain"]
    client = MlflowClient(f"sqlite:///{llmill.home}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    unfinished = {
        run.info.run_name.split()[0]: run.info.status for run in runs if run.info.status != "FINISHED"
    }
    assert unfinished == {"small": "KILLED", "pretrain": "KILLED"}


def test_mlflow_being_away_stops_no_run_and_its_figures_follow(make_llmill):
    llmill = make_llmill()
    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    result = llmill.run("--only", "download", **away)
    assert "does not answer; the run goes on" in result.stdout
    assert "not all metrics reached MLflow" in result.stdout
    assert "llmill sync" in result.stdout
    assert [name.split("/")[0] for name in llmill.payloads()] == ["download"]


def test_what_was_sealed_by_a_run_killed_before_it_told_mlflow_is_told_by_the_next(
    finished: Llmill, tmp_path
):
    home = tmp_path / "home"
    shutil.copytree(finished.home, home)
    llmill = Llmill(home, finished.recipe)
    manifest = llmill.manifest("pretrain")
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    untold = client.create_run(
        client.get_experiment_by_name("small").experiment_id, run_name="pretrain", tags={"llmill.key": "f00d"}
    ).info.run_id
    state = home / "runs" / f"pretrain-{manifest['fingerprint']}.json"
    state.write_text(json.dumps({"key": "f00d", "offset": 0}))
    llmill.run()
    told = client.get_run(untold)
    assert told.info.status == "FINISHED"
    assert manifest["metrics"].items() <= told.data.metrics.items()
    assert len(client.get_metric_history(untold, "train/loss")) == manifest["metrics"]["steps"]
    assert not state.exists()


@pytest.mark.long
def test_forcing_a_stage_to_other_bytes_rebuilds_the_rest_in_the_same_run(finished: Llmill, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(finished.home, home)
    llmill = Llmill(home, finished.recipe)
    path = llmill.made("train_tokenizer") / "manifest.json"
    path.chmod(0o644)
    path.write_text(json.dumps({**json.loads(path.read_text()), "payload_sha256": "0" * 64}))
    for later in home.glob("store/*/*/manifest.json"):  # as if all had been made from those other bytes
        manifest = json.loads(later.read_text())
        if "tokenizer" in manifest["inputs"]:
            manifest["inputs"]["tokenizer"]["payload_sha256"] = "0" * 64
            later.chmod(0o644)
            later.write_text(json.dumps(manifest))
    assert llmill.actions() == ["reuse"] * 8
    out = llmill.run("--force", "train_tokenizer").stdout
    for stage in STAGES[3:]:
        assert f"✓ {stage} " in out
    assert llmill.payloads() == finished.payloads()


@pytest.mark.long
def test_without_a_server_a_run_that_builds_something_starts_its_own_and_leaves_none(
    finished: Llmill, tmp_path: Path
):
    home = tmp_path / "home"
    shutil.copytree(finished.home, home, ignore=shutil.ignore_patterns("prefect"))
    environment = {k: v for k, v in finished.environment().items() if not k.startswith("PREFECT_")}
    command = [sys.executable, "-m", "flows.cli.main", "run", str(finished.recipe), "--home", str(home)]
    for more, said, started in (
        ([], "every step was reused", False),
        (["--set", "evaluate.max_new_tokens=8"], "✓ evaluate", True),
    ):
        result = subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, timeout=900
        )
        assert (result.returncode, result.stderr) == (0, ""), result
        assert said in result.stdout
        assert (home / "prefect" / "server.log").exists() is started
        assert not (home / "prefect" / "server.json").exists()
