"""Start and end the servers that a home keeps up: Prefect's, MLflow's, and workers that carry out what is scheduled.

``llmill up`` starts what is missing, ``llmill down`` ends exactly that; ``servers.json`` in the home says what there
is. All listen on loopback by default. Without them, a run brings its own Prefect server
(`flows.prefect.servers`).
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from filelock import FileLock

from data_pipeline.core.errors import UserError
from data_pipeline.core.text import last_lines
from flows.engine.ports import healthy, listener, reachable
from flows.engine.services import (
    MARK,
    MLFLOW,
    POOL,
    PREFECT,
    Running,
    Services,
    place,
    prefect_home,
    read_services,
    sqlite_url,
    write,
)
from flows.listeners.mlflow.links import OWN_PAGES
from flows.prefect.own_pages import own_names
from flows.prefect.run_notes import Note, read_notes
from flows.prefect.servers import PrefectServer, client_settings

START_SECONDS = 180
STOP_SECONDS = 40
DATABASES = {PREFECT: "llmill_prefect", MLFLOW: "llmill_mlflow"}


@dataclass(frozen=True)
class Wanted:
    """The options of `up`."""

    host: str = "127.0.0.1"
    prefect_port: int = 4200
    mlflow_port: int = 5000
    pools: Sequence[str] = (POOL,)
    postgres: str = ""
    allow_hosts: Sequence[str] = ()
    """Other names by which browsers and clients reach the servers, besides ``host`` and this machine's own."""


