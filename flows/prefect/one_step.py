"""The process that builds one step beside others of a run (`flows.prefect.alongside`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TextIO

from prefect import flow
from prefect.context import hydrated_context

from flows.engine.order import Order
from flows.engine.plan import Planned, Selection
from flows.engine.process import begin_part
from flows.listeners.lines import LinesListener
from flows.prefect.alongside import CODES, Job
from flows.prefect.flow_runs import STOPS
from flows.prefect.names import FLOW
from flows.prefect.pipeline import Pipeline
from flows.recipe import build_recipe


def main() -> None:
    """Build one step for the run that started us."""
    job: Job
    job, reports = begin_part()
    try:
        if job.prefect["flow_run_context"]:
            job.prefect["flow_run_context"]["flow"] = pipeline
        with hydrated_context(job.prefect):
            carry_out(job, reports)
    except (Exception, *STOPS) as error:
        message = str(error) if isinstance(error, tuple(CODES)) else f"{type(error).__name__}: {error}"
        reports.write(json.dumps({"failed": message}, allow_nan=False) + "\n")
        reports.flush()
        sys.exit(next((code for kind, code in CODES.items() if isinstance(error, kind)), 1))


@flow(name=FLOW)
def pipeline() -> None:
    """Stands for the flow that started us: ours is a part of it."""


def carry_out(job: Job, reports: TextIO) -> None:
    """Build the step; ``reports`` gets the events."""
    recipe = build_recipe(job.recipe)
    selection = Selection(only=job.step, force=job.step if job.force else None)
    planned = Planned.of(recipe, Path(job.home), selection)
    order = Order(planned=planned, name=job.name, command=job.command, sweep=job.sweep, run_key=job.key)
    with Pipeline(order, {"the run that started it": LinesListener(reports)}) as ours:
        ours.prepare()
        ours.run()


if __name__ == "__main__":
    main()
