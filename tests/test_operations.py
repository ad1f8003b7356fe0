"""A team's installation: Prefect, MLflow and a worker that stay up, both servers' data in a real PostgreSQL.

One home goes through it all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
from command_line import Llmill
from conftest import RECIPE
from mlflow import MlflowClient
from operator_api import FINAL, Prefect, until
from postgres import PASSWORD, postgres
from ranks import held_until_asked, torchrun
from webhook import hook

from flows.engine.ports import free_port
from flows.engine.services import GPU_POOL, read_services
from flows.engine.store import Store
from flows.listeners.mlflow.points import is_drawn
from flows.prefect.form import OTHERS
from flows.prefect.pools import COMMAND
from flows.prefect.up import stop
from flows.stages import DEFAULT
from llm.training.events import read_events

ENGINE = Path(__file__).parent / "planted_engine.py"
EVENTS = "store/pretrain/*.partial/logs/events.jsonl"


@dataclass
class Site:
    """A home whose servers are up, with the small recipe deployed."""

    llmill: Llmill
    address: str
    ports: tuple[str, ...]
    notices: list[dict] = field(default_factory=list)
    hook: str = ""

    def type(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """A command in a terminal that is closed right after."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))
        }
        told = {"LLMILL_HOME": str(self.llmill.home), "OPERATOR_HOOK": self.hook, "COLUMNS": "200"}
        command = [sys.executable, "-m", "flows.cli.main", *words]
        folder = self.llmill.recipe.parent
        done = subprocess.run(
            command, env={**kept, **told}, cwd=folder, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == code, done
        return done

    def up(self, *more: str) -> subprocess.CompletedProcess[str]:
        return self.type("up", "--postgres", self.address, *self.ports, *more)

    @property
    def prefect(self) -> Prefect:
        return Prefect(f"{read_services(self.llmill.home).url('prefect')}/api")

    @property
    def mlflow(self) -> MlflowClient:
        return MlflowClient(read_services(self.llmill.home).url("mlflow"))

    def processes(self, pool: str = "llmill") -> list[psutil.Process]:
        """What the pool's worker has started and not yet ended."""
        worker = read_services(self.llmill.home).alive(f"worker {pool}")
        return psutil.Process(worker.pid).children(recursive=True) if worker else []


@pytest.fixture(scope="module")
def site(make_llmill, tmp_path_factory) -> Iterator[Site]:
    llmill = make_llmill(recipe=RECIPE + "runtime: {{notify: [env:OPERATOR_HOOK]}}\n")
    ports = ("--prefect-port", str(free_port()), "--mlflow-port", str(free_port()))
    with postgres() as address:
        site = Site(llmill, address, ports)
        with hook(site.notices) as site.hook:
            site.up()
            site.type("deploy", str(llmill.recipe))
            try:
                yield site
            finally:
                site.type("down")


@pytest.mark.long
def test_a_scheduled_run_starts_by_itself_fails_in_every_stage_and_each_retry_goes_on(site: Site):
    """The journey of an operator: what failed is repaired, and Retry does the rest."""
    planted = site.llmill.home / "planted"
    planted.mkdir()
    for stage in DEFAULT:
        (planted / stage).touch()
    plant_engine(site)
    said = site.type("deploy", str(site.llmill.recipe), "--cron", "* * * * *", "--timezone", "Europe/Berlin")
    assert "* * * * * Europe/Berlin, every minute: next " in said.stdout

    prefect = site.prefect
    [run] = until(lambda: started(prefect), bool, 130)
    pause(site)
    for stage in DEFAULT:
        fail_and_retry(site, run["id"], stage)
    ended = prefect.ended(run["id"])
    assert ended["state_type"] == "COMPLETED", ended["state"]
    assert ended["auto_scheduled"]
    check_page(site, run["id"])
    check_mlflow(site, run["id"])


def fail_and_retry(site: Site, flow_run: str, stage: str) -> None:
    """See the run fail in the stage, everyone told of it, and press Retry."""
    prefect = site.prefect
    failed = prefect.ended(flow_run)
    assert failed["state_type"] == "FAILED", failed["state"]
    assert f"planted in {stage}" in failed["state"]["message"]
    until(
        lambda: {row["stage"]: row["state"] for row in prefect.artifacts(flow_run)["stages"]},
        lambda states: states[stage] == "failed",
        20,
    )
    told = until(lambda: site.notices, lambda notices: notices and notices[-1]["stage"] == stage, 20)[-1]
    assert told["state"] == "failed"
    assert f"planted in {stage}" in told["log"]
    assert told["resume"].startswith("llmill run ")
    prefect.retry(flow_run)
    until(lambda: prefect.run(flow_run), lambda now: now["run_count"] > failed["run_count"], 60)


def plant_engine(site: Site) -> None:
    """Change the pool's command as an operator would, so that what runs next can fail; its worker starts anew."""
    pool = site.prefect.get("work_pools/llmill")
    template = pool["base_job_template"]
    assert template["job_configuration"]["command"] == COMMAND
    template["job_configuration"]["command"] = f"{sys.executable} {ENGINE}"
    site.prefect.patch("work_pools/llmill", base_job_template=template)
    stop(site.llmill.home, ["worker llmill"])
    site.up()
    assert site.prefect.get("work_pools/llmill")["base_job_template"] == template, (
        "an operator's change stays"
    )


def pause(site: Site) -> None:
    """Let the schedule rest: the tests start what comes next."""
    file = site.llmill.recipe.parent / "prefect.yaml"
    text = file.read_text()
    assert text.count("active: true") == 1
    file.write_text(text.replace("active: true", "active: false"))
    site.type("deploy", str(site.llmill.recipe))


def started(prefect: Prefect) -> list[dict]:
    return [run for run in prefect.runs("small") if run["state_type"] not in ("SCHEDULED", "PENDING")]


def check_page(site: Site, flow_run: str) -> None:
    """The page shows the stages, how far the last one came, and where MLflow has the run."""
    shown = site.prefect.artifacts(flow_run)
    store = Store(site.llmill.home)
    for row in shown["stages"]:
        [artifact] = store.artifacts(row["stage"])
        assert row["fingerprint"] == artifact.fingerprint
        assert row["state"] == ("resumed" if row["stage"] == "export" else "reused")
    assert [row["stage"] for row in shown["stages"]] == list(DEFAULT)
    assert 0 <= shown["progress"] <= 100
    [parent] = parents(site)
    assert f"/#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}?" in shown["links"]


def parents(site: Site) -> list:
    """The runs of pipelines, oldest first."""
    client = site.mlflow
    experiment = client.get_experiment_by_name("small")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]


