"""What stands in the way of `llmill up`, and what `llmill down` ends: checks that need no server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from operator_api import until

from data_pipeline.core.errors import UserError
from flows.engine.process import lives
from flows.engine.services import MLFLOW, PREFECT, Running, Services, place, prefect_api, read_services, write
from flows.prefect.up import Up, Wanted, described, prepare_postgres, stop


def sleeper() -> Running:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return Running(child.pid, psutil.Process(child.pid).create_time(), "http://127.0.0.1:1")


def start(home: Path, **changes) -> None:
    Up(home, Wanted(**changes), print).start()


def test_a_port_in_use_is_told_with_who_uses_it_and_nothing_is_started(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is in use by .*--mlflow-port"):
            start(tmp_path, mlflow_port=port, prefect_port=free())
    assert read_services(tmp_path) == Services()


def test_a_process_that_ended_but_was_not_asked_for_does_not_live():
    running = sleeper()
    assert running.alive
    assert not replace(running, created=running.created - 10).alive, "another has its number now"
    psutil.Process(running.pid).kill()
    while psutil.Process(running.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not running.alive


def free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(autouse=True)
def no_server_is_given(monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


def test_an_address_that_holds_a_password_is_refused_without_saying_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://operator:hunter2@127.0.0.1:4200/api")
    with pytest.raises(UserError, match="PREFECT_API_AUTH_STRING") as refused:
        prefect_api(tmp_path)
    assert "hunter2" not in str(refused.value)


def test_a_process_that_got_the_number_of_a_dead_server_is_not_taken_for_it_nor_ended(tmp_path):
    stranger = sleeper()
    stale = Running(stranger.pid, stranger.created - 1000, "http://127.0.0.1:1")
    write(tmp_path, Services(processes={PREFECT: stale}))
    assert read_services(tmp_path).alive(PREFECT) is None
    assert prefect_api(tmp_path) == ""
    assert stop(tmp_path) == []
    assert stranger.alive
    psutil.Process(stranger.pid).kill()


def test_down_ends_exactly_what_up_noted_workers_first(tmp_path):
    ours = {name: sleeper() for name in (PREFECT, "worker llmill")}
    other = sleeper()
    write(tmp_path, Services(processes=ours))
    assert stop(tmp_path) == ["worker llmill", PREFECT]
    assert not any(running.alive for running in ours.values())
    assert other.alive
    assert not place(tmp_path).exists()
    psutil.Process(other.pid).kill()


def test_a_home_in_postgresql_never_begins_a_second_history_in_sqlite(tmp_path):
    dead = Running(2**22 + 1, 0.0, "http://127.0.0.1:1")
    write(tmp_path, Services("PostgreSQL at db:5432", {PREFECT: dead}))
    with pytest.raises(UserError, match="PostgreSQL at db:5432: give --postgres"):
        start(tmp_path)
    assert stop(tmp_path) == []
    assert read_services(tmp_path).database == "PostgreSQL at db:5432"
    assert prefect_api(tmp_path) == "http://127.0.0.1:1/api"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", json.dumps({"database": "SQLite", "processes": {"a": {"x": 1}}})]
)
def test_a_damaged_note_is_an_error_that_names_it(tmp_path, text):
    place(tmp_path).parent.mkdir()
    place(tmp_path).write_text(text)
    with pytest.raises(UserError, match=r"servers\.json is damaged"):
        read_services(tmp_path)


def test_what_is_noted_is_read_back(tmp_path):
    services = Services("SQLite", {PREFECT: Running(pid=1, created=time.time(), url="http://x", log="log")})
    write(tmp_path, services)
    assert asdict(read_services(tmp_path)) == asdict(services)


def test_an_address_of_no_postgresql_is_refused_without_the_password():
    with pytest.raises(UserError, match="postgresql://USER"):
        prepare_postgres("mysql://user:hunter2@host")
    with pytest.raises(UserError) as refused:
        prepare_postgres(f"postgresql://user:hunter2secret@127.0.0.1:{free()}")
    assert "PostgreSQL at 127.0.0.1:" in str(refused.value)
    assert "hunter2secret" not in str(refused.value)


FAMILY = """
import subprocess, sys, time
keep = "import time; print('up', flush=True); time.sleep(3600)"
children = [subprocess.Popen([sys.executable, "-c", keep], start_new_session=new) for new in (False, True)]
time.sleep(3600)
"""


def left_behind(home: Path) -> tuple[list[psutil.Process], psutil.Process]:
    """A service whose first process was killed alone: what it had started, one in a session of its own; a stranger."""
    stranger = psutil.Process(sleeper().pid)
    up = Up(home, Wanted(), print)
    up.folder.mkdir(parents=True)
    up._spawn(MLFLOW, ["-c", FAMILY], {}, "http://127.0.0.1:1")
    running = read_services(home).processes[MLFLOW]
    until(lambda: Path(running.log).read_text().count("up"), lambda count: count == 2, 120)
    family = running.family()
    assert len(family) == 3
    first = psutil.Process(running.pid)
    first.kill()
    first.wait()
    return [process for process in family if process != first], stranger


def test_what_outlived_its_server_is_shown_and_ended_by_down(tmp_path):
    remains, stranger = left_behind(tmp_path)
    [row] = described(read_services(tmp_path))
    assert (row["state"], sorted(row["remains"])) == ("down", sorted(process.pid for process in remains))
    assert stop(tmp_path) == [MLFLOW]
    assert not any(lives(process.pid, process.create_time()) for process in remains if process.is_running())
    assert stranger.is_running()
    stranger.kill()


def test_what_outlived_its_server_is_ended_before_up_looks_at_its_port(tmp_path, capsys):
    remains, stranger = left_behind(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(UserError, match="is in use"):
        start(tmp_path, mlflow_port=listener.getsockname()[1], prefect_port=free())
    assert "the process of mlflow is gone; what it had started ends too" in capsys.readouterr().out
    assert not [process for process in remains if process.is_running()]
    assert stranger.is_running()
    stranger.kill()
