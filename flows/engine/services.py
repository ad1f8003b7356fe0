"""The services that a home keeps up, by its ``servers.json``: Prefect's server, MLflow's, and workers."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

import psutil

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import write_durably
from flows.engine.process import lives

POOL, GPU_POOL = "llmill", "llmill-gpu"
PREFECT, MLFLOW = "prefect", "mlflow"
MARK = "LLMILL_SERVICE"


@dataclass(frozen=True)
class Running:
    """A process that `up` started."""

    pid: int
    created: float
    """When it began, as the system reports: another process may get its number later."""
    url: str = ""
    """Where people open it; empty for a worker."""
    log: str = ""
    mark: str = ""
    """Value of ``LLMILL_SERVICE`` in the environment of this process and of all that came out of it."""

    @property
    def alive(self) -> bool:
        return lives(self.pid, self.created)

    def family(self) -> list[psutil.Process]:
        """This process and all that came out of it and still live, be this one or others between gone."""
        found = marked(self.mark) if self.mark else []
        if self.alive:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(self.pid)
                found += [process, *process.children(recursive=True)]
        return list({process.pid: process for process in found}.values())


def marked(mark: str) -> list[psutil.Process]:
    """Processes that inherited a mark; a process group or a session is left by who makes one of his own."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


@dataclass(frozen=True)
class Services:
    """The contents of a home's ``servers.json``."""

    database: str = "SQLite"
    """Where both servers keep their data, for people: never with a password."""
    processes: dict[str, Running] = field(default_factory=dict)
    """Processes by name: ``prefect``, ``mlflow``, ``worker NAME-OF-POOL``."""

    def alive(self, name: str) -> Running | None:
        """The process of that name, if it lives."""
        process = self.processes.get(name)
        return process if process and process.alive else None

    def url(self, name: str) -> str:
        """The address of a server that lives, and of one of a home in PostgreSQL even where it does not.

        Nothing else knows the runs that are there, so a run must not begin a second history in SQLite.
        """
        process = self.processes.get(name)
        known = process and (process.alive or self.database != "SQLite")
        return process.url if process and known else ""


def read_services(home: Path) -> Services:
    """Read what `up` left; nothing, where it was never called or all was ended."""
    try:
        state = json.loads(place(home).read_text())
        processes = {name: Running(**entry) for name, entry in state["processes"].items()}
        return Services(state["database"], processes)
    except FileNotFoundError:
        return Services()
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{place(home)} is damaged; end its servers by hand and remove it") from None


def place(home: Path) -> Path:
    return home / "servers" / "servers.json"


def prefect_api(home: Path) -> str:
    """The Prefect API to which runs on a home report: ``PREFECT_API_URL``, or that of the home's server; or empty.

    Raises:
        UserError: the variable holds a password, which would be shown wherever the address is.
    """
    url = read_services(home).url(PREFECT)
    api = os.environ.get("PREFECT_API_URL") or (f"{url}/api" if url else "")
    if "@" in urlsplit(api).netloc:
        raise UserError(
            "PREFECT_API_URL holds a user name or a password: set PREFECT_API_AUTH_STRING=USER:PASSWORD instead"
        )
    return api


def write(home: Path, services: Services) -> None:
    place(home).parent.mkdir(parents=True, exist_ok=True)
    write_durably(place(home), json.dumps(asdict(services), indent=1, allow_nan=False))


def sqlite_url(database: Path, driver: str = "sqlite") -> str:
    """The address of a SQLite file as SQLAlchemy reads it, wherever the file lies."""
    if "?" not in str(database):
        return f"{driver}:///{database}"
    return (
        f"{driver}:///file:{quote(str(database), safe='')}?uri=true"  # else what follows it would be options
    )


def prefect_home(folder: Path) -> dict[str, str]:
    """The variables by which Prefect's server keeps its data in a folder."""
    database = sqlite_url(folder.resolve() / "prefect.db", "sqlite+aiosqlite")
    named = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database} if "?" in str(folder.resolve()) else {}
    return {"PREFECT_HOME": str(folder), **named}