def check_mlflow(site: Site, flow_run: str) -> None:
    """MLflow has one parent and one child a stage, all of each stage's metrics once, and a way back to Prefect."""
    [parent] = parents(site)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["llmill.prefect_flow_run_id"] == flow_run
    assert parent.data.tags["llmill.prefect_url"].endswith(f"/flow-run/{flow_run}")
    client = site.mlflow
    found = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    children = {run.info.run_name: run for run in found}
    assert len(found) == len(children)
    assert set(children) == set(DEFAULT)
    for stage, child in children.items():
        [artifact] = Store(site.llmill.home).artifacts(stage)
        assert child.info.status == "FINISHED"
        assert artifact.metrics.items() <= child.data.metrics.items()
        assert artifact.manifest["mlflow_run_id"] == child.info.run_id
        assert "llmill.error" not in child.data.tags
    points = client.get_metric_history(children["pretrain"].info.run_id, "train/loss")
    steps = int(children["pretrain"].data.metrics["steps"])
    assert [point.step for point in points] == [step for step in range(1, steps + 1) if is_drawn(step)]


LONG = ["pretrain.tokens=204_800", "pretrain.runtime.checkpoint_every=10"]


def saved(site: Site) -> int:
    """How many checkpoints the unfinished training has saved."""
    return sum(path.read_text().count('"checkpoint"') for path in site.llmill.home.glob(EVENTS))


def in_training(site: Site, flow_run: str, before: int = 0) -> None:
    """Wait until the run has saved a checkpoint, after those that were there before."""
    until(lambda: site.prefect.run(flow_run)["state_type"] == "RUNNING" and saved(site) > before, bool, 300)


def last_step(site: Site) -> int:
    """The last step that the unfinished training has taken."""
    [events] = site.llmill.home.glob(EVENTS)
    return max(event["step"] for event in read_events(events) if event["event"] == "step")


def told(site: Site, seconds: float = 20) -> dict:
    """The last notice, when it is of a run that was stopped."""
    return until(lambda: site.notices, lambda all: all and all[-1]["state"] == "stopped", seconds)[-1]


def statuses(site: Site, flow_run: str) -> set[str]:
    """What MLflow says of the flow run's runs."""
    client = site.mlflow
    experiment = client.get_experiment_by_name("small").experiment_id
    ours = client.search_runs([experiment], f"tags.`llmill.prefect_flow_run_id` = '{flow_run}'")
    return {run.info.status for run in ours}


