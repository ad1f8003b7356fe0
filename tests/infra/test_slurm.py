"""Training by Slurm, through the command line: on a stand-in that really starts the ranks as two "machines", and, where
Slurm is installed, on a real one of two nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import slurm_stand_in
from command_line import Llmill
from known_names import INFRA, parse
from pydantic import ValidationError

from data_pipeline.core.errors import UserError
from flows.engine import slurm
from flows.engine.ports import free_port
from flows.recipe import load_recipe
from llm.machine.slurm import SlurmJob

BY_HAND = INFRA / "slurm/pretrain.sbatch"
HERE = Path(slurm_stand_in.__file__)
BY_SLURM = {
    "pretrain.runtime.launcher": "slurm",
    "pretrain.runtime.slurm.nodes": "2",
    "pretrain.runtime.slurm.poll_seconds": "0.3",
}
SECONDS = 240


@dataclass
class Cluster:
    """What a test may do to Slurm."""

    environment: dict[str, str]
    real: bool = False

    def ask(self, *command: str) -> str:
        return subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, check=True
        ).stdout

    def state(self, number: str) -> str:
        return self.ask(
            "squeue", f"--jobs={number}", "--states=all", "--noheader", "--format=%T|%r|%N"
        ).split("|")[0]

    def preempt(self, number: str) -> None:
        """Tell a job that others need its machines: it is to save, and to be queued again."""
        if self.real:
            self.ask("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
        else:
            self.ask("scancel", "--batch", "--signal=TERM", number)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "jobs").mkdir()
    for name in slurm_stand_in.COMMANDS:
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE} {name} "$@"\n')
        script.chmod(0o755)
    return Cluster(
        {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SLURM_STAND_IN": str(folder / "jobs")}
    )


@dataclass
class Trained:
    """A home in which all but the training has been done, for two ranks."""

    llmill: Llmill
    cluster: Cluster
    settings: dict[str, str]

    def words(self, **more: str) -> list[str]:
        settings = {**self.settings, **BY_SLURM, **more}
        return [
            "--only",
            "pretrain",
            *(word for pair in settings.items() for word in ("--set", "=".join(pair))),
        ]

    def start(self) -> Any:
        return self.llmill.start("run", str(self.llmill.recipe), *self.words(), **self.cluster.environment)

    def run(self, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        return self.llmill.run(*self.words(**more), code=code, **self.cluster.environment)

    def folder(self) -> Path:
        [path] = self.llmill.home.glob("store/pretrain/*.partial")
        return path

    def number(self) -> str:
        return str(json.loads((self.folder() / "scratch/slurm.json").read_text())["number"])

    def steps(self) -> int:
        """How many steps the unfinished training has taken."""
        events = list(self.llmill.home.glob("store/pretrain/*.partial/logs/events.jsonl"))
        lines = [json.loads(line) for line in events[0].read_text().splitlines()] if events else []
        return max((line.get("step", 0) for line in lines), default=0)

    def wait_for_step(self, run: Any, step: int) -> None:
        """Return when a training has taken so many steps."""
        deadline = time.monotonic() + SECONDS
        while self.steps() < step:
            assert run is None or run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture(scope="module")
def two_ranks(finished: Llmill, make_llmill: Any) -> tuple[dict[str, str], dict[str, str], Path]:
    """Settings, the payloads of a local training with them, and a home that lacks only that."""
    manifest = finished.manifest("pretrain")
    precision = manifest["config"]["precision"]
    settings = {"pretrain.precision": precision, "pretrain.runtime.ranks": "2", "pretrain.tokens": "122_880"}
    alone = make_llmill()
    for stage in ("download", "clean", "dedup", "train_tokenizer", "tokenize"):
        shutil.copytree(finished.home / "store" / stage, alone.home / "store" / stage)
    empty = alone.home.parent / f"{alone.home.name}-empty"
    shutil.copytree(alone.home, empty)
    words = [word for pair in settings.items() for word in ("--set", "=".join(pair))]
    alone("run", str(finished.recipe), "--only", "pretrain", *words, OMP_NUM_THREADS="1")
    return settings, alone.payloads(), empty


@pytest.fixture
def trained(stand_in: Cluster, two_ranks: Any, finished: Llmill, tmp_path: Path) -> Trained:
    return on(stand_in, two_ranks, finished, tmp_path)


def on(cluster: Cluster, two_ranks: Any, finished: Llmill, folder: Path) -> Trained:
    """A new home for trainings by a cluster."""
    settings, _, empty = two_ranks
    shutil.copytree(empty, folder / "home")
    environment = {**cluster.environment, "OMP_NUM_THREADS": "1"}
    return Trained(Llmill(folder / "home", finished.recipe), Cluster(environment, cluster.real), settings)


def disturb(trained: Trained) -> None:
    """Cancel a training, begin it again, and have it preempted; then it goes on to its end by itself."""
    run = trained.start()
    trained.wait_for_step(run, 6)
    first = trained.number()
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=SECONDS)
    assert run.returncode == 130, (out, err)
    assert "the same command resumes it" in err
    assert trained.cluster.state(first) in slurm.ENDED
    assert "interrupted after step" in out
    reached = trained.steps()
    run = trained.start()
    trained.wait_for_step(run, reached + 5)
    second = trained.number()
    assert second != first
    trained.cluster.preempt(second)
    out, err = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, (out, err)
    assert out.count("resumed at step") == 2
    assert f"Slurm job {second}: PENDING" in out
    assert trained.cluster.state(second) == "COMPLETED"


@pytest.mark.long
def test_a_training_that_was_cancelled_and_preempted_ends_with_the_bytes_of_a_local_one(
    trained: Trained, two_ranks: Any
) -> None:
    disturb(trained)
    assert trained.llmill.payloads() == two_ranks[1]
    assert not [process for process in psutil.process_iter() if str(trained.llmill.home) in cmdline(process)]


def cmdline(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.long
def test_a_run_that_was_killed_leaves_its_job_at_work_and_the_next_follows_it(
    trained: Trained, two_ranks: Any
) -> None:
    run = trained.start()
    trained.wait_for_step(run, 1)
    number = trained.number()
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    out = trained.run().stdout
    assert f"Slurm job {number} trains already: this run follows it" in out
    assert trained.llmill.payloads() == two_ranks[1]


def test_a_job_that_fails_before_its_ranks_start_is_told_with_its_last_lines(trained: Trained) -> None:
    lines = '["echo the module is not there", "exit 3"]'
    result = trained.run(code=1, **{"pretrain.runtime.slurm.setup": lines})
    assert "ended as FAILED" in result.stderr
    assert "the module is not there" in result.stderr


def test_what_sbatch_refuses_is_told(trained: Trained) -> None:
    result = trained.run(code=2, **{"pretrain.runtime.slurm.partition": "nowhere"})
    assert "sbatch refuses the job: sbatch: error: invalid partition specified: nowhere" in result.stderr


def test_without_slurm_it_is_said_what_to_do(two_ranks: Any, finished: Llmill, tmp_path: Path) -> None:
    nowhere = Cluster({"PATH": str(tmp_path)})
    result = on(nowhere, two_ranks, finished, tmp_path).run(code=2)
    assert "launcher is slurm, but sbatch is not installed here" in result.stderr


@pytest.mark.long
def test_a_training_submitted_by_hand_goes_on_after_a_preemption(
    trained: Trained, two_ranks: Any, tmp_path: Path
) -> None:
    (tmp_path / "llmill").write_text(f'#!/bin/sh\nexec {sys.executable} -m flows.cli.main "$@"\n')
    (tmp_path / "llmill").chmod(0o755)
    told = trained.cluster.environment
    path = f"{tmp_path}{os.pathsep}{told['PATH']}"
    cluster = Cluster({**trained.llmill.environment(**told), "PATH": path})
    words = [word for pair in trained.settings.items() for word in ("--set", "=".join(pair))]
    log = f"--output={tmp_path / 'log'}"
    number = cluster.ask(
        "sbatch", "--parsable", log, str(BY_HAND), str(trained.llmill.recipe), *words
    ).strip()
    trained.wait_for_step(None, 6)
    cluster.preempt(number)
    deadline = time.monotonic() + SECONDS
    while cluster.state(number) not in slurm.ENDED:
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.3)
    assert cluster.state(number) == "COMPLETED"
    assert "resumed at step" in (tmp_path / "log").read_text()
    assert trained.llmill.payloads() == two_ranks[1]


def test_the_script_for_submitting_by_hand_asks_for_what_there_is() -> None:
    text = BY_HAND.read_text()
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert slurm_stand_in.taken_apart("sbatch", [word for line in lines for word in line])[1] == []
    [command] = re.findall(r"^(llmill run .*) &$", text, flags=re.MULTILINE)
    parse(command.replace('"$@"', "recipe.yaml").replace("$((8 * SLURM_JOB_NUM_NODES))", "16").split())


@pytest.mark.long
def test_a_real_slurm_does_the_same(two_ranks: Any, finished: Llmill, tmp_path: Path) -> None:
    with real_slurm(tmp_path / "slurm") as cluster:
        trained = on(cluster, two_ranks, finished, tmp_path)
        disturb(trained)
        assert trained.llmill.payloads() == two_ranks[1]


@contextmanager
def real_slurm(folder: Path) -> Iterator[Cluster]:
    """Slurm itself, with two nodes on this machine, for as long as the block lasts."""
    if not shutil.which("slurmctld") or not shutil.which("slurmd") or os.getuid():
        pytest.skip("Slurm's daemons are not installed here, or may not be started by this user")
    (folder / "state").mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    ports = {name: free_port() for name in ("control", "one", "two")}
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, host=host, **ports))
    cluster = Cluster({"SLURM_CONF": str(folder / "slurm.conf")}, real=True)
    daemons = [["slurmctld", "-D"], ["slurmd", "-D", "-N", "one"], ["slurmd", "-D", "-N", "two"]]
    environment = {**os.environ, **cluster.environment}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen(daemon, env=environment, **quiet) for daemon in daemons]
    try:
        deadline = time.monotonic() + 60
        while cluster.ask("sinfo", "--noheader", "--partition=low", "--format=%T %D").strip() != "idle 2":
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield cluster
    finally:
        for daemon in running:
            daemon.terminate()
        for daemon in running:
            daemon.wait()


SLURM_CONF = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
CryptoType=crypto/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/control.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/control.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={one} CPUs=1
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={two} CPUs=1
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10
"""


