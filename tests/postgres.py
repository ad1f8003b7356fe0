"""A PostgreSQL server of the tests' own, on loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows.engine.ports import free_port

PASSWORD = "hunter2-of-postgres"


def program(name: str) -> str:
    """Where a program of PostgreSQL lies; Debian puts the servers' beside the path."""
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = shutil.which(name) or (str(installed[-1]) if installed else None)
    return found or pytest.skip(f"PostgreSQL's {name} is not installed here")


@contextmanager
def postgres() -> Iterator[str]:
    """The address of a new server, for as long as the block lasts."""
    user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    if user:
        shutil.chown(folder, user)
    secret, data, port = folder / "secret", folder / "data", free_port()
    secret.write_text(PASSWORD)
    if user:
        shutil.chown(secret, user)
    quiet = {"stdout": subprocess.DEVNULL, "user": user, "cwd": folder}
    make = [program("initdb"), "-D", data, "-U", "llmill", "-A", "scram-sha-256", f"--pwfile={secret}", "-N"]
    subprocess.run(make, check=True, **quiet)
    # What a power cut would do to it is not what the tests are about.
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    control = [program("pg_ctl"), "-D", data, "-w", "-l", folder / "log"]
    subprocess.run([*control, "-o", settings, "start"], check=True, **quiet)
    try:
        yield f"postgresql://llmill:{PASSWORD}@127.0.0.1:{port}"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=False, **quiet)
        shutil.rmtree(folder, ignore_errors=True)