@pytest.mark.long
def test_a_suspended_run_saves_and_ends_its_ranks_a_cancelled_one_too_and_each_says_so(site: Site):
    """Suspended by a button, resumed by another, cancelled by a third."""
    run = site.prefect.start("small", called="второй 2nd", settings=LONG, note="as long as it takes")
    in_training(site, run)
    suspend(site, run, "Suspended")
    before = saved(site)
    site.prefect.resume(run)
    in_training(site, run, before)
    [partial] = Store(site.llmill.home).unfinished()
    assert '"resume"' in (partial / "logs" / "events.jsonl").read_text()

    tree = site.processes()
    assert "--shutdown-timeout=30" in torchrun(tree).cmdline()  # grace_seconds, uncut
    with held_until_asked(site.processes()):
        site.prefect.cancel(run)
    gone(tree)
    ended = site.prefect.ended(run, 20)
    assert ended["state_type"] == "CANCELLED"
    message = f"pretrain: cancelled in Prefect; step {last_step(site)} is saved"
    assert ended["state"]["message"] == message
    assert message in site.prefect.log(run)
    assert "tokens/s" in site.prefect.log(run), "what the training reports"
    assert ended["name"] == "второй 2nd"
    assert parents(site)[-1].info.run_name == ended["name"]
    assert "as long as it takes" in parents(site)[-1].data.tags["mlflow.note.content"]
    assert told(site)["summary"] == message
    assert "KILLED" in until(lambda: statuses(site, run), lambda all: "RUNNING" not in all, 30)
    with Store(site.llmill.home).lock("pretrain", partial.name.removesuffix(".partial")).acquire(timeout=0):
        pass


