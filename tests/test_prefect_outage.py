"""Prefect's server goes away, and the run goes on: nothing is lost, and what became of the run is told later."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from command_line import Llmill
from operator_api import Prefect, until
from ranks import held

from flows.engine.ports import answers, free_port
from flows.stages import DEFAULT

EVENTS = "store/pretrain/*.partial/logs/events.jsonl"


class Server:
    """A Prefect server that can be killed and started again on the same database.

    Runs are told of it afresh: one that is forked has read long before which server there is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.start()

    def start(self) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        quiet = {"PREFECT_HOME": str(self.folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)],
            env={**kept, **quiet},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(lambda: answers(self.url), bool, 120)

    def kill(self) -> None:
        if self.process.poll() is not None:
            return
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.kill()
        self.process.wait()
        assert not answers(self.url)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("prefect"))
    yield server
    server.kill()


def training(llmill: Llmill, run) -> None:
    """Wait until the run has made some steps."""
    while not any(path.read_text().count('"step"') > 10 for path in llmill.home.glob(EVENTS)):
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)


def states(server: Server, name: str) -> dict[str, str]:
    """Name of each flow run of a kind -> its state."""
    return {
        run["name"]: run["state_type"]
        for run in Prefect(server.url).post("flow_runs/filter", flows={"name": {"any_": [name]}})
    }


@pytest.mark.long
def test_a_run_outlives_the_server_and_the_next_one_tells_it_the_end(make_llmill, finished: Llmill, server):
    llmill = make_llmill()
    run = llmill.start_afresh("run", str(llmill.recipe), PREFECT_API_URL=server.url)
    training(llmill, run)
    server.kill()
    out, err = run.communicate(timeout=900)
    assert run.returncode == 0, out + err
    assert "does not answer" in out
    assert "Traceback" not in out + err
    assert llmill.payloads() == finished.payloads()
    server.start()
    assert list(states(server, "pipeline").values()) == ["RUNNING"]
    assert list(states(server, "pretrain").values()) == ["RUNNING"]
    llmill.afresh("run", str(llmill.recipe), PREFECT_API_URL=server.url)
    assert set(states(server, "pipeline").values()) == {"COMPLETED"}
    assert len(states(server, "pipeline")) == 2
    assert list(states(server, "pretrain").values()) == ["COMPLETED"]


@pytest.mark.long
def test_a_server_that_is_away_for_seconds_misses_nothing(make_llmill, finished: Llmill, server):
    llmill = make_llmill()
    run = llmill.start_afresh("run", str(llmill.recipe), PREFECT_API_URL=server.url)
    training(llmill, run)
    with held(psutil.Process(run.pid).children(recursive=True)):
        server.kill()
        server.start()
    out, err = run.communicate(timeout=900)
    assert run.returncode == 0, out + err
    assert llmill.payloads() == finished.payloads()
    newest = Prefect(server.url).post("flow_runs/filter", sort="START_TIME_DESC", limit=len(DEFAULT))
    assert {entry["state_type"] for entry in newest} == {"COMPLETED"}


def test_a_server_that_is_absent_at_the_start_is_told_of_and_another_one_serves(finished: Llmill):
    dead = f"http://127.0.0.1:{free_port()}/api"
    said = finished.afresh("run", str(finished.recipe), PREFECT_API_URL=dead)
    assert f"Prefect at {dead} does not answer" in said.stdout
    assert "every step was reused" in said.stdout
    assert "Traceback" not in said.stdout + said.stderr
