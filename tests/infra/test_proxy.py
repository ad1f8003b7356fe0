"""nginx with the configuration of the compose file: TLS and a password in front of real servers."""

from __future__ import annotations

import base64
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crossplane
import pytest
import yaml
from command_line import Llmill
from conftest import RECIPE
from known_names import INFRA

from flows.engine.ports import free_port
from flows.prefect.up import end_tree

SERVICES = yaml.safe_load((INFRA / "compose/compose.yaml").read_text())["services"]
NGINX = INFRA / "compose/nginx.conf"
SECONDS = 90


@dataclass
class Proxy:
    """nginx in front of both servers."""

    prefect: str
    mlflow: str
    certificate: Path
    login: str

    def client(self) -> dict[str, str]:
        """The variables that docs/infra.md tells clients to set."""
        user, _, password = self.login.partition(":")
        return {
            "PREFECT_API_URL": f"{self.prefect}/api",
            "PREFECT_API_AUTH_STRING": self.login,
            "MLFLOW_TRACKING_URI": self.mlflow,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password,
            "SSL_CERT_FILE": str(self.certificate),
            "REQUESTS_CA_BUNDLE": str(self.certificate),
        }

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.certificate)

    def ask(
        self, url: str, login: str = "", body: Any = None, headers: Mapping[str, str] = {}
    ) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        basic = {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}
        data = None if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data, {**kind, **basic, **headers})
        try:
            with urllib.request.urlopen(request, context=self.trust(), timeout=20) as answer:
                text = answer.read().decode()
                return answer.status, json.loads(text) if text[:1] in ("{", "[") else text
        except urllib.error.HTTPError as error:
            return error.code, None


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of an MLflow server that was told what compose tells it, but for where it keeps things."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    given = SERVICES["mlflow"]["environment"].items()
    told = {
        **{name: value.replace("mlflow:5000", f"127.0.0.1:{port}") for name, value in given},
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_ARTIFACTS_DESTINATION": str(folder / "artifacts"),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "https://localhost:5443",  # LLMILL_MLFLOW_URL
    }
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **told}, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", lambda: (folder / "log").read_text())
        yield f"127.0.0.1:{port}"
    finally:
        end_tree(process.pid)
        process.wait()


def wait_for(url: str, said: Callable[[], str], trust: ssl.SSLContext | None = None) -> None:
    """Return when something answers there."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            urllib.request.urlopen(url, context=trust, timeout=20).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            assert time.monotonic() < deadline, said()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def proxy(
    prefect_server: str, mlflow_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    program = shutil.which("nginx") or pytest.skip("nginx is not installed here")
    folder = tmp_path_factory.mktemp("proxy")
    shutil.copy(INFRA / "compose/secrets.sh", folder)
    subprocess.run(["sh", folder / "secrets.sh"], check=True)
    ports = {"4443": free_port(), "5443": free_port()}
    places = {"prefect:4200": prefect_server.split("/")[2], "mlflow:5000": mlflow_server}
    text = moved(NGINX.read_text(), folder, places, ports)
    (folder / "nginx.conf").write_text(text)
    more = "daemon off;" + (" user root;" if os.getuid() == 0 else "")
    process = subprocess.Popen([program, "-c", folder / "nginx.conf", "-g", more])
    urls = [f"https://localhost:{port}" for port in ports.values()]
    found = Proxy(*urls, folder / "secrets/tls_certificate", (folder / "secrets/login").read_text())
    try:
        wait_for(urls[0], lambda: (folder / "error.log").read_text(), found.trust())
        yield found
    finally:
        process.terminate()
        process.wait()


def moved(text: str, folder: Path, places: Mapping[str, str], ports: Mapping[str, int]) -> str:
    """The configuration with files, servers and ports of this machine in place of the containers'."""
    for name, place in places.items():
        text = text.replace(name, place)
    for listed, port in ports.items():
        text = text.replace(f"listen {listed}", f"listen 127.0.0.1:{port}")
    text = text.replace("/run/secrets", f"{folder}/secrets").replace("/tmp/nginx", f"{folder}/nginx")
    return text.replace("/dev/stderr", f"{folder}/error.log")


def test_nginxs_configuration_is_valid() -> None:
    parsed = crossplane.parse(str(NGINX))
    assert (parsed["status"], parsed["errors"]) == ("ok", [])
    [http] = [block for block in parsed["config"][0]["parsed"] if block["directive"] == "http"]
    served = [block for block in http["block"] if block["directive"] == "server"]
    listened = [
        line["args"] for server in served for line in server["block"] if line["directive"] == "listen"
    ]
    assert listened == [["4443", "ssl"], ["5443", "ssl"]]
    asked = {line["directive"]: line["args"] for line in http["block"]}
    assert asked["auth_basic"] == ["llmill"]
    published = [port.rpartition(":")[2] for port in SERVICES["proxy"]["ports"]]
    assert published == [port for port, _ in listened]
    secrets = {f"/run/secrets/{name}" for name in SERVICES["proxy"]["secrets"]}
    assert {
        asked[name][0] for name in ("ssl_certificate", "ssl_certificate_key", "auth_basic_user_file")
    } == secrets


def test_without_the_password_nobody_gets_through(proxy: Proxy) -> None:
    for login in ("", "llmill:wrong", "root:" + proxy.login.partition(":")[2]):
        for url in (proxy.prefect, f"{proxy.prefect}/api/health", proxy.mlflow, f"{proxy.mlflow}/health"):
            assert proxy.ask(url, login) == (401, None)
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(proxy.prefect, timeout=20)


def test_browsers_get_through_with_it(proxy: Proxy) -> None:
    assert proxy.ask(f"{proxy.prefect}/api/health", proxy.login) == (200, "true")
    search = f"{proxy.mlflow}/ajax-api/2.0/mlflow/experiments/search"
    own = {"Origin": "https://localhost:5443"}
    assert proxy.ask(search, proxy.login, {"max_results": 1}, own)[0] == 200


def test_a_run_tells_both_servers_over_tls(proxy: Proxy, corpus: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "guarded.yaml"
    recipe.write_text(RECIPE.format(corpus=corpus).replace("name: small", "name: guarded"))
    command = ["run", str(recipe), "--to", "download"]
    result = Llmill(tmp_path / "home", recipe).afresh(*command, **proxy.client())
    assert result.stderr == ""
    assert "does not answer" not in result.stdout
    mine = {"flow_runs": {"tags": {"all_": ["guarded"]}}}
    flows = proxy.ask(f"{proxy.prefect}/api/flow_runs/filter", proxy.login, mine)[1]
    assert [run["state_type"] for run in flows] == ["COMPLETED"] * 2
    tasks = proxy.ask(f"{proxy.prefect}/api/task_runs/filter", proxy.login, mine)[1]  # told over a WebSocket
    assert {task["state_type"] for task in tasks} == {"COMPLETED"}
    api = f"{proxy.mlflow}/api/2.0/mlflow"
    by_name = f"{api}/experiments/get-by-name?experiment_name=guarded"
    experiment = proxy.ask(by_name, proxy.login)[1]["experiment"]["experiment_id"]
    runs = proxy.ask(f"{api}/runs/search", proxy.login, {"experiment_ids": [experiment]})[1]["runs"]
    assert [run["info"]["status"] for run in runs] == ["FINISHED"] * 2
