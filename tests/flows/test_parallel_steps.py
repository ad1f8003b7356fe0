"""Steps side by side: in processes of their own, stopped and killed with the run, and to the same bytes."""

from __future__ import annotations

import io
import json
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from command_line import Llmill
from forks import ROOT
from mlflow import MlflowClient
from test_two_models import TWO

from flows.engine.events import Activity, Event, Note, Progress, StepFailed
from flows.listeners.mlflow.points import is_drawn
from flows.prefect.alongside import relay, written
from flows.recipe import build_recipe, load_recipe

SIDE_BY_SIDE = ("--set", "runtime.parallel_steps=2")
TRAININGS = ("pretrain", "pretrain_small")
STEPS = 150
"""More than a training takes while the other one begins."""
LONGER = TWO.replace("tokens: 20_480", f"tokens: {STEPS * 1024}")


def logged(llmill: Llmill) -> dict[Path, int]:
    """Folder of a training that is not sealed -> steps that it has logged."""
    files = llmill.home.glob("store/pretrain/*.partial/logs/events.jsonl")
    return {file.parents[1]: file.read_text().count('"event": "step"') for file in files}


def ranks(folder: Path) -> list[psutil.Process]:
    """The processes that train into a folder."""
    found = psutil.process_iter(["cmdline"])
    return [one for one in found if any(str(folder) in word for word in one.info["cmdline"] or ())]


def both_at_work(llmill: Llmill) -> Any:
    """A run whose two trainings are at work: the first that takes a step is held until the other has."""
    before, held = logged(llmill), dict[Path, list[psutil.Process]]()
    run = llmill.start("run", str(llmill.recipe), *SIDE_BY_SIDE)
    while len(held) < 2:
        assert run.poll() is None, "it ended before"
        for folder, steps in logged(llmill).items():
            if folder not in held and steps > before.get(folder, 0):
                held[folder] = ranks(folder)
                for process in held[folder]:
                    process.suspend()
        time.sleep(0.01)
    for process in [process for processes in held.values() for process in processes]:
        process.resume()
    return run


@pytest.fixture(scope="module")
def one_by_one(make_llmill: Any) -> Llmill:
    llmill = make_llmill(recipe=LONGER)
    llmill("run", str(llmill.recipe))
    return llmill


@dataclass(frozen=True)
class Ran:
    """A home, and what the last run in it reported."""

    llmill: Llmill
    events: list[dict[str, Any]]


@pytest.fixture(scope="module")
def stopped(make_llmill: Any) -> Ran:
    """A home in which both trainings were stopped at work, then killed at work, and then done."""
    llmill = make_llmill(recipe=LONGER)
    run = both_at_work(llmill)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=900)
    assert run.returncode == 130, out + err
    for training in TRAININGS:
        assert f"{training}: stopped by SIGTERM" in out + err
    run = both_at_work(llmill)
    family = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGKILL)  # the process alone: what it began must end by itself
    run.communicate()
    psutil.wait_procs(family, timeout=120)
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    said = llmill("run", str(llmill.recipe), *SIDE_BY_SIDE, "--json").stdout
    return Ran(llmill, [json.loads(line) for line in said.splitlines()])


@pytest.mark.long
def test_the_bytes_are_those_of_one_after_the_other(stopped: Ran, one_by_one: Llmill) -> None:
    assert stopped.llmill.payloads() == one_by_one.payloads()


def test_two_trainings_were_at_work_at_once_and_those_that_wait_for_one_began_behind_it(
    stopped: Ran,
) -> None:
    logged = [(one["event"], one.get("step")) for one in stopped.events]
    begun = [logged.index(("step_dispatched", step)) for step in TRAININGS]
    done = [logged.index(("step_reused", step)) for step in TRAININGS]
    assert max(begun) < min(done)
    for suffix in ("", "_small"):
        trained = logged.index(("step_reused", f"pretrain{suffix}"))
        evaluated = next(
            at for at, one in enumerate(logged) if one[1] == f"evaluate{suffix}" and "reused" not in one[0]
        )
        assert trained < evaluated


