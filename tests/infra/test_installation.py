"""The servers of the compose file as processes of this machine, on a real PostgreSQL and a server of S3's protocol."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
import httpx
import psycopg2
import pytest
import yaml
from command_line import Llmill
from conftest import RECIPE
from known_names import INFRA
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer
from postgres import PASSWORD, postgres

from flows.engine.ports import free_port
from flows.engine.services import GPU_POOL, POOL
from flows.prefect.up import DATABASES, end_tree

pytestmark = pytest.mark.long
SERVICES = yaml.safe_load((INFRA / "compose/compose.yaml").read_text())["services"]
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret-of-s3"}
SECONDS = 180


@dataclass
class Installation:
    """Services of the compose file, as processes of this machine."""

    folder: Path
    places: dict[str, str]
    """NAME:PORT in the compose file -> host:port here."""

    def here(self, text: str) -> str:
        for name, place in self.places.items():
            text = text.replace(name, place)
        return text

    def environment(self, service: str) -> dict[str, str]:
        """The service's own variables and secrets, besides what any process here has."""
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))
        }
        given = {name: self.here(value) for name, value in SERVICES[service]["environment"].items()}
        wanted = [secret["target"] for secret in SERVICES[service].get("secrets", [])]
        secrets = {name: {**KEYS, "PGPASSWORD": PASSWORD}[name] for name in wanted}
        return {**clean, "PREFECT_HOME": str(self.folder / "prefect"), **given, **secrets}

    def command(self, service: str) -> list[str]:
        """The service's own command, on loopback and on the ports here."""
        program, *words = SERVICES[service]["command"]
        if program == "python" and words[0] != "-m":
            return [sys.executable, str(INFRA / Path(words[0]).name), *words[1:]]
        port = self.places.get(f"{service}:{words[words.index('--port') + 1]}", "").rpartition(":")[2]
        words[words.index("--port") + 1] = port
        words[words.index("--host") + 1] = "127.0.0.1"
        return [sys.executable, *([] if program == "python" else ["-m", program]), *words]

    def job(self, service: str) -> str:
        """Run a service that ends; what it printed."""
        done = subprocess.run(
            self.command(service), env=self.environment(service), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def server(self, service: str) -> Iterator[None]:
        """A service that stays for as long as the block lasts."""
        with open(self.folder / f"{service}.log", "wb") as log:
            command, environment = self.command(service), self.environment(service)
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.folder)
        try:
            yield
        finally:
            end_tree(process.pid)
            process.wait()

    def healthy(self, service: str) -> None:
        """Return when the service's own health check holds."""
        check = SERVICES[service]["healthcheck"]["test"]
        program = [
            sys.executable,
            "-c",
            self.here(check[-1]).replace("127.0.0.1:4200", self.places["prefect:4200"]),
        ]
        program[-1] = program[-1].replace("127.0.0.1:5000", self.places["mlflow:5000"])
        deadline = time.monotonic() + SECONDS
        while subprocess.run(program, capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, (self.folder / f"{service}.log").read_text()
            time.sleep(0.3)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("installation")
    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    with ExitStack() as stack:
        database = stack.enter_context(postgres()).rpartition("@")[2]
        store.start()
        stack.callback(store.stop)
        places = {
            "postgres:5432": database,
            "s3:8333": "127.0.0.1:{1}".format(*store.get_host_and_port()),
            "prefect:4200": f"127.0.0.1:{free_port()}",
            "mlflow:5000": f"127.0.0.1:{free_port()}",
        }
        installed = Installation(folder, places)
        installed.job("storage")
        for service in ("prefect", "mlflow"):
            stack.enter_context(installed.server(service))
        for service in ("prefect", "mlflow"):
            installed.healthy(service)
        yield installed


def test_the_jobs_make_databases_bucket_and_pools_and_leave_what_is_there(installation: Installation) -> None:
    for _ in range(2):
        assert "bucket: llmill" in installation.job("storage")
        assert f"work pools: {POOL}, {GPU_POOL}" in installation.job("pools")
    place = installation.places["postgres:5432"]
    with psycopg2.connect(f"postgresql://llmill:{PASSWORD}@{place}/postgres") as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT datname FROM pg_database")
        assert set(DATABASES.values()) <= {row[0] for row in cursor.fetchall()}


def test_mlflows_pages_open_in_the_mode_for_training(installation: Installation) -> None:
    page = httpx.get(f"http://{installation.places['mlflow:5000']}/").raise_for_status().text
    assert "mlflow.workflowType" in page


def test_a_run_with_a_workers_variables_is_told_and_its_files_lie_in_the_bucket(
    installation: Installation, corpus: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE.format(corpus=corpus))
    given = SERVICES["cpu"]["environment"]
    told = {name: installation.here(value) for name, value in given.items() if name != "LLMILL_HOME"}
    result = Llmill(tmp_path / "home", recipe).afresh("run", str(recipe), "--only", "download", **told)
    assert result.stderr == ""
    client = MlflowClient(told["MLFLOW_TRACKING_URI"])
    [experiment] = client.search_experiments(filter_string="name = 'small'")
    assert {run.info.status for run in client.search_runs([experiment.experiment_id])} == {"FINISHED"}
    place = f"http://{installation.places['s3:8333']}"
    store = boto3.client("s3", endpoint_url=place, region_name="us-east-1",
                         aws_access_key_id="key", aws_secret_access_key="secret-of-s3")  # fmt: skip
    kept = [entry["Key"] for entry in store.list_objects_v2(Bucket="llmill")["Contents"]]
    assert any(key.endswith("manifest.json") for key in kept), kept
