"""``llmill runs`` and what ``llmill status`` shows of runs: from logs as runs write them, and MLflow as it has them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from data_pipeline.core.errors import UserError
from flows.cli.main import make_app
from flows.compare.log import Finding
from flows.engine.events import (
    Event,
    RunEnded,
    RunStarted,
    StepDispatched,
    StepFailed,
    StepReused,
    StepStarted,
    TrainingStarted,
)
from flows.engine.log import LogFile
from flows.engine.logged_runs import logged_runs, runs_at_work
from flows.engine.store import Store
from flows.engine.training import EDGE_BYTES, EVENTS, last_progress
from flows.listeners.mlflow.delivery import deliver, send_left
from flows.listeners.mlflow.links import tracking_uri
from flows.listeners.mlflow.operations import Mlflow

MINUTE = 60_000
BEGAN = 1_700_000_000_000


def llmill(home: Path, *words: str, columns: int = 160, **changes: str) -> Result:
    environment = {"LLMILL_HOME": str(home), "COLUMNS": str(columns), "PREFECT_API_URL": "", **changes}
    return CliRunner().invoke(make_app(), words, env=environment)


def printed(home: Path, *words: str, columns: int = 160, **changes: str) -> list[str]:
    done = llmill(home, *words, columns=columns, **changes)
    assert done.exit_code == 0, done
    return done.stdout.splitlines()


def run_of(
    number: int, recipe: str = "small", status: str = "FINISHED", *, scores: dict[str, float], **params: Any
) -> list[Event]:
    """The events of a run; the higher its number, the later it began."""
    key, began = f"{number:032x}", BEGAN + number * 10 * MINUTE
    name = f"{recipe} run {number}"
    events: list[Event] = [
        RunStarted(key=key, name=name, recipe=recipe, params={"pretrain": params}, time=began)
    ]
    events += [
        StepReused(
            step=step, stage="evaluate", fingerprint=f"{number}{step}", run=key, how="reused",
            seconds=0.0, path="", metrics={"bits_per_byte": score}, finished=began, time=began,
        )
        for step, score in scores.items()
    ]  # fmt: skip
    if status != "RUNNING":
        events.append(RunEnded(key=key, name=name, status=status, seconds=60.0, time=began + MINUTE))
    return events


def log_of(home: Path, recipe: str, events: list[Event]) -> LogFile:
    log = LogFile.begin(home, recipe, "home", lasts=True)
    log.append(*events)
    return log


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose MLflow has runs of two recipes, and a sweep."""
    home = tmp_path_factory.mktemp("home")
    sweep = Finding(home, "small", "sweep", "a sweep", key="5" * 32)
    sweep.hold()
    assert not sweep.report({}, status="FINISHED")
    member, *later = run_of(2, scores={"evaluate": 1.25}, lr=0.003, seed=0, depth=4)
    runs = [
        ("small", run_of(1, scores={"evaluate": 1.5}, lr=0.001, seed=0, depth=4)),
        ("small", [dataclasses.replace(member, sweep="5" * 32), *later]),  # type: ignore[call-arg]
        ("other", run_of(3, "other", scores={"evaluate": 2.0, "evaluate_base": 2.5}, lr=7)),
        ("small", run_of(4, status="FAILED", scores={}, lr=0.003, seed=1, depth=4)),
    ]
    for recipe, events in runs:
        log_of(home, recipe, events).release()
    assert not list(send_left(home, Mlflow(home, tracking_uri(home))))
    return home


def test_runs_are_listed_with_what_was_set_the_newest_first(home: Path) -> None:
    head, *lines = printed(home, "runs", "small")
    assert head.split() == ["run", "set", "bits", "per", "byte", "state", "began", "took", "MLflow"]
    assert [line[: len("small run 1")] for line in lines] == ["small run 4", "small run 2", "small run 1"]
    assert [" ".join(line.split()[3:5]) for line in lines] == [
        "lr=0.003 seed=1",
        "lr=0.003 seed=0",
        "lr=0.001 seed=0",
    ]
    assert [line.split()[5] for line in lines] == ["failed", "1.2500", "1.5000"]
    assert [line.split()[-2] for line in lines] == ["1:00"] * 3


def test_without_a_recipe_all_runs_are_listed_and_several_models_by_their_steps(home: Path) -> None:
    found = json.loads(llmill(home, "runs", "--json").stdout)
    assert [run["name"] for run in found["runs"]] == [
        "small run 4", "other run 3", "small run 2", "small run 1",
    ]  # fmt: skip
    assert found["older"] == 0
    other = found["runs"][1]
    assert other["settings"] == {}, "there is no other run of that recipe from which it could differ"
    assert other["bits_per_byte"] == {"evaluate": 2.0, "evaluate_base": 2.5}
    said = "\n".join(printed(home, "runs", "other"))
    assert "evaluate: 2.0000" in said
    assert "evaluate_base: 2.5000" in said


