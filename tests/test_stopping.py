"""SIGTERM and Ctrl-C end a run whatever it computes, and Prefect and MLflow know that it was stopped."""

from __future__ import annotations

import signal

import psutil
import pytest
from command_line import Llmill
from forks import Forked
from mlflow import MlflowClient
from operator_api import Prefect, until

from flows.engine import stopping
from flows.engine.stopping import END_SECONDS


def at_work(llmill: Llmill, run: Forked) -> None:
    """Wait until the endless stage is at work."""

    def flags() -> bool:
        assert run.poll() is None, run.communicate()
        return bool(list(llmill.home.glob("store/download/*.partial/at-work*")))

    until(flags, bool, 120)


def flow_states(prefect_server: str, llmill: Llmill) -> set[str]:
    """The last states of what ran on this home, the pipeline and the stages."""
    prefect = Prefect(prefect_server)
    runs = prefect.post("flow_runs/filter", sort="START_TIME_DESC", limit=200)
    [ours] = [run for run in runs if str(llmill.home) in str(run["parameters"])]
    stages = prefect.post("flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [ours["id"]]}})
    assert len(stages) == 1
    return {run["state_type"] for run in [ours, *stages]}


@pytest.mark.parametrize(
    ("kind", "runner", "number"),
    [
        ("parts", "processes", signal.SIGTERM),
        ("parts", "processes", signal.SIGINT),
        ("parts", "threads", signal.SIGTERM),
        ("native", "processes", signal.SIGTERM),
        pytest.param("parts", "dask", signal.SIGINT, marks=pytest.mark.long),
        pytest.param("parts", "ray", signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_a_stage_that_would_never_end_is_ended(make_llmill, prefect_server, kind, runner, number):
    llmill = make_llmill()
    words = [
        "run",
        str(llmill.recipe),
        "--set",
        f"runtime.task_runner={runner}",
        "--set",
        "runtime.workers=2",
    ]
    run = Forked("flows.prefect.pipeline", "tests.endless_stage", [kind, *words], llmill.environment())
    at_work(llmill, run)
    family = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(number)
    out, err = run.communicate(timeout=END_SECONDS + 60)
    assert run.returncode == 130, (out, err)
    why = "stopped by Ctrl-C" if number == signal.SIGINT else "stopped by SIGTERM"
    assert f"download: {why}" in out
    assert "the same command resumes it" in out + err
    assert "Traceback" not in out + err
    assert not psutil.wait_procs(family, 30)[1]
    assert flow_states(prefect_server, llmill) == {"CANCELLED"}
    client = MlflowClient(f"sqlite:///{llmill.home}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert {run.info.status for run in runs} == {"KILLED"}
    assert len(runs) == 2


def test_who_was_asked_to_stop_before_the_stages_begin_ends_there(monkeypatch):
    """What was raised then may have been lost: Python ignores what is raised within a destructor."""
    monkeypatch.setattr(stopping, "asked", stopping.Asked())
    stopping.asked.note("cancelled in Prefect")
    with pytest.raises(stopping.Stop, match="cancelled in Prefect"), stopping.ending_in_time(lambda: None):
        pytest.fail("it began")