def suspend(site: Site, run: str, name: str) -> None:
    """Have Prefect say that the run waits, and see it save and end."""
    tree = site.processes()
    with held_until_asked(site.processes()):
        site.prefect.wait(run, name)
    gone(tree)
    waiting = site.prefect.run(run)
    assert (waiting["state_type"], waiting["state_name"]) == ("PAUSED", "Suspended")
    stages = site.prefect.post("flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [run]}})
    assert not {stage["state_type"] for stage in stages} & {"RUNNING", "PENDING"}
    assert f"step {last_step(site)} is saved" in told(site)["summary"]


def gone(tree: list[psutil.Process], seconds: float = 60) -> None:
    """See all of them end."""
    _, alive = psutil.wait_procs(tree, seconds)
    assert not alive


@pytest.mark.long
def test_a_paused_run_is_suspended_for_nobody_is_left_to_wait(site: Site):
    before = saved(site)
    run = site.prefect.start("small", settings=LONG)
    in_training(site, run, before)
    suspend(site, run, "Paused")
    before = saved(site)
    site.prefect.resume(run)
    in_training(site, run, before)
    with held_until_asked(site.processes()):
        site.prefect.cancel(run)
    assert site.prefect.ended(run, 60)["state_type"] == "CANCELLED"


@pytest.mark.long
def test_a_worker_that_is_stopped_alone_lets_its_run_save(site: Site):
    before = saved(site)
    run = site.prefect.start("small", settings=LONG)
    in_training(site, run, before)
    tree = site.processes()
    worker = psutil.Process(read_services(site.llmill.home).alive("worker llmill").pid)
    with held_until_asked(site.processes()):
        worker.terminate()
    gone([worker, *tree])
    ended = site.prefect.run(run)
    assert ended["state_type"] == "CANCELLED", ended["state"]
    assert ended["state"]["message"] == f"pretrain: stopped by SIGTERM; step {last_step(site)} is saved"
    site.up()


@pytest.mark.long
def test_down_lets_a_run_save_and_says_so_a_killed_one_is_found_and_each_first_retry_goes_on(site: Site):
    before = saved(site)
    run = site.prefect.start("small", settings=LONG)
    in_training(site, run, before)
    tree, name = site.processes(), site.prefect.run(run)["name"]
    with held_until_asked(site.processes()):
        said = site.type("down").stdout
    gone(tree)
    message = f"pretrain: stopped by SIGTERM; step {last_step(site)} is saved"
    assert f"{name} is at work: it saves and ends" in said
    assert f"{name}: {message}" in said
    assert told(site)["summary"] == message
    site.up()
    ended = site.prefect.run(run)
    assert ended["state_type"] == "CANCELLED"
    assert ended["state"]["message"] == message

    before = saved(site)
    site.prefect.retry(run)
    in_training(site, run, before)
    worker = psutil.Process(read_services(site.llmill.home).alive("worker llmill").pid)
    for process in [worker, *worker.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert site.prefect.run(run)["state_type"] == "RUNNING"
    site.up()
    crashed = site.prefect.ended(run, 60)
    assert crashed["state_type"] == "CRASHED"
    until(lambda: statuses(site, run), lambda all: all and "RUNNING" not in all, 60)
    site.prefect.retry(run)
    ended = site.prefect.ended(run, 400)
    assert ended["state_type"] == "COMPLETED", ended["state"]
    steps = [row.step for row in loss_points(site)]
    assert steps == [step for step in range(1, steps[-1] + 1) if is_drawn(step)]


def test_a_run_that_a_worker_had_taken_and_not_begun_waits_for_the_next_worker(site: Site):
    """That of the run before may still be there."""
    worker = psutil.Process(read_services(site.llmill.home).alive("worker llmill").pid)
    earlier = set(worker.children())
    run = site.prefect.start("small", settings=LONG)
    until(
        lambda: site.prefect.run(run)["state_type"] == "PENDING" and set(worker.children()) - earlier,
        bool,
        60,
    )
    children = worker.children()
    worker.terminate()
    gone([worker, *children])
    waiting = site.prefect.run(run)
    site.up()
    assert waiting["state_type"] == "SCHEDULED", waiting["state"]
    until(lambda: site.prefect.run(run)["state_type"], lambda state: state == "RUNNING", 120)
    site.prefect.cancel(run)
    assert site.prefect.ended(run, 60)["state_type"] == "CANCELLED"


def test_what_fails_before_the_first_stage_is_told_to_all(site: Site):
    """The source is gone: the plan can't be made."""
    run = site.prefect.start("small", settings=["download.sources.0.path=/nowhere"])
    ended = site.prefect.ended(run)
    assert ended["state_type"] == "FAILED"
    notice = until(lambda: site.notices, lambda all: all and all[-1]["state"] == "failed", 20)[-1]
    assert "/nowhere" in notice["summary"]
    assert notice["resume"].startswith("llmill run ")
    assert until(lambda: statuses(site, run), bool, 30) == {"FAILED"}
    assert "/nowhere" in site.prefect.log(run)


@pytest.mark.long
def test_a_run_whose_machine_is_gone_is_found_by_prefect_itself_and_can_be_retried(site: Site):
    """Nobody is left to say that the process died; its heartbeats stop."""
    before = saved(site)
    run = site.prefect.start("small", settings=LONG)
    in_training(site, run, before)
    until(lambda: site.prefect.heartbeats(run), bool, 60)
    worker = psutil.Process(read_services(site.llmill.home).alive("worker llmill").pid)
    for process in [worker, *worker.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for note in site.llmill.home.glob("runs/prefect/*.json"):
        note.unlink()
    crashed = site.prefect.ended(run, 240)
    assert crashed["state_type"] == "CRASHED"
    assert "the process that ran this is gone" in crashed["state"]["message"]
    site.up()
    site.prefect.retry(run)
    assert site.prefect.ended(run, 400)["state_type"] == "COMPLETED"


def loss_points(site: Site) -> list:
    """The losses of the newest training, as MLflow has them."""
    newest = Store(site.llmill.home).artifacts("pretrain")[-1]
    return site.mlflow.get_metric_history(newest.manifest["mlflow_run_id"], "train/loss")


def test_a_stages_own_deployment_runs_that_stage_alone(site: Site):
    """And whoever starts it chooses among its parameters, not what the worker executes."""
    site.llmill.run()  # what the stage needs, where no test before made it
    before = set(site.llmill.payloads())
    owned = site.llmill.home / "owned"
    hostile = {"command": f"touch {owned}", "env": {"LLMILL_HOME": str(owned), "PYTHONPATH": str(owned)}}
    run = site.prefect.start(
        "small.evaluate",
        job_variables=hostile,
        config={"evaluate": {OTHERS: {"seed": 5}}},
        home=str(site.llmill.home),
    )
    ended = site.prefect.ended(run)
    assert ended["state_type"] == "COMPLETED", ended["state"]
    assert not owned.exists()
    assert ended["name"].startswith("seed=5 evaluate · ")
    assert [name.partition("/")[0] for name in set(site.llmill.payloads()) - before] == ["evaluate"]
    assert Store(site.llmill.home).artifacts("evaluate")[-1].manifest["config"]["seed"] == 5


def test_neither_server_takes_what_a_foreign_page_has_a_browser_send(site: Site):
    services = read_services(site.llmill.home)
    asks = {
        "prefect": ("api/flows/", {"name": "planted"}),
        "mlflow": ("api/2.0/mlflow/experiments/create", {"name": "planted"}),
    }
    for name, (path, body) in asks.items():
        url = f"{services.url(name)}/{path}"
        for headers in ({"Origin": "https://evil.example"}, {"Host": "10.evil.example"}):
            assert httpx.post(url, json=body, headers=headers).status_code == 403, (name, headers)
        preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        allowed = httpx.options(url, headers=preflight).headers.get("access-control-allow-origin")
        assert allowed is None, name
    assert site.mlflow.get_experiment_by_name("planted") is None


def test_up_ends_what_outlived_mlflows_own_process_and_starts_it_again(site: Site):
    parent = psutil.Process(read_services(site.llmill.home).processes["mlflow"].pid)
    children = parent.children(recursive=True)
    parent.kill()
    until(lambda: read_services(site.llmill.home).alive("mlflow"), lambda alive: alive is None, 60)
    assert [child for child in children if child.is_running()], "it outlives its parent"
    assert "of it remains process" in site.type("status").stdout
    assert "the process of mlflow is gone" in site.up().stdout
    assert not [child for child in children if child.is_running()]
    assert site.mlflow.search_experiments()


def test_servers_are_shown_found_again_and_hide_the_password(site: Site):
    said = site.up().stdout
    assert "PostgreSQL at 127.0.0.1:" in said
    shown = site.type("status").stdout
    for name in ("prefect", "mlflow", "worker llmill"):
        assert f"✓ {name}" in shown
    services = read_services(site.llmill.home)
    assert len(services.processes) == 3
    taken = site.type("up", *site.ports, "--home", str(site.llmill.home / "other"), code=2).stderr
    assert f"port {site.ports[1]} is in use by python" in taken
    kept = [path for path in site.llmill.home.rglob("*") if path.is_file()]
    for secret in (PASSWORD, "secret-hook"):
        assert secret not in said + shown
        assert not [path for path in kept if secret.encode() in path.read_bytes()]
    for process in services.processes.values():
        assert PASSWORD not in " ".join(psutil.Process(process.pid).cmdline())


@pytest.mark.long
def test_the_gpu_pools_worker_trains_and_a_cancel_of_the_pipeline_ends_that_too(site: Site):
    """Two pools and their workers: the pipeline waits in one, what it dispatches runs in the other.

    What fields of the form say arrives there, and is the same as when settings say it.
    """
    site.up("--pool", "llmill", "--pool", GPU_POOL)
    site.type("deploy", str(site.llmill.recipe), "--gpu-pool", GPU_POOL)
    prefect = site.prefect
    assert prefect.get(f"work_pools/{GPU_POOL}")["concurrency_limit"] == 1
    run = prefect.start("small", settings=LONG, config={"pretrain": {"seed": 7, "precision": "fp32"}})
    in_training(site, run, saved(site))
    ours, trainer = site.processes(), site.processes(GPU_POOL)
    assert not any("llm.training.trainer" in " ".join(process.cmdline()) for process in ours)
    assert any("llm.training.trainer" in " ".join(process.cmdline()) for process in trainer)
    with held_until_asked(trainer):
        prefect.cancel(run)
    gone([*ours, *trainer], 120)
    assert prefect.ended(run, 60)["state_type"] == "CANCELLED"
    [stopped] = until(
        lambda: prefect.runs("small.pretrain"), lambda runs: runs[-1]["state_type"] in FINAL, 60
    )
    assert stopped["state_type"] == "CANCELLED"

    prefect.retry(run)
    ended = prefect.ended(run, 300)
    assert ended["state_type"] == "COMPLETED", ended["state"]
    assert [one["state_type"] for one in prefect.runs("small.pretrain")] == ["CANCELLED", "COMPLETED"]
    rows = {row["stage"]: row["state"] for row in prefect.artifacts(run)["stages"]}
    assert {stage for stage, state in rows.items() if state == "dispatched"} == {"pretrain", "evaluate"}
    newest = Store(site.llmill.home).artifacts("pretrain")[-1]
    assert newest.manifest["attempts"] == 2
    assert newest.manifest["config"]["seed"] == 7

    built = Store(site.llmill.home).artifacts("evaluate")[-1]
    settings = [*LONG, "pretrain.seed=7", "pretrain.precision=fp32"]
    forced = prefect.ended(prefect.start("small", settings=settings, stages={"force": "evaluate"}), 300)
    assert forced["state_type"] == "COMPLETED", forced["state"]
    again = Store(site.llmill.home).get("evaluate", built.fingerprint)
    assert again
    assert again.manifest["finished"] > built.manifest["finished"], "it was built again where it is built"
