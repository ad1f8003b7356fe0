"""``llmill sweep --jobs``: runs side by side, stopped in the midst and continued."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest
from command_line import Llmill
from conftest import SWEEP, SWEPT
from mlflow import MlflowClient
from operator_api import until

from data_pipeline.core.errors import UserError
from flows.compare import side_by_side
from flows.compare.side_by_side import shares
from flows.engine.store import Store

PARENT = "mlflow.parentRunId"


def processes(home: Path) -> list[psutil.Process]:
    """Those that carry a run of a sweep out, for this home."""
    found = []
    for process in psutil.process_iter():
        try:
            named = "flows.compare.side_by_side" in process.cmdline()
            if named and process.environ().get("LLMILL_HOME") == str(home):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.long
def test_runs_side_by_side_make_what_runs_in_turn_do_also_when_stopped(swept: Llmill, make_llmill) -> None:
    llmill: Llmill = make_llmill(recipe=SWEPT)
    command = ("sweep", str(llmill.recipe), *SWEEP, "--jobs", "2")
    sweep = llmill.start(*command)

    def at_work() -> int:
        """How many processes there are once one of the first two trains."""
        assert sweep.poll() is None, sweep.communicate()
        begun = llmill.home.glob("store/pretrain/*.partial/logs/events.jsonl")
        return len(processes(llmill.home)) if any('"step"' in path.read_text() for path in begun) else 0

    until(at_work, lambda count: count == 2, 60)
    sweep.send_signal(signal.SIGINT)
    _, said = sweep.communicate(timeout=900)
    assert sweep.returncode == 130
    assert "the same command resumes it" in said
    assert not processes(llmill.home)

    shown = llmill(*command).stdout
    assert llmill.payloads() == swept.payloads()
    made = Counter(artifact.stage for artifact in Store(llmill.home).artifacts())
    assert (made["tokenize"], made["pretrain"]) == (1, 4)
    lines = shown.splitlines()
    for number in range(1, 5):
        assert any(line.startswith(f"{number} │ ") and "evaluate" in line for line in lines)
    assert "recipe 1 (lr 0.003) is better than recipe 2 (lr 1e-05)" in " ".join(shown.split())

    client = MlflowClient(f"sqlite:///{llmill.home}/mlflow.db")
    experiment = client.get_experiment_by_name("small").experiment_id
    runs = client.search_runs([experiment])
    [parent] = [run for run in runs if run.data.tags.get("llmill.kind") == "sweep"]
    groups = [run for run in runs if run.data.tags.get("llmill.kind") == "seeds"]
    assert {run.data.tags[PARENT] for run in groups} == {parent.info.run_id}
    own = {group.info.run_id for group in groups}
    members = [run for run in runs if run.data.tags.get(PARENT) in own]
    assert [run.info.status for run in [parent, *groups, *members]] == ["FINISHED"] * 7


@pytest.mark.long
def test_one_that_fails_leaves_the_others_going_and_a_sweep_that_shows_nothing_ends(make_llmill) -> None:
    llmill: Llmill = make_llmill(recipe=SWEPT)
    command = ("sweep", str(llmill.recipe), "--set", "pretrain.tokens=8192", "--jobs", "2")
    ended = llmill(*command, "--grid", "clean.min_chars=9000000,1", code=1)
    assert "clean dropped every document" in ended.stdout
    assert "1 of 2 runs failed; the same command runs them again" in ended.stderr
    few = ("--grid", "pretrain.lr=0.003,0.001", "--set", "tokenize.val_fraction=0.02")
    ended = llmill(*command, *few, code=2)
    assert "held-out documents are too few to compare models by, 10 are needed" in ended.stderr


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(side_by_side, "gpus", lambda: 5)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in shares(2)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-a,3,4,5")
    assert [one["CUDA_VISIBLE_DEVICES"] for one in shares(3)] == ["7", "GPU-a", "3"]
    with pytest.raises(UserError, match="--jobs 6: each needs a GPU of its own, and this machine has 5"):
        shares(6)
    monkeypatch.setattr(side_by_side, "gpus", lambda: 0)
    assert all("CUDA_VISIBLE_DEVICES" not in one for one in shares(6))
