"""A recipe run as the flow of a deployment, where nobody looks at a terminal: whatever fails, from its first line on,
is told in MLflow and to those whom the recipe names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from prefect.runtime import flow_run

from flows.engine.plan import Selection
from flows.listeners.mlflow.tracker import Tracker
from flows.listeners.notices import Notice, send_notice
from flows.listeners.terminal import Terminal
from flows.prefect.dispatch import Dispatcher
from flows.prefect.pipeline import Run, log, prefect_labels
from flows.recipe import load_recipe


def carry_out(
    recipe: Path,
    settings: Sequence[str],
    home: Path,
    *,
    selection: Selection,
    command: str,
    dispatcher: Dispatcher,
) -> None:
    """Run a recipe within the flow run that calls this. ``command`` is what a person types to go on with it."""
    terminal = Terminal()
    try:
        run = Run(load_recipe(recipe, settings), home, selection, terminal, command, dispatcher)
        run.prepare()
    except Exception as error:
        if not dispatcher.parent_key:  # else who dispatched us says so
            tell_failure(recipe, home, error, command=command, terminal=terminal)
        raise
    run.work()


def tell_failure(recipe: Path, home: Path, error: Exception, *, command: str, terminal: Terminal) -> None:
    """Tell MLflow, and those whom the recipe names, of a run that could not be planned."""

    def warn(text: str) -> None:
        terminal.note(text, warning=True)

    values = read_leniently(recipe)
    name = str(values.get("name") or recipe.stem)
    message = str(error) or type(error).__name__
    tracker = Tracker(home, name, warn)
    tracker.open()
    key = f"planning-{flow_run.id}"
    tracker.start(key, {}, {"llmill.recipe": name, **prefect_labels()})
    tracker.note(f"**Failed** before the first stage: {message}\n\nagain by hand: `{command}`")
    tracker.finish("FAILED", 0)
    tracker.close("FAILED")
    (home / "runs" / f"{key}.json").unlink(missing_ok=True)  # nothing that a later run could go on with
    log(message)
    notice = Notice(
        recipe=name,
        state="failed",
        summary=f"before the first stage: {message}",
        log=message,
        resume=command,
        prefect_url=flow_run.ui_url or "",
        mlflow_url=tracker.page_url,
    )
    send_notice(notice, receivers(values), warn)


def read_leniently(recipe: Path) -> Mapping[str, Any]:
    """What can be read of a recipe that may be wrong."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    return {}


def receivers(values: Mapping[str, Any]) -> list[str]:
    """Whom a recipe wants to be told; those that are no text are passed over."""
    runtime = values.get("runtime")
    named = runtime.get("notify") if isinstance(runtime, dict) else None
    return [one for one in named if isinstance(one, str)] if isinstance(named, list) else []