def test_what_is_left_out_is_said_with_the_command_that_shows_it(home: Path) -> None:
    lines = printed(home, "runs", "small", "-n", "2")
    assert lines[-1] == f"1 older not shown: llmill runs small --home {home} -n 3"
    assert "small run 1" not in "\n".join(lines)
    assert json.loads(llmill(home, "runs", "small", "-n", "2", "--json").stdout)["older"] == 1


def test_a_recipe_may_be_named_by_its_file(home: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "any.yaml"
    books = (Path(__file__).parents[2] / "flows/recipes/books.yaml").read_text()
    recipe.write_text(books.replace("name: books\n", "name: other\n"))
    assert [
        run["name"] for run in json.loads(llmill(home, "runs", str(recipe), "--json").stdout)["runs"]
    ] == ["other run 3"]
    recipe.write_text(books.replace("name: books\n", "name: third\n"))
    assert printed(home, "runs", str(recipe), columns=500) == [
        f"no runs of third in {home} yet; start with: llmill run {recipe} --home {home}"
    ]


def test_an_unknown_recipe_is_refused_with_those_that_there_are(home: Path) -> None:
    done = llmill(home, "runs", "smal")
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == "no run is of a recipe called smal; there are runs of other, small"


def test_a_home_without_runs_says_what_to_type_and_stays_as_it_was(tmp_path: Path) -> None:
    [line] = printed(tmp_path, "runs", columns=500)
    assert line.endswith(f"start with: llmill run flows/recipes/quickstart.yaml --home {tmp_path}")
    assert json.loads(llmill(tmp_path, "runs", "--json").stdout) == {"runs": [], "older": 0}
    assert list(tmp_path.iterdir()) == []


def test_mlflow_that_is_away_is_an_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    done = llmill(home, "runs")
    assert isinstance(done.exception, UserError)
    assert "MLflow at http://127.0.0.1:9 does not answer" in str(done.exception)


def test_names_of_settings_are_as_long_as_they_must_be_and_the_nearest_to_the_model_come_first(
    tmp_path: Path,
) -> None:
    for number in (1, 2):
        begun, ended = run_of(
            number, scores={}, lr=number, optimizer={"lr": number, "kind": "x" * 30 * number}
        )
        assert isinstance(begun, RunStarted)
        begun.params["download"] = {"shard_bytes": number, "max_bytes": number, "page_seconds": number}
        log_of(tmp_path, "small", [begun, ended]).release()
    assert not list(send_left(tmp_path, Mlflow(tmp_path, tracking_uri(tmp_path))))
    line = printed(tmp_path, "runs", columns=250)[1]
    shown = f"pretrain.lr=2 kind={'x' * 19}… optimizer.lr=2 max_bytes=2 and 2 more"
    assert shown in " ".join(line.split())


def test_a_run_that_was_killed_is_not_shown_as_running_before_mlflow_is_told(tmp_path: Path) -> None:
    log = log_of(tmp_path, "small", run_of(1, status="RUNNING", scores={}, lr=1))
    mlflow = Mlflow(tmp_path, tracking_uri(tmp_path))
    assert len(list(deliver(log, mlflow)))
    [run] = json.loads(llmill(tmp_path, "runs", "--json").stdout)["runs"]
    assert run["state"] == "running"
    log.release()  # as the system does when the process is killed
    [run] = json.loads(llmill(tmp_path, "runs", "--json").stdout)["runs"]
    assert (run["state"], run["ended"]) == ("killed", None)
    assert not list(send_left(tmp_path, mlflow))
    [run] = json.loads(llmill(tmp_path, "runs", "--json").stdout)["runs"]
    assert run["state"] == "killed"
    assert run["ended"]


def test_pages_in_prefect_are_a_last_column_where_there_is_room_and_a_server(tmp_path: Path) -> None:
    url = "http://127.0.0.1:4200/runs/flow-run/1"
    begun, ended = run_of(1, scores={})
    begun = dataclasses.replace(begun, flow_run={"id": "1", "url": url})  # type: ignore[call-arg]
    log_of(tmp_path, "small", [begun, ended]).release()
    assert not list(send_left(tmp_path, Mlflow(tmp_path, tracking_uri(tmp_path))))
    there = {"PREFECT_API_URL": "http://127.0.0.1:4200/api"}
    assert printed(tmp_path, "runs", **there)[1].endswith(url)
    narrow = printed(tmp_path, "runs", columns=80)
    assert "small run 1" in narrow[1]
    assert printed(tmp_path, "runs", columns=80, **there) == narrow
    assert url not in "".join(printed(tmp_path, "runs")), "that server came with the run, and went with it"


AT_WORK = """
import json, sys
from pathlib import Path
from flows.engine.events import read_event
from flows.engine.log import LogFile
log = LogFile.begin(Path(sys.argv[1]), "small", "home", lasts=True)
log.append(*map(read_event, json.loads(sys.argv[2])))
print("begun", flush=True)
sys.stdin.read()
"""


@contextmanager
def at_work(home: Path, *events: Event) -> Iterator[subprocess.Popen[str]]:
    """A process that has said so much of a run, and lives."""
    command = [sys.executable, "-c", AT_WORK, str(home), json.dumps([one.as_json() for one in events])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        yield process
        process.kill()


def training(home: Path) -> list[Event]:
    """The events of a run whose training is at work."""
    events = Store(home).partial("pretrain", "f") / EVENTS
    events.parent.mkdir(parents=True)
    start = {"event": "start", "steps": 5000, "parameters": 9, "ranks": 1}
    step = {"event": "step", "loss": 2.5, "tokens_per_second": 1000.0, "eta_seconds": 61}
    lines = [start, *({**step, "step": number} for number in range(1, 2001))]
    events.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    assert events.stat().st_size > 2 * EDGE_BYTES, "it is not read whole"
    begun, reused = run_of(1, status="RUNNING", scores={"evaluate": 1.0}, lr=1)
    about = {"step": "pretrain", "stage": "pretrain", "fingerprint": "f", "key": "s"}
    return [begun, reused, StepStarted(**about, run=begun.key), TrainingStarted(**about)]  # type: ignore[arg-type,attr-defined]


def test_status_shows_what_is_at_work_and_not_what_was_killed(tmp_path: Path) -> None:
    with at_work(tmp_path, *training(tmp_path)) as process:
        line, *rest = printed(tmp_path, "status")
        said = "pretrain  step 2,000 of 5,000 · loss 2.5000 · 1,000 tokens/s · 1:01 left  since "
        assert line.startswith(f"… small run 1  {said}")
        assert rest[0].split()[:4] == ["pretrain", "0", "sealed", "0"]
        assert rest[0].split()[-4:-2] == ["1", "unfinished"]
        [run] = json.loads(llmill(tmp_path, "status", "--json").stdout)["at_work"]
        assert (run["name"], run["recipe"]) == ("small run 1", "small")
        assert [step["step"] for step in run["steps"]] == ["pretrain"]
        process.kill()
        process.wait()
        assert not printed(tmp_path, "status")[0].startswith("…")
    assert json.loads(llmill(tmp_path, "status", "--json").stdout)["at_work"] == []
    [killed] = logged_runs(tmp_path).values()
    assert (killed.state, killed.steps) == ("KILLED", {})


def test_a_step_of_another_process_is_shown_with_its_run_and_one_that_ended_is_not(tmp_path: Path) -> None:
    begun, _ = run_of(1, status="RUNNING", scores={"evaluate": 1.0})
    dispatched = [StepDispatched(step=step, deployment="") for step in ("clean", "pretrain")]
    joined = dataclasses.replace(begun, joined=True)  # type: ignore[call-arg]
    started = StepStarted(step="pretrain", stage="pretrain", fingerprint="f", key="s", run="k", time=7)
    failed = StepFailed(step="clean", message="no", status="FAILED")
    with at_work(tmp_path, begun, *dispatched, failed), at_work(tmp_path, joined, started):
        [run] = runs_at_work(tmp_path)
        assert {name: step.since for name, step in run.steps.items()} == {"pretrain": 7}
    assert runs_at_work(tmp_path) == []


def test_artifacts_are_listed_when_asked_for_and_counted_by_stage_otherwise(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("aaaa", "bbbb"):
        folder, _ = store.begin("clean", name, {})
        (folder / "file").write_bytes(b"x" * 1000)
        store.seal(
            "clean",
            name,
            {"config": {}, "inputs": {}, "metrics": {}, "recipe": "r", "finished": "2026-01-01"},
        )
    store.begin("dedup", "cccc", {})
    counted, listed = printed(tmp_path, "status"), printed(tmp_path, "status", "--artifacts")
    assert [line.split()[:3] for line in counted[:2]] == [["clean", "2", "sealed"], ["dedup", "0", "sealed"]]
    assert "aaaa" not in "".join(counted)
    assert [line.split()[:2] for line in listed[:3]] == [
        ["clean", "aaaa"],
        ["clean", "bbbb"],
        ["dedup", "cccc"],
    ]
    assert json.loads(llmill(tmp_path, "status", "--json").stdout)["sealed"][0]["fingerprint"] == "aaaa"


def test_a_training_that_has_not_begun_again_has_no_progress(tmp_path: Path) -> None:
    training(tmp_path)
    events = Store(tmp_path).partial("pretrain", "f") / EVENTS
    assert last_progress(events, events.stat().st_size) == ""
    assert last_progress(tmp_path / "none", 0) == ""
