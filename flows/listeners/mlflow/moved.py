"""A home that was moved or copied: MLflow notes whole addresses of files, which are led to where the home is now.

MLflow has no call for that; what it says of moving artifacts is to change its database.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from flows.engine.services import MLFLOW, read_services

FILES = "mlartifacts"
ADDRESSES = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
    "datasets": ("dataset_source",),
}
"""Table -> its columns that hold addresses of files under the home."""
WAIT_SECONDS = 10.0


def follow_home(home: Path) -> None:
    """Have the home's own MLflow database name files where the home lies now; nothing where it already does.

    Raises:
        OSError: the database can't be written to.
    """
    database = home / "mlflow.db"
    if os.environ.get("MLFLOW_TRACKING_URI") or not database.exists() or read_services(home).alive(MLFLOW):
        return  # another MLflow knows where its files are, and a server of this home found them when it started
    now = f"{home.resolve().as_uri()}/"
    with closing(open_file(database, "ro")) as connection:
        before = places(connection) - {now}
    if before:
        try:
            with closing(open_file(database, "rw")) as connection, connection:
                for old in before:
                    lead(connection, old, now)
        except sqlite3.OperationalError as error:
            message = f"{database}: the home was moved here from {min(before)}, but its files can't be found: {error}"
            raise OSError(message) from None


def open_file(database: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(database))}?mode={mode}", uri=True, timeout=WAIT_SECONDS)


def places(connection: sqlite3.Connection) -> set[str]:
    """The addresses of homes, each with a slash at its end, whose files our experiments say that they hold."""
    try:
        found = connection.execute(
            f"SELECT artifact_location FROM experiments WHERE artifact_location LIKE 'file:///%/{FILES}'"
        ).fetchall()
    except sqlite3.OperationalError:  # MLflow has not made its tables yet
        return set()
    return {location.removesuffix(FILES) for (location,) in found}


def lead(connection: sqlite3.Connection, old: str, now: str) -> None:
    """Replace one home's address by another in all addresses of files."""
    for table, columns in ADDRESSES.items():
        known = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
        for column in known.intersection(columns):  # another version of MLflow may have others
            connection.execute(
                f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE instr({column}, ?)",
                (old, now, old),
            )
