"""Where MLflow is, and where a person finds a run in its pages."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from flows.engine.services import MLFLOW, read_services, sqlite_url

PAGES = "LLMILL_MLFLOW_PAGES"  # where browsers reach MLflow, if not at MLFLOW_TRACKING_URI
OWN_PAGES = ("--app-name", "llmill")
"""Options by which `mlflow server` serves `flows.listeners.mlflow.pages`."""
HOME = "home"
VIEW = "llmill"
"""The key of the saved view that `flows.listeners.mlflow.view` describes."""
TRAINING = "workflowType=machine_learning"
"""The mode of MLflow's pages that shows runs; the other one is about traces of agents, and shows an empty page."""


def tracking_uri(home: Path) -> str:
    """``MLFLOW_TRACKING_URI``, the server that `llmill up` started for ``home``, or a SQLite file there."""
    given = os.environ.get("MLFLOW_TRACKING_URI") or read_services(home).url(MLFLOW)
    return given or sqlite_url(home.resolve() / "mlflow.db")


def target(home: Path) -> str:
    """Which MLflow `tracking_uri` names, to be noted on disk: ``home`` for the home's own, however it is reached."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    ours = not given or given == read_services(home).url(MLFLOW)
    return HOME if ours else without_user(given)


def without_user(uri: str) -> str:
    """An address as it may be shown: without the user and the password that may be in it."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri


def without_secrets(text: str, uri: str) -> str:
    """Return a message on ``uri``, without the user and the password that may be in it."""
    parts = urlsplit(uri)
    user, at, _ = parts.netloc.rpartition("@")
    text = text.replace(user + at, "") if at else text
    return text.replace(parts.password, "***") if parts.password else text


def run_url(tracking_uri: str, experiment_id: str, run_id: str) -> str:
    """The address of a run's page; empty where no server shows it, or the run is not known yet."""
    known = experiment_id and run_id
    return page_url(tracking_uri, f"{experiment_id}/runs/{run_id}?{TRAINING}") if known else ""


def artifact_url(run_url: str, name: str) -> str:
    """The address that shows a file of the run with this page."""
    page, mark, mode = run_url.partition("?")
    return f"{page}/artifacts/{name}{mark}{mode}"


def table_url(tracking_uri: str, experiment_id: str) -> str:
    """The address of our view of an experiment's runs; empty as in `run_url`.

    It opens with the charts, beside the runs' names, best first: which run is best and how its loss went are seen at
    once, and the table with its columns is one click away. Beside the table there would be no curve.
    """
    view = f"viewStateShareKey={VIEW}&compareRunsMode=CHART&{TRAINING}"
    return page_url(tracking_uri, f"{experiment_id}/runs?{view}") if experiment_id else ""


def page_url(tracking_uri: str, page: str) -> str:
    base = os.environ.get(PAGES) or tracking_uri
    parts = urlsplit(base)
    if parts.scheme not in ("http", "https"):
        return ""
    place = parts.hostname or ""
    place = f"[{place}]" if ":" in place else place
    place = f"{place}:{parts.port}" if parts.port else place  # never the user and password that may be there
    return f"{parts.scheme}://{place}{parts.path.rstrip('/')}/#/experiments/{page}"