def test_a_process_passes_on_what_is_of_its_step_and_why_it_failed() -> None:
    """Notes of no step, such as what earlier steps discarded, are made by the run itself: once."""
    said = [
        Note(text="download: 9 of 10 rejected", warning=True),
        Note(text="of another", step="evaluate"),
        Note(text="resumed at step 5", step="pretrain"),
        Progress(step="pretrain", done=6, total=20, unit="steps"),
        Activity(step="pretrain", text="starting 1 rank(s)"),
        StepFailed(step="pretrain", message="it ends", status="FAILED"),
    ]
    lines = [json.dumps(event.as_json(), allow_nan=False).encode() for event in said]
    heard: list[Event] = []
    last = ["nothing"]
    relay("pretrain", io.BytesIO(b"\n".join([*lines, b'{"failed": "it ends"}'])), heard.append, last)
    assert heard == said[2:5]
    assert last[-1] == "it ends"


@pytest.mark.parametrize("name", ["quickstart", "books", "fineweb_edu"])
def test_a_process_is_given_the_recipe_as_it_was_read(name: str) -> None:
    recipe = load_recipe(ROOT / f"flows/recipes/{name}.yaml", ["pretrain.seed=3", *SIDE_BY_SIDE[1:]])
    again = build_recipe(written(recipe, 2))
    assert [(one.name, one.sources, one.config) for one in again.steps] == [
        (one.name, one.sources, one.config) for one in recipe.steps
    ]
    assert again.runtime.workers == max(1, recipe.runtime.worker_count // 2)


def test_mlflow_and_prefect_have_all_of_it_under_one_run(stopped: Ran, prefect_server: str) -> None:
    client = MlflowClient(f"sqlite:///{stopped.llmill.home}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    [parent] = [run for run in runs if "llmill.step" not in run.data.tags]
    children = {run.data.tags["llmill.step"]: run for run in runs if "llmill.step" in run.data.tags}
    assert parent.info.status == "FINISHED"
    for step in TRAININGS:
        child = children[step]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.status == "FINISHED"
        steps = [point.step for point in client.get_metric_history(child.info.run_id, "train/loss")]
        assert steps == [step for step in range(1, STEPS + 1) if is_drawn(step)]
        assert f"{step}/bits_per_byte" in parent.data.metrics or f"{step}/loss" in parent.data.metrics
    [flow_run] = {one["flow_run"]["id"] for one in stopped.events if one["event"] == "run_started"}
    named = {"flow_runs": {"parent_flow_run_id": {"any_": [flow_run]}}}
    subflows = httpx.post(f"{prefect_server}/flow_runs/filter", json=named).raise_for_status().json()
    states = {run["name"].split()[0]: run["state_type"] for run in subflows}
    assert {step: states.get(step) for step in TRAININGS} == dict.fromkeys(TRAININGS, "COMPLETED")


@pytest.mark.long
def test_when_one_fails_the_other_is_let_end_and_nothing_begins_behind_them(
    one_by_one: Llmill, tmp_path: Path
) -> None:
    llmill = replace(one_by_one, home=tmp_path / "home")
    for stage in ("download", "clean", "dedup", "train_tokenizer", "tokenize"):
        shutil.copytree(one_by_one.home / "store" / stage, llmill.home / "store" / stage)
    run = both_at_work(llmill)
    [folder] = llmill.home.glob(f"store/pretrain/{llmill.plan()['pretrain_small']['fingerprint']}.partial")
    for process in ranks(folder):
        process.kill()
    out, err = run.communicate(timeout=900)
    assert run.returncode == 1, out + err
    assert "pretrain_small" in err
    assert "resume with" in err
    steps = {step: one["action"] for step, one in llmill.plan().items()}
    assert steps["pretrain"] == "reuse"
    assert {steps[step] for step in ("evaluate", "evaluate_small", "evaluate_few")} == {"run"}
    assert "reused" in llmill("run", str(llmill.recipe), *SIDE_BY_SIDE).stdout
    assert llmill.payloads() == one_by_one.payloads()
