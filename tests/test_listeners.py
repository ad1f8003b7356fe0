"""Whatever kills the sinks of a run's listeners at whatever event, MLflow has in the end what it has of an undisturbed
run, and whoever can't listen any more is one warning and nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from command_line import Llmill
from forks import ROOT
from mlflow_server import Server

from flows.engine.events import Event, RunStarted, read_event
from flows.engine.log import logs
from flows.listeners.mlflow.delivery import send_left
from flows.listeners.mlflow.links import tracking_uri
from flows.listeners.mlflow.operations import Mlflow

KINDS = ("run_started", "step_started", "training_started", "measured", "note", "step_sealed", "run_ended")
EACH = [kind if kind == "step_sealed" else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
"""The one with most to lose at once; `make test-long` dies at the others."""


@pytest.fixture(scope="module")
def said(make_llmill: Any) -> tuple[Llmill, list[Event]]:
    """A home in which a recipe ran, and all that the run said, as ``--json`` prints it."""
    llmill = make_llmill()
    lines = llmill("run", str(llmill.recipe), "--json").stdout.splitlines()
    assert json.loads(lines[0]) == {"event": "log", "schema": 1}
    events = [event for line in lines if (event := read_event(json.loads(line)))]
    assert {event.kind for event in events} >= {*KINDS, "progress", "activity"}
    return llmill, [event for event in events if event.kind != "linked"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


Replay = Callable[..., list[str]]


@pytest.fixture(scope="module")
def replay(
    said: tuple[Llmill, list[Event]], server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Replay:
    """Say all of the run again as another one, whose keys end with ``suffix``; at an event of ``kind``, ``kill`` is
    called, and those of ``gone`` have no reader any more. What was warned of is given."""
    llmill, events = said

    def again(suffix: str, kind: str, kill: Callable[[], None], *gone: str) -> list[str]:
        file = tmp_path_factory.mktemp("events") / "events.jsonl"
        renamed = [renamed_event(event, suffix, "notices" in gone) for event in events]
        file.write_text("".join(json.dumps(event.as_json(), allow_nan=False) + "\n" for event in renamed))
        away = {"PREFECT_API_URL": "http://127.0.0.1:9/api"} if "page" in gone else {}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.replayed_run", str(llmill.home), str(file), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "MLFLOW_TRACKING_URI": server.url, "GONE": "http://127.0.0.1:9/", **away},
        )
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "now\n"
        kill()
        process.communicate(f"{' '.join(gone)}\n")
        assert process.returncode == 0
        return json.loads(file.with_name(f"{file.name}.warned").read_text())

    return again


def renamed_event(event: Event, suffix: str, notify: bool) -> Event:
    keys = {name: f"{value}{suffix}" for name in ("key", "run") if (value := getattr(event, name, ""))}
    if notify and isinstance(event, RunStarted):
        keys["notify"] = ["env:GONE"]
    return replace(event, **keys)


def known(server: Server, suffix: str) -> dict[str, Any]:
    """All that MLflow has of the runs whose keys end so, by name; but for what names the run itself."""
    found: dict[str, Any] = {}
    runs = [run for run in server.runs() if run.data.tags["llmill.key"].endswith(suffix)]
    last = max(run.info.end_time for run in runs)
    for run in runs:
        tags = run.data.tags
        own = ("llmill.key", "mlflow.parentRunId", "mlflow.note.content", "mlflow.runColor")
        points = [
            (point.key, point.step, point.value, point.timestamp)
            for name in run.data.metrics
            for point in server.client.get_metric_history(run.info.run_id, name)
            if point.timestamp <= last  # later ones are of the machine in the replay itself
        ]
        assert len(points) == len(set(points))
        kept = {name: tags[name] for name in tags if name not in own and not name.endswith(".run_id")}
        files = {file.path for file in server.client.list_artifacts(run.info.run_id)}
        name = run.info.run_name.split()[0]
        assert name not in found
        found[name] = (run.info.status, run.data.params, kept, sorted(points), files)
    return found


@pytest.fixture(scope="module")
def undisturbed(replay: Replay, server: Server, said: tuple[Llmill, list[Event]]) -> dict[str, Any]:
    assert replay("-whole", "run_started", lambda: None) == []
    assert logs(said[0].home) == [], "all of it was sent"
    found = known(server, "-whole")
    assert any(name.startswith("system/") for *_, points, _ in found.values() for name, *_ in points)
    return found


@pytest.mark.parametrize("kind", EACH)
def test_mlflow_that_dies_at_an_event_has_all_in_the_end(
    replay: Replay,
    said: tuple[Llmill, list[Event]],
    server: Server,
    undisturbed: dict[str, Any],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = said[0].home
    warned = replay(f"-{kind}", kind, server.kill)
    assert len(warned) == 1
    assert "does not answer; the run goes on" in warned[0]
    assert len(logs(home)) == 1, "it waits"
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    assert [why for _, why in send_left(home, Mlflow(home, tracking_uri(home)))] == []
    assert logs(home) == []
    assert known(server, f"-{kind}") == undisturbed


@pytest.mark.parametrize("kind", EACH)
def test_all_other_sinks_that_die_at_an_event_are_a_warning_each_and_nothing_else(
    replay: Replay, server: Server, undisturbed: dict[str, Any], kind: str
) -> None:
    warned = replay(f"-others-{kind}", kind, lambda: None, "terminal", "script", "notices", "page")
    assert known(server, f"-others-{kind}") == undisturbed
    assert sum("GONE could not be notified" in text for text in warned) == 1
    broken = [text.partition(" fails")[0] for text in warned if "gets no more events of this run" in text]
    assert broken.count("the script") == 1
    assert broken.count("the terminal") == 1
