"""The servers that a home's runs are seen by."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.core.errors import UserError
from flows.cli.options import HOME, Home, announce, at_home, stoppable, writable
from flows.engine.services import POOL
from flows.listeners.mlflow.links import OWN_PAGES, tracking_uri, without_user
from flows.listeners.mlflow.moved import follow_home
from flows.prefect.servers import CLIENT_SETTINGS
from flows.prefect.up import Up, Wanted, described, stop

MOST_VIEWS = 5


def up(
    home: Home = HOME,
    postgres: Annotated[
        str,
        typer.Option(
            envvar="LLMILL_POSTGRES",
            show_envvar=True,
            metavar="URL",
            help="Keep both servers' data there, in two databases; else in SQLite.",
        ),
    ] = "",
    pool: Annotated[
        list[str] | None, typer.Option(help="Start a worker for this work pool; repeatable.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; loopback by default.")] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name by which browsers reach this machine; repeatable."),
    ] = None,
    prefect_port: Annotated[int, typer.Option(min=1, max=65535)] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Start Prefect, MLflow and a worker for this home, to stay; llmill down ends them."""
    announce("looking what is up")
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    from flows.listeners.terminal import Terminal

    writable(home)
    follow_home(home)
    terminal = Terminal()
    wanted = Wanted(
        host=host,
        prefect_port=prefect_port,
        mlflow_port=mlflow_port,
        pools=tuple(pool or (POOL,)),
        postgres=postgres,
        allow_hosts=tuple(allow_host or ()),
    )
    with stoppable("stopped; what was started is ended again"):
        services = Up(home, wanted, terminal.note).start()
    send_what_is_left(home, terminal)
    show_servers(terminal.console, described(services), services.database)
    show_views(home, tracking_uri(home))
    if host not in ("127.0.0.1", "localhost", "::1"):
        terminal.note(
            f"these servers listen on {host} and ask nobody who he is; see docs/servers.md", warning=True
        )
    terminal.console.print(f"next    llmill deploy flows/recipes/quickstart.yaml{at_home(home)}")


def send_what_is_left(home: Path, terminal: Any) -> None:
    """Send MLflow what runs left, so that one which was killed is not shown as at work."""
    from flows.listeners.mlflow.delivery import send_left
    from flows.listeners.mlflow.operations import Away, Mlflow

    try:
        for _, why in send_left(home, Mlflow(home, tracking_uri(home)), partial(terminal.note, warning=True)):
            terminal.note(why, warning=True)
    except Away as error:
        terminal.note(f"what runs have left for MLflow is not sent: {error}; try llmill sync", warning=True)


def down(home: Home = HOME) -> None:
    """End what llmill up started; a run at work saves, and can be retried."""
    from flows.listeners.terminal import Terminal

    terminal = Terminal()
    ended = stop(home, report=terminal.note)
    console = terminal.console
    console.print(f"ended: {', '.join(ended)}" if ended else f"no servers of {home} are up")


def worker(
    pool: Annotated[str, typer.Option(help="The work pool whose runs it carries out.")] = "llmill",
    name: Annotated[
        str, typer.Option(help="How Prefect's pages call it; else the pool and this machine.")
    ] = "",
    with_healthcheck: Annotated[bool, typer.Option(help="Answer at port 8080 whether it is alive.")] = False,
) -> None:
    """Carry out what is scheduled in a work pool, on this machine; a run at work saves when it is asked to end."""
    for key, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(key, value)
    if not os.environ.get("PREFECT_API_URL"):
        raise UserError("PREFECT_API_URL is not set: a worker needs the address of Prefect's API")
    from flows.prefect.worker import serve

    serve(pool, healthcheck=with_healthcheck, name=name)


def show_servers(console: Any, rows: list[dict[str, Any]], database: str) -> None:
    """One line a server, as up and status print it."""
    for row in rows:
        mark = "✓" if row["state"] == "up" else "✗"
        where = row["url"] or f"process {row['pid']}"
        left = f"; of it remains process {', '.join(map(str, row['remains']))}" if row["remains"] else ""
        note = "" if row["state"] == "up" else f"  (down{left}; llmill up starts it again)"
        console.print(f"{mark} {row['name']:<20}{where}{note}")
    if rows:
        console.print(f"  their data: {database}")


def show_views(home: Path, pages: str) -> None:
    """Print the address at which the runs of each recipe are compared; of those last used, where there are many."""
    from flows.listeners.mlflow.lineage import NotAsked
    from flows.listeners.mlflow.reader import PipelineRuns

    with suppress(NotAsked):  # the pages are there all the same, or come up again with their server
        views = PipelineRuns(home).views(pages)
        for recipe in list(views)[:MOST_VIEWS]:
            typer.echo(f"  runs of {recipe}: {views[recipe]}")


def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where on this machine.")] = 5000,
    home: Home = HOME,
) -> None:
    """Open MLflow's web pages on the runs of this home; stop with Ctrl-C."""

    follow_home(home)
    uri = tracking_uri(home)
    if uri.startswith("http"):
        typer.echo(f"the runs are on the MLflow server at {without_user(uri)}")
        show_views(home, uri)
        return
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (home / "mlflow.db").exists():
        raise UserError(
            f"no runs in {home} yet; start with: llmill run flows/recipes/quickstart.yaml{at_home(home)}"
        )
    with socket.socket() as listener:
        if listener.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"port {port} of this machine is in use; name another with --port")
    typer.echo(f"MLflow on http://127.0.0.1:{port}  (Ctrl-C stops it)")
    show_views(home, f"http://127.0.0.1:{port}")
    sys.stdout.flush()
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    arguments = [
        "--backend-store-uri",
        uri,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        *OWN_PAGES,
    ]
    quiet = ["--uvicorn-opts", "--log-level warning"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *arguments, *quiet])
