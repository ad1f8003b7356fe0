"""A recipe run as the flow of a deployment, where nobody looks at a terminal: whatever fails, from its first line on,
is in the run log, and so in MLflow and with those whom the recipe names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from prefect.runtime import flow_run

from flows.compare.predecessor import with_predecessors
from flows.engine.events import RunEnded, RunStarted
from flows.engine.naming import dated, name_run
from flows.engine.order import Order
from flows.engine.plan import Planned, Selection
from flows.listeners.flow_page import FlowPageListener
from flows.listeners.mlflow.listener import MlflowListener, begin_log
from flows.listeners.notices import NoticeListener
from flows.listeners.terminal import Terminal, TerminalListener
from flows.prefect.dispatch import Dispatcher
from flows.prefect.form import together
from flows.prefect.pipeline import Pipeline
from flows.recipe import load_recipe


def carry_out(
    recipe: Path,
    settings: Sequence[str],
    home: Path,
    *,
    fields: Sequence[str],
    selection: Selection,
    command: str,
    note: str,
    dispatcher: Dispatcher,
) -> None:
    """Run a recipe within the flow run that calls this.

    Args:
        fields: settings that the form's fields were changed to, besides those that are listed.
        command: what a person types to resume the run.
    """
    prepared = False
    try:
        settings = together(settings, fields)
        planned = Planned.of(load_recipe(recipe, settings), home, selection)
        name = name_run(planned, settings, flow_run.name or "")
        order = Order(
            planned=planned,
            name=name,
            command=command,
            note=note,
            run_key=dispatcher.parent_key,
            conclude=with_predecessors,
        )
        with Pipeline(order, {"the terminal": TerminalListener(Terminal())}, dispatcher) as pipeline:
            pipeline.prepare()
            prepared = True
            pipeline.run()
    except Exception as error:
        if not prepared and not dispatcher.parent_key:  # else who dispatched us reports it
            report_failure(recipe, home, error, command)
        raise


def report_failure(recipe: Path, home: Path, error: Exception, command: str) -> None:
    """Report everywhere that a run could not be planned."""
    values = read_leniently(recipe)
    name, key = str(values.get("name") or recipe.stem), uuid4().hex
    called, store = flow_run.name or dated(name), str((home / "store").resolve())
    seen = {"id": str(flow_run.id), "url": str(flow_run.ui_url)} if flow_run.id else {}
    begun = RunStarted(
        key=key,
        name=called,
        recipe=name,
        command=command,
        flow_run=seen,
        notify=receivers(values),
        store=store,
    )
    message = str(error) or type(error).__name__
    ended = RunEnded(
        key=key,
        status="FAILED",
        seconds=0.0,
        message=f"before the first step: {message}",
        log=message,
        name=called,
        command=command,
        store=store,
    )
    try:
        log = begin_log(home, name)
    except OSError:  # a full disk, or a home that is not ours: who is to be notified needs neither
        alone = NoticeListener(Terminal().note)
        for event in (begun, ended):
            alone.handle(event)
        alone.close()
        return
    log.attach("MLflow", MlflowListener(home, name, log))
    log.attach("the flow run's page", FlowPageListener())
    log.attach("runtime.notify", NoticeListener(log.warn))
    log.attach("the terminal", TerminalListener(Terminal()))
    log.append(begun)
    log.note(message)
    log.append(ended)
    log.close()


def read_leniently(recipe: Path) -> Mapping[str, Any]:
    """Read what can be read of a recipe that may be wrong."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    return {}


def receivers(values: Mapping[str, Any]) -> list[str]:
    """List the receivers of notices that a recipe names; those that are no text are passed over."""
    runtime = values.get("runtime")
    named = runtime.get("notify") if isinstance(runtime, dict) else None
    return [one for one in named if isinstance(one, str)] if isinstance(named, list) else []
