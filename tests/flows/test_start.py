"""How fast a command begins, told by what it imports, and how it ends when a signal comes meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Llmill
from mlflow import MlflowClient
from typer.main import get_command

from flows.cli.main import make_app
from flows.stages import STAGES

HEAVY = (
    "torch",
    "transformers",
    "deepspeed",
    "datasets",
    "awkward",
    "gigatoken",
    "matplotlib",
    "mlflow",
    "prefect",
)
LIGHTER = (*HEAVY, "numba", "pyarrow", "numpy", "scipy", "tokenizers", "httpx", "fsspec")
WATCH = """
import atexit, importlib.abc, json, os, pathlib, signal, sys

class Trigger(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("TRIGGER"):
            os.environ.pop("TRIGGER")  # children need none
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))

if os.environ.get("TRIGGER"):
    sys.meta_path.insert(0, Trigger())
if report := os.environ.pop("IMPORTED", ""):
    atexit.register(lambda: pathlib.Path(report).write_text(json.dumps(sorted(sys.modules))))
"""
"""Run by Python before all else: sends this process a signal as a module is about to be imported, and tells at the end
which were."""


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    (folder / "sitecustomize.py").write_text(WATCH)
    return folder


@pytest.fixture
def llmill(make_llmill) -> Llmill:
    return make_llmill()


def start(watched: Path, llmill: Llmill, *arguments: str, **changes: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(watched), str(Path.cwd())])
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli.start", *arguments],
        env=llmill.environment(PYTHONPATH=path, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def imported(watched: Path, llmill: Llmill, *arguments: str, **changes: str) -> set[str]:
    """The modules that a command had when it ended well."""
    report = watched / "imported.json"
    process = start(watched, llmill, *arguments, IMPORTED=str(report), **changes)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    return set(json.loads(report.read_text()))


def test_help_of_every_command_imports_no_heavy_library(watched, llmill):
    """All in one process, for what one imports the next would."""
    names = ["", *get_command(make_app()).commands]
    calls = f"import sys, typer.testing, flows.cli.main as cli\nfor name in {names}:\n"
    calls += "    done = typer.testing.CliRunner().invoke(cli.make_app(), [*name.split(), '--help'])\n"
    calls += "    assert not done.exit_code, done\n"
    calls += f"print([name for name in {LIGHTER} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", calls], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_status_imports_no_heavy_library(watched, finished):
    assert not imported(watched, finished, "status") & set(LIGHTER)


def test_a_plan_imports_no_heavy_library_and_no_body_that_needs_one(watched, finished):
    found = imported(watched, finished, "plan", str(finished.recipe))
    assert not found & set(HEAVY)
    assert not found & {
        "llm.pretrain.stage",
        "llm.evaluate.stage",
        "llm.export.stage",
        "llm.model.transformer",
    }


def tracked_runs(llmill) -> int:
    """How many whole runs MLflow has of the home's recipe; runs of single stages do not count."""
    client = MlflowClient(f"sqlite:///{llmill.home}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    return sum("mlflow.parentRunId" not in run.data.tags for run in found)


def test_a_run_that_reuses_all_imports_no_stage_starts_no_server_and_is_tracked(watched, finished):
    """Prefect is told where there is a server; here there is none."""
    unfinished = json.loads(finished("status", "--json").stdout)["unfinished"]  # what other tests left
    logs = finished.home / "prefect" / "server.log"
    before = logs.stat().st_mtime_ns if logs.exists() else 0
    tracked = tracked_runs(finished)
    found = imported(watched, finished, "run", str(finished.recipe), PREFECT_API_URL="")
    assert not found & (set(HEAVY) - {"mlflow", "prefect"})
    assert tracked_runs(finished) == tracked + 1
    assert (logs.stat().st_mtime_ns if logs.exists() else 0) == before
    assert not (finished.home / "prefect" / "server.json").exists()
    assert json.loads(finished("status", "--json").stdout)["unfinished"] == unfinished


@pytest.mark.parametrize(
    ("trigger", "number"),
    [
        ("flows.cli.main", signal.SIGINT),
        ("typer", signal.SIGTERM),
        ("flows.cli.runs", signal.SIGHUP),
        ("flows.recipe", signal.SIGINT),
        ("pyarrow", signal.SIGTERM),
        ("prefect", signal.SIGINT),
        ("mlflow", signal.SIGTERM),
    ],
)
def test_a_signal_while_importing_ends_a_run_with_one_line(watched, llmill, trigger, number):
    process = start(watched, llmill, "run", str(llmill.recipe), TRIGGER=trigger, SIGNAL=str(int(number)))
    out, err = process.communicate(timeout=900)
    assert process.returncode == 130, out + err
    assert err.startswith("error: stopped"), err
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in out


@pytest.mark.parametrize("command", ["run", "sweep", "deploy"])
def test_something_is_shown_before_anything_heavy_is_imported(watched, llmill, command):
    """By the time of a heavy import it stands on the screen: the process ends there."""
    kill = {"TRIGGER": "flows.recipe", "SIGNAL": str(int(signal.SIGKILL))}
    process = start(watched, llmill, command, str(llmill.recipe), **kill)
    out, _ = process.communicate(timeout=900)
    assert process.returncode in (-signal.SIGKILL, 2)
    assert out.startswith(f"reading {llmill.recipe} ...")


def test_up_imports_nothing_heavy_before_it_begins(watched, llmill):
    report = watched / "imported.json"
    process = start(watched, llmill, "up", "--home", "/dev/null/home", IMPORTED=str(report))
    out, err = process.communicate(timeout=900)
    assert process.returncode == 2, err
    assert out.startswith("looking what is up ...")
    assert not set(HEAVY) & set(json.loads(report.read_text()))


def test_every_row_of_the_table_names_a_body_and_a_config():
    for stage in STAGES:
        assert callable(stage.body)
        assert stage.config.__name__.endswith("Config")