class Up:
    """Starts what is missing of a home's servers."""

    def __init__(self, home: Path, wanted: Wanted, report: Callable[[str], None]) -> None:
        self.home, self.wanted, self.report = home.resolve(), wanted, report
        self.folder = place(self.home).parent
        self.services = Services()
        self._started: list[str] = []
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> Services:
        """Start what does not run yet, and return when all answer.

        Raises:
            UserError: a port is in use, the database can't be reached, or the home is used in another way.
            RuntimeError: a server did not come up; what this call had started is ended again.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "up.lock"):
            self.services = read_services(self.home)
            self._end_remains()
            self._check()
            try:
                self._start_servers()
                self._settle()
                self._start_workers()
            except BaseException:
                stop(self.home, self._started)
                raise
        return self.services

    def _end_remains(self) -> None:
        """End what outlived the process that it came out of: it answers to nobody, and may hold a port."""
        for name, running in self.services.processes.items():
            remains = [] if running.alive else running.family()
            if remains:
                self.report(
                    f"the process of {name} is gone; what it had started ends too ({numbers(remains)})"
                )
                end(remains)

    def _check(self) -> None:
        """See that nothing stands in the way, before anything is started."""
        missing = [name for name in (PREFECT, MLFLOW) if not self.services.alive(name)]
        if len(missing) < 2 and self.wanted.postgres and self.services.database == "SQLite":
            raise UserError("the servers of this home are up, on SQLite; end them first: llmill down")
        if not self.wanted.postgres and self.services.database != "SQLite" and missing:
            raise UserError(
                f"the runs of this home are in {self.services.database}: give --postgres, or set LLMILL_POSTGRES"
            )
        if PREFECT in missing and (own := of_a_run(self.home)):
            raise UserError(
                f"a run in this home has a Prefect server of its own (process {own}); try again when it has ended"
            )
        for name in missing:
            port = self.wanted.prefect_port if name == PREFECT else self.wanted.mlflow_port
            if who := listener(self.wanted.host, port):
                raise UserError(
                    f"port {port} is in use by {who}; end that, or choose another: llmill up --{name}-port N"
                )

    def _start_servers(self) -> None:
        database = prepare_postgres(self.wanted.postgres) if self.wanted.postgres else "SQLite"
        self.services = replace(self.services, database=database)
        commands = {PREFECT: self._prefect, MLFLOW: self._mlflow}
        for name, command in commands.items():
            if not self.services.alive(name):
                self._spawn(name, *command())
        for name in commands:
            self._wait(name)

    def _prefect(self) -> tuple[list[str], dict[str, str], str]:
        """Command, environment and address of the Prefect server."""
        host, port = self.wanted.host, self.wanted.prefect_port
        environment = prefect_home(self.home / "prefect") | {"PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        if self.wanted.postgres:
            url = database_url(self.wanted.postgres, DATABASES[PREFECT], "postgresql+asyncpg")
            environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = url
        names = [word for name in self.wanted.allow_hosts for word in ("--allow-host", name)]
        command = ["-m", "flows.prefect.server", "--host", host, "--port", str(port), *names]
        return command, environment, f"http://{reachable(host)}:{port}"

    def _mlflow(self) -> tuple[list[str], dict[str, str], str]:
        """Command, environment and address of the MLflow server."""
        host, port = self.wanted.host, self.wanted.mlflow_port
        store = sqlite_url(self.home / "mlflow.db")
        if self.wanted.postgres:
            store = database_url(self.wanted.postgres, DATABASES[MLFLOW], "postgresql")
        names = [*own_names(host), *self.wanted.allow_hosts]
        environment = {
            "MLFLOW_BACKEND_STORE_URI": store,  # not among the arguments, which every user of the machine sees
            # Its own default takes each name that begins as a private address does, such as 10.example.com.
            "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(f"{name}:{port}" for name in names),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_LOGGING_LEVEL": "WARNING",
        }
        artifacts = ["--artifacts-destination", str(self.home / "mlartifacts")]
        command = [
            "-m",
            "mlflow",
            "server",
            "--host",
            host,
            "--port",
            str(port),
            "--workers",
            "1",
            *OWN_PAGES,
            *artifacts,
        ]
        return command, environment, f"http://{reachable(host)}:{port}"

    def _start_workers(self) -> None:
        """A worker for each pool that has none here, once the pool is there."""
        names = {pool: f"worker {pool}" for pool in self.wanted.pools}
        missing = [pool for pool in names if not self.services.alive(names[pool])]
        if not missing:
            return
        from flows.prefect.pools import make_ready, wait_for_worker

        api = f"{self.services.processes[PREFECT].url}/api"
        make_ready(api, self.wanted.pools)
        since = time.time()
        for pool in missing:
            self._spawn(names[pool], *self._worker(pool))
        for pool in missing:
            self.report(f"waiting for the worker of pool {pool}")
            wait_for_worker(api, pool, since, partial(self._see_alive, names[pool]))

    def _settle(self) -> None:
        """Have runs whose process died be known as crashed, before a worker starts others."""
        from prefect.settings import PREFECT_API_URL, temporary_settings

        from flows.prefect.flow_runs import settle

        with temporary_settings({PREFECT_API_URL: f"{self.services.processes[PREFECT].url}/api"}):
            settle(self.home)

    def _worker(self, pool: str) -> tuple[list[str], dict[str, str], str]:
        name = f"{pool}@{socket.gethostname()}"
        command = ["-m", "flows.cli.main", "worker", "--pool", pool, "--name", name]
        return command, self.client_environment(), ""

    def client_environment(self) -> dict[str, str]:
        """Return the variables that a process needs to use these servers as a run does."""

        api = f"{self.services.processes[PREFECT].url}/api"
        return {
            **client_settings(api),
            "PREFECT_API_URL": api,
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_WORKER_QUERY_SECONDS": "3",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "MLFLOW_TRACKING_URI": self.services.processes[MLFLOW].url,
            "LLMILL_HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def _spawn(self, name: str, command: Sequence[str], environment: Mapping[str, str], url: str) -> None:
        """Start a process that outlives us and our terminal, and note it before anything else happens."""
        log = self.folder / f"{name.replace(' ', '-')}.log"
        mark = f"{name} {secrets.token_hex(8)}"
        inherited = {key: value for key, value in os.environ.items() if key not in ("PREFECT_API_URL",)}
        with open(log, "ab") as output:
            child = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**inherited, **environment, MARK: mark},
                start_new_session=True,
            )
        self._children[name] = child
        self._started.append(name)
        running = Running(
            pid=child.pid,
            created=psutil.Process(child.pid).create_time(),
            url=url,
            log=str(log),
            mark=mark,
        )
        self.services = replace(self.services, processes={**self.services.processes, name: running})
        write(self.home, self.services)

    def _wait(self, name: str) -> None:
        url = self.services.processes[name].url
        if name in self._started:
            self.report(f"waiting for {name} at {url}")
        deadline = time.monotonic() + START_SECONDS
        health = f"{url}/api/health" if name == PREFECT else f"{url}/health"
        while not healthy(health):
            self._see_alive(name)
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not answer at {url}; {self._end_of_log(name)}")
            time.sleep(0.1)

    def _see_alive(self, name: str) -> None:
        child = self._children.get(name)
        if child and child.poll() is not None:
            raise RuntimeError(f"{name} ended with exit code {child.returncode}; {self._end_of_log(name)}")

    def _end_of_log(self, name: str) -> str:
        log = Path(self.services.processes[name].log)
        return f"the end of {log}:\n{last_lines(log.read_text(errors='replace'))}"


def stop(
    home: Path, names: Sequence[str] | None = None, report: Callable[[str], None] = lambda text: None
) -> list[str]:
    """End the home's servers (of these names), workers first, and forget them; the names of those that were alive.

    Runs at work under a worker save first, for as long as they need; ``report`` gets them, and what they saved.
    """
    services = read_services(home)
    chosen = [name for name in services.processes if names is None or name in names]
    order = sorted(chosen, key=lambda name: name in (PREFECT, MLFLOW))
    families = {name: services.processes[name].family() for name in order}
    ended = [name for name in order if families[name]]
    workers = [name for name in ended if name not in (PREFECT, MLFLOW)]
    end_workers(home, [services.processes[name].pid for name in workers if services.alive(name)], report)
    for name in ended:
        end([*families[name], *services.processes[name].family()], first=services.processes[name].pid)
    left = {name: entry for name, entry in services.processes.items() if name not in chosen}
    if services.database != "SQLite":  # where its runs are must not be forgotten
        left |= {name: services.processes[name] for name in chosen if name in (PREFECT, MLFLOW)}
    if left:
        write(home, replace(services, processes=left))
    else:
        place(home).unlink(missing_ok=True)
    return ended


def end_workers(home: Path, pids: Sequence[int], report: Callable[[str], None]) -> None:
    """Ask all workers to end at once, for a run of one may wait for a run of another, and wait until they have."""
    family: dict[int, psutil.Process] = {}
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            worker = psutil.Process(pid)
            family |= {one.pid: one for one in (worker, *worker.children(recursive=True))}
    at_work = [note for note in read_notes(home) if note.at_work and note.pid in family]
    for note in at_work:
        report(f"{note.name} is at work: it saves and ends, which may take {note.seconds:.0f} s")
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    patience = max((note.seconds for note in at_work), default=0.0)
    psutil.wait_procs(list(family.values()), patience + STOP_SECONDS)
    for note in at_work:
        report(f"{note.name}: {outcome(note)}")


def outcome(note: Note) -> str:
    """Describe what became of a run that was asked to end."""
    found = next((now for now in read_notes(note.file.parents[2]) if now.file == note.file), None)
    if found is None or found.final == "completed":
        return "completed"
    return found.message or (found.final or "it was ended by force; what it had saved before is kept")


def end_tree(pid: int) -> None:
    """Ask a process to end, and see that all that it had started ends with it."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        end([process, *process.children(recursive=True)], first=pid)


