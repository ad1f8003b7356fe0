"""Ranks on more machines than one: what the environment says of them, and two "machines" on this one's loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch
from engine_steps import Experiment, run

from data_pipeline.core.errors import UserError
from flows.engine import launch
from llm.machine import nodes as module
from llm.machine.nodes import Nodes, launcher_pid, nodes_for

JOIN = """
import sys
from pathlib import Path
from flows.engine import launch

sys.exit(launch.join("tests.engine_steps", Path(sys.argv[1]), 2))
"""


def experiment() -> Experiment:
    model = {"layers": 1, "heads": 2, "width": 16, "context": 8}
    fields = {"model": model, "tokens": 640, "batch_tokens": 64, "precision": "fp32", "lr": 1e-2}
    return Experiment({**fields, "runtime": {"ranks": 2, "zero_stage": 1}}, steps=2)


@pytest.mark.long
def test_two_machines_train_to_the_same_weights_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run([experiment()], tmp_path / "one", forks.launch)[0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("LLMILL_NODES", "2")
    monkeypatch.setenv("LLMILL_ENDPOINT", endpoint)
    folder = tmp_path / "two"
    with open(tmp_path / "joined.log", "wb") as log:
        other = subprocess.Popen(
            [sys.executable, "-c", JOIN, str(folder / "job.json")], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            together = run([experiment()], folder, launch.local)[0]
            assert other.wait(60) == 0, (tmp_path / "joined.log").read_text()
        finally:
            other.kill()
    for name, weight in alone.weights.items():
        assert torch.equal(together.weights[name], weight), name


def test_one_machine_is_the_rule() -> None:
    assert nodes_for(1, {}) == Nodes()
    assert Nodes().rendezvous(4) == ["--standalone", "--nproc-per-node=4"]
    assert Nodes().everywhere(["true"]) == ["true"]


def test_named_machines_meet_at_the_endpoint() -> None:
    nodes = nodes_for(8, {"LLMILL_NODES": "2", "LLMILL_ENDPOINT": "first:29500"})
    assert nodes.rendezvous(8) == [
        "--nnodes=2",
        "--nproc-per-node=4",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=first:29500",
        "--rdzv-id=llmill",
    ]
    assert nodes.everywhere(["true"]) == ["true"]


def test_in_a_job_of_slurm_as_few_machines_work_as_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "rank_capacity", lambda: (8, "GPUs"))
    slurm = {"SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_ID": "123456"}
    assert nodes_for(8, slurm) == Nodes()
    nodes = nodes_for(16, slurm)
    assert nodes == Nodes(2, f"{socket.gethostname()}:23456", "srun")
    started = nodes.everywhere(["torchrun"])
    assert started == [
        "srun",
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
        "torchrun",
    ]
    assert nodes_for(64, slurm) == Nodes()  # which `require_ranks` refuses


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LLMILL_NODES": "two"}, "LLMILL_NODES is 'two': set it to the number of machines"),
        ({"LLMILL_NODES": "0"}, "LLMILL_NODES is '0'"),
        ({"LLMILL_NODES": "2"}, "LLMILL_ENDPOINT is '':\nset it to HOST:PORT"),
        ({"LLMILL_NODES": "2", "LLMILL_ENDPOINT": "first"}, "LLMILL_ENDPOINT is 'first'"),
    ],
)
def test_an_environment_that_cannot_be_says_what_to_set(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        nodes_for(2, environment)


def test_ranks_that_machines_cannot_share_evenly_are_refused() -> None:
    with pytest.raises(UserError, match="ranks is 5, which 2 machines cannot share evenly"):
        Nodes(2, "first:1", "hand").rendezvous(5)


def test_there_is_nothing_to_join_on_one_machine(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to join: set LLMILL_NODES and LLMILL_ENDPOINT"):
        launch.join("llm.training.trainer", tmp_path / "job.json", 1)


def test_ranks_outlive_no_launcher_of_their_machine_and_look_for_none_on_others() -> None:
    here = {"LLMILL_PARENT": "77", "LLMILL_PARENT_HOST": socket.gethostname()}
    assert launcher_pid(here) == 77
    assert launcher_pid({**here, "LLMILL_PARENT_HOST": "elsewhere"}) == os.getpid()
    assert launcher_pid({}) == os.getpid()
