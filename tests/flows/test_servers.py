"""The Prefect server of a home: one for all its runs, stopped by the last, found again after a kill."""

import asyncio
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

from flows.engine.ports import answers
from flows.prefect.servers import PrefectServer

USER = """
import sys, pathlib
from flows.prefect.servers import PrefectServer
with PrefectServer(pathlib.Path(sys.argv[1])) as server:
    server.wait()
    print("up", flush=True)
    sys.stdin.read()
"""


def use(home: Path) -> subprocess.Popen[str]:
    """A process that uses the server of ``home`` until its standard input is closed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    user = subprocess.Popen(
        [sys.executable, "-c", USER, str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert user.stdout is not None
    assert user.stdout.readline() == "up\n"
    return user


def leave(user: subprocess.Popen[str]) -> None:
    user.communicate()
    assert user.returncode == 0


def state(home: Path) -> dict:
    return json.loads((home / "prefect" / "server.json").read_text())


def test_runs_share_one_server_and_the_last_one_stops_it(tmp_path):
    first = use(tmp_path)
    server = state(tmp_path)
    second = use(tmp_path)
    assert state(tmp_path) == server
    leave(first)
    assert answers(server["url"])
    leave(second)
    assert not answers(server["url"])
    assert not psutil.pid_exists(server["pid"])

    killed = use(tmp_path)
    orphan = state(tmp_path)
    killed.kill()
    killed.wait()
    assert answers(orphan["url"]), "the server outlives a run that was killed alone"
    last = use(tmp_path)
    assert state(tmp_path) == orphan
    leave(last)
    assert not answers(orphan["url"])


def test_a_server_that_the_environment_names_is_used_and_nothing_is_started(
    tmp_path, monkeypatch, prefect_server
):
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    with PrefectServer(tmp_path) as server:
        server.wait()
        assert not server.absent
        assert os.environ["PREFECT_API_URL"] == prefect_server
    assert not (tmp_path / "prefect").exists()


def test_clients_that_all_write_are_neither_refused_nor_held_up(tmp_path):
    """Prefect's own server refuses two in three of what four such clients ask."""
    user = use(tmp_path)
    url = state(tmp_path)["url"]
    with httpx.Client(base_url=url, timeout=120) as client:
        flow = client.post("/flows/", json={"name": "busy"}).json()
        run = client.post("/flow_runs/", json={"flow_id": flow["id"]}).json()

    fresh = httpx.Limits(max_keepalive_connections=0)  # who is held up himself may meet a server that hung up

    def write(number: int) -> set[int]:
        with httpx.Client(base_url=url, timeout=120, limits=fresh) as client:
            name = {"flow_run_id": run["id"], "task_key": str(number)}
            return {
                client.post("/task_runs/", json={**name, "dynamic_key": str(n)}).status_code
                for n in range(30)
            }

    with ThreadPoolExecutor(4) as pool:
        assert set.union(*pool.map(write, range(4))) == {201}
    leave(user)


def test_what_reads_within_a_transaction_does_not_wait_for_it(tmp_path):
    """Nor does what was started there, which keeps the context long after the transaction has ended."""
    from sqlalchemy import text

    from flows.prefect.server import OneWriter

    async def read_within() -> list[int]:
        database = OneWriter(connection_url=f"sqlite+aiosqlite:///{tmp_path}/a.db", timeout=1)
        engine = await database.engine()

        async def read() -> int:
            async with await database.session(engine) as session:
                await session.execute(text("PRAGMA busy_timeout = 1000"))
                return (await session.execute(text("SELECT count(*) FROM t"))).scalar_one()

        async with await database.session(engine) as writer, database.begin_transaction(writer):
            await writer.execute(text("CREATE TABLE t (n INTEGER)"))
        async with await database.session(engine) as writer, database.begin_transaction(writer):
            await writer.execute(text("INSERT INTO t VALUES (1)"))
            seen = [await read(), await asyncio.create_task(read())]
        return [*seen, await read()]

    assert asyncio.run(read_within()) == [0, 0, 1]
