"""A home works wherever it lies, and after a move: what its databases name is under it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from command_line import Llmill
from mlflow import MlflowClient

from data_pipeline.core.errors import UserError
from flows.cli.options import at_home, expanded
from flows.engine.services import sqlite_url
from flows.listeners.mlflow.links import tracking_uri
from flows.listeners.mlflow.moved import ADDRESSES, follow_home, open_file
from flows.prefect.servers import PrefectServer

NAMES = ("~ü #b%20c [1]", "a?mode=memory")


def addresses(home: Path) -> set[str]:
    """All addresses of files that MLflow's database of a home has."""
    found: set[str] = set()
    with closing(open_file(home / "mlflow.db", "ro")) as database:
        for table, columns in ADDRESSES.items():
            for column in columns:
                rows = database.execute(f"SELECT {column} FROM {table} WHERE {column} LIKE '%file:%'")
                found |= {row[0] for row in rows}
    return found


def test_a_moved_home_is_followed_by_what_mlflow_says_of_it(finished: Llmill, copy_finished, tmp_path):
    moved = copy_finished(tmp_path / "moved to [here] 100%20?x")
    ours, theirs = (f"{llmill.home.resolve().as_uri()}/" for llmill in (moved, finished))
    assert any(theirs in address for address in addresses(moved.home))
    before = {path: path.stat().st_mtime_ns for path in finished.home.rglob("*")}
    said = moved("trace", "models:/small/1").stdout
    assert "models:/small/1" in said
    found = addresses(moved.home)
    assert len(found) > 5
    assert not [address for address in found if theirs in address]
    assert [address for address in found if ours in address]
    client = MlflowClient(tracking_uri(moved.home))
    version = client.get_model_version("small", "1")
    assert version.source.startswith(ours)
    files = client.get_model_version_download_uri("small", "1")
    assert files.startswith(ours)
    assert (Path(url2pathname(urlsplit(files).path)) / "MLmodel").exists()
    moved.run("--set", "evaluate.seed=1")
    assert not [address for address in addresses(moved.home) if theirs in address]
    assert before == {path: path.stat().st_mtime_ns for path in finished.home.rglob("*")}


def test_a_moved_home_that_cannot_be_written_says_what_it_needs(copy_finished, tmp_path):
    moved = copy_finished(tmp_path / "moved")
    with closing(sqlite3.connect(moved.home / "mlflow.db")) as database:
        database.execute("BEGIN IMMEDIATE")  # what a read-only file system says is another word for the same
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flows.listeners.mlflow.moved.WAIT_SECONDS", 0.0)
            with pytest.raises(OSError, match=r"the home was moved here from file://.*locked"):
                follow_home(moved.home)


@pytest.mark.parametrize("name", NAMES)
def test_a_database_lies_within_the_home_whatever_that_is_called(tmp_path, name, monkeypatch):
    home = tmp_path / name
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = MlflowClient(tracking_uri(home))
    run = client.create_run(client.create_experiment("x", (home / "mlartifacts").as_uri()))
    client.log_text(run.info.run_id, "text", "a.txt")
    assert [one.path for one in client.list_artifacts(run.info.run_id)] == ["a.txt"]
    assert {path.name for path in home.iterdir()} >= {"mlflow.db", "mlartifacts"}
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_prefect_keeps_its_database_within_a_home_of_any_name(tmp_path, monkeypatch):
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_SERVER_DATABASE_CONNECTION_URL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "a b#1 %20?mode=memory [x]"
    with PrefectServer(home) as server:
        server.wait()
        assert (home / "prefect" / "prefect.db").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [home.name]


def test_a_tilde_is_the_home_of_a_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded(Path("~/x")) == tmp_path / "x"
    assert expanded(Path("x~/y")) == Path("x~/y")
    with pytest.raises(UserError, match="--home ~nobody-of-that-name/x"):
        expanded(Path("~nobody-of-that-name/x"))


def test_a_hint_can_be_pasted_into_a_shell():
    assert at_home(Path(".llmill")) == ""
    assert at_home(Path("/my home/$x")) == " --home '/my home/$x'"
    assert sqlite_url(Path("/a b/x.db")) == "sqlite:////a b/x.db"