def test_how_slurm_trains_is_no_part_of_what_is_trained(finished: Llmill) -> None:
    manifest = finished.manifest("pretrain")
    by_slurm = ["=".join(pair) for pair in BY_SLURM.items()]
    precision = f"pretrain.precision={manifest['config']['precision']}"
    assert finished.actions(*by_slurm, "pretrain.runtime.ranks=2", precision) == ["reuse"] * 8
    with pytest.raises(
        UserError, match="precision is auto, which this machine cannot resolve for those of Slurm"
    ):
        finished.actions(*by_slurm, "pretrain.runtime.ranks=2")
    with pytest.raises(UserError, match="nodes 2 does not divide ranks 3"):
        load_recipe(finished.recipe, [*by_slurm, "pretrain.runtime.ranks=3"])


def test_a_job_asks_for_what_the_recipe_says() -> None:
    job = SlurmJob(
        nodes=2, gpus_per_node=8, partition="gpu", time="1-00:00:00", options=("--constraint=h100",)
    )
    assert job.arguments() == [
        "--nodes=2",
        "--gpus-per-node=8",
        "--partition=gpu",
        "--time=1-00:00:00",
        "--signal=B:TERM@120",
        "--ntasks-per-node=1",
        "--requeue",
        "--constraint=h100",
    ]
    assert "--no-requeue" in SlurmJob(requeue=False).arguments()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": ["-p gpu"]}, "no option of sbatch in one word"),
        ({"options": ["--output=x"]}, "llmill sets this option of sbatch itself"),
        ({"options": ["--partition=a"], "partition": "b"}, "partition is set as well"),
        ({"time": "tomorrow"}, "String should match pattern"),
        ({"nodes": 0}, "greater than or equal to 1"),
    ],
)
def test_a_job_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SlurmJob(**settings)