def end(family: Sequence[psutil.Process], first: int = 0) -> None:
    """Ask the first of these processes to end (all, where it is not among them), and see that all do."""
    leading = [process for process in family if process.pid == first] or family
    for process in leading:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, STOP_SECONDS)
    for survivor in alive:
        survivor.kill()
    psutil.wait_procs(alive, 5)


def of_a_run(home: Path) -> int | None:
    """The process of a Prefect server that a run at work in this home has brought."""

    server = PrefectServer(home)
    return json.loads(server.state.read_text())["pid"] if server.running() else None


def database_url(server: str, database: str, scheme: str) -> str:
    """The address of one database on the server that ``--postgres`` names."""
    parts = urlsplit(server)
    return parts._replace(scheme=scheme, path=f"/{database}").geturl()


def prepare_postgres(server: str) -> str:
    """Make the two databases where they are missing; where the server is, for people.

    Raises:
        UserError: it is no address of PostgreSQL, its driver is not installed, or it can't be reached.
    """
    parts = urlsplit(server)
    if parts.scheme not in ("postgresql", "postgres") or not parts.hostname:
        raise UserError("--postgres: write it as postgresql://USER:PASSWORD@HOST:PORT")
    where = f"PostgreSQL at {parts.hostname}:{parts.port or 5432}"
    try:
        import psycopg2
    except ImportError:
        raise UserError(
            "--postgres needs a driver that is not installed: pip install 'llmill[postgres]'"
        ) from None
    try:
        admin = psycopg2.connect(
            parts._replace(scheme="postgresql", path=parts.path.rstrip("/") or "/postgres").geturl()
        )
        admin.autocommit = True
        with admin.cursor() as cursor:
            for database in DATABASES.values():
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,))
                if not cursor.fetchone():
                    cursor.execute(f'CREATE DATABASE "{database}"')
        admin.close()
    except psycopg2.Error as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--postgres: {where}: {reason.replace(parts.password or chr(0), '***')}") from None
    return where


def numbers(family: Sequence[psutil.Process]) -> str:
    return f"process {', '.join(str(process.pid) for process in family)}"


def described(services: Services) -> list[dict[str, Any]]:
    """One row a process, for `llmill status`; ``remains`` are what outlived one that is down."""
    rows = []
    for name, running in services.processes.items():
        remains = [] if running.alive else [process.pid for process in running.family()]
        state = "up" if running.alive else "down"
        rows.append(
            {"name": name, "state": state, "url": running.url, "pid": running.pid, "remains": remains}
        )
    return rows
