"""Requests that pages of other sites have a browser send: no server of llmill takes them."""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import urlsplit

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from flows.prefect.own_pages import OwnPages, own_names
from flows.prefect.pools import COMMAND, make_ready
from flows.prefect.up import Up, Wanted

FOREIGN = [
    "https://evil.example",
    "null",
    "http://127.0.0.1:1",
    "http://localhost.evil.example:{port}",
    "file://",
]


def own(api: str) -> tuple[str, int]:
    """The origin of a Prefect server's pages, and its port."""
    parts = urlsplit(api)
    return f"http://{parts.netloc}", parts.port or 0


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_foreign_page_gets_no_leave_and_its_requests_do_nothing(prefect_server, origin):
    foreign = origin.format(port=own(prefect_server)[1])
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    preflight = httpx.options(f"{prefect_server}/flows/", headers={"Origin": foreign, **asks})
    assert preflight.status_code == 403
    assert "access-control-allow-origin" not in preflight.headers
    name = f"planted by {foreign}"
    for kind in ("application/json", "text/plain", ""):
        headers = {"Origin": foreign, **({"Content-Type": kind} if kind else {})}
        planted = httpx.post(f"{prefect_server}/flows/", content=f'{{"name": "{name}"}}', headers=headers)
        assert planted.status_code == 403, kind
    found = httpx.post(f"{prefect_server}/flows/filter", json={"flows": {"name": {"any_": [name]}}})
    assert found.json() == []
    with pytest.raises(InvalidStatus, match="403"):
        connect(prefect_server.replace("http:", "ws:") + "/events/in", origin=foreign)


def test_the_servers_own_page_and_programs_are_taken(prefect_server):
    origin, port = own(prefect_server)
    for name in (origin, f"http://localhost:{port}", None):
        headers = {"Origin": name} if name else {}
        assert httpx.post(f"{prefect_server}/flows/filter", json={}, headers=headers).status_code == 200
    with connect(prefect_server.replace("http:", "ws:") + "/events/in", origin=origin):
        pass


def test_the_pages_ask_where_they_were_opened(prefect_server):
    origin, _ = own(prefect_server)
    assert httpx.get(f"{origin}/ui-settings").json()["api_url"] == "/api"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.", "[::1", ""])
def test_a_name_that_was_bent_to_this_machine_is_refused(prefect_server, host):
    refused = httpx.post(f"{prefect_server}/flows/filter", json={}, headers={"Host": host})
    assert refused.status_code in (400, 403)
    if refused.status_code == 403:
        assert "--allow-host" in refused.text


def test_a_proxys_origin_and_names_that_were_given_are_its_own():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    guarded = OwnPages(app, [*own_names("127.0.0.1"), "prefect"], ["https://llm.example:4443"])

    async def ask(host: str, origin: str | None) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded)) as client:
            headers = {"Host": host, **({"Origin": origin} if origin else {})}
            return (await client.post("http://server/api", headers=headers)).status_code

    taken = [
        ("prefect:4200", "https://llm.example:4443"),  # by a proxy that sends its own name for the server
        ("llm.example:4443", "https://llm.example:4443"),  # by one that passes the browser's on
        ("10.1.2.3:4200", "http://10.1.2.3:4200"),
        ("prefect:4200", None),
        ("[::1]:4200", None),
    ]
    refused = [
        ("prefect:4200", "https://llm.example"),
        ("llm.example.evil:4443", None),
        ("10.evil.example", None),
    ]
    assert [asyncio.run(ask(*request)) for request in taken] == [204] * len(taken)
    assert [asyncio.run(ask(*request)) for request in refused] == [403] * len(refused)


def test_a_server_that_listens_everywhere_is_known_by_the_names_of_its_machine():
    assert {socket.gethostname(), "127.0.0.1", "localhost"} <= set(own_names("0.0.0.0"))
    assert socket.gethostname() not in own_names("127.0.0.1")


def test_mlflow_is_told_the_same_names_and_takes_none_that_only_begin_like_an_address(tmp_path):
    _, environment, _ = Up(tmp_path, Wanted(allow_hosts=("gpu-box",)), print)._mlflow()
    hosts = environment["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert set(hosts) == {"127.0.0.1:5000", "localhost:5000", "[::1]:5000", "gpu-box:5000"}
    assert not any("*" in host for host in hosts)


def test_no_flow_run_chooses_what_a_worker_executes(prefect_server):
    """Neither in a pool that is new, nor in one made by Prefect's own template; an operator's command stays."""
    defaults = ProcessWorker.get_default_base_job_template()
    nice = {**defaults, "job_configuration": {**defaults["job_configuration"], "command": "nice python"}}
    with temporary_settings({PREFECT_API_URL: prefect_server}), get_client(sync_client=True) as client:
        for name, template in {"old": defaults, "operators": nice}.items():
            client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
        for _ in range(2):
            make_ready(prefect_server, ["new", "old", "operators"])
        hostile = {"command": "touch owned", "env": {"LD_PRELOAD": "/tmp/evil.so"}, "working_dir": "/work"}
        for name, command in {"new": COMMAND, "old": COMMAND, "operators": "nice python"}.items():
            template = client.read_work_pool(name).base_job_template
            job = asyncio.run(ProcessJobConfiguration.from_template_and_values(template, hostile))
            assert (job.command, job.env, str(job.working_dir)) == (command, {}, "/work")
