"""MLflow's server, whose pages open in the mode for training in a browser that has chosen none.

MLflow 3.17 leaves the mode to each browser, and begins with the one for traces of agents ("GenAI"), where an experiment
opens on an empty page; an assistant covers a third of it, and an announcement all of the registry. No tag of an
experiment and no setting of the server changes that. `mlflow server --app-name llmill` serves this.
"""

from __future__ import annotations

from pathlib import Path

from mlflow.server import app as pages
from mlflow.server.fastapi_app import app as app

SCRIPT = """<script>
localStorage["mlflow.workflowType_v1"] ??= '"machine_learning"';
localStorage["mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"] ??= "true";
localStorage["_mlflow_model_registry_promo_modal_dismissed_v1"] ??= "true";
</script>"""
"""Puts into a browser what MLflow's pages keep there of a person's choice, where there is none."""


def start_page() -> str:
    """Return MLflow's page with a script before its own."""
    page = (Path(str(pages.static_folder)) / "index.html").read_text(encoding="utf-8")
    return page.replace("<head>", f"<head>{SCRIPT}", 1)


pages.view_functions["serve"] = start_page
