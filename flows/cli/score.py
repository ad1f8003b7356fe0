"""Score models on fixed sets and tasks, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.core.errors import UserError
from flows.cli.options import HOME, AsJson, Home, announce, stoppable, typed, writable
from flows.cli.runs import listeners, pipeline_of, ready, warn_of_mlflow
from flows.engine.process import quiet_libraries, save_when_asked
from flows.engine.store import Artifact, Store
from flows.prefect.servers import PrefectServer

SetFiles = Annotated[
    list[Path] | None,
    typer.Option("--sets", help="A file of texts, or YAML that lists sets and tasks.", metavar="FILE"),
]
TaskFiles = Annotated[
    list[Path] | None,
    typer.Option("--tasks", help="A file of items, or YAML that lists sets and tasks.", metavar="FILE"),
]
HarnessTasks = Annotated[
    str | None,
    typer.Option(
        "--harness", help="Tasks of lm-evaluation-harness, with commas between.", metavar="TASK[,TASK]"
    ),
]
HarnessFolder = Annotated[
    Path | None,
    typer.Option("--harness-tasks", help="A folder of more tasks in the harness's YAML.", metavar="FOLDER"),
]
Most = Annotated[
    int | None,
    typer.Option("--most", min=1, help="At most so many documents of a set and items of a task."),
]


def score(
    models: Annotated[
        list[str],
        typer.Argument(
            help="A folder, a fingerprint, a run's name, latest, models:/NAME@ALIAS, or OWNER/NAME on the hub.",
            metavar="MODEL [...]",
        ),
    ],
    sets: SetFiles = None,
    tasks: TaskFiles = None,
    harness: HarnessTasks = None,
    harness_tasks: HarnessFolder = None,
    most: Most = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Score models on fixed sets of texts and on tasks; what was scored before is not scored again."""
    if not as_json:
        announce(f"reading {', '.join(models)}")
    quiet_libraries()
    from flows.compare.scores_table import as_rows, show_scores
    from flows.compare.scoring import scoring_config
    from flows.listeners.terminal import Screen, Terminal

    terminal = Terminal(Screen(stderr=True) if as_json else None)
    config = scoring_config(sets or (), tasks or (), most, harness=harness, harness_tasks=harness_tasks)
    scored = score_all(models, config, home=home, terminal=terminal)
    if as_json:
        print(json.dumps(as_rows(scored), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        show_scores(scored, terminal.console)


def score_all(models: Sequence[str], config: Any, *, home: Path, terminal: Any) -> list[tuple[str, Artifact]]:
    """Score what a person names by a `ScoreConfig`, each in a run of its own; return names and scores.

    Raises:
        UserError: something named is not there, can't be scored, or was not.
    """
    from flows.compare.models import find_models
    from flows.compare.scoring import plan_scoring

    writable(home)
    store = Store(home)
    with stoppable(f"stopped; the same command resumes it: {typed()}"):
        save_when_asked()
        planned = [
            (model.name, plan_scoring(model, config, store))
            for text in models
            for model in find_models(text, store)
        ]
        return run_all(planned, home, terminal)


def run_all(planned: Sequence[tuple[str, Any]], home: Path, terminal: Any) -> list[tuple[str, Artifact]]:
    """Carry each plan out as a run of its own, and return each model's scores; those that are sealed need none."""
    from flows.engine.naming import dated
    from flows.engine.order import Order

    scored = []
    with PrefectServer(home, wanted=any(plan.builds for _, plan in planned)) as server:
        for name, plan in planned:
            [*_, last] = plan.steps
            if not plan.builds:
                scored.append((name, last.artifact))
                terminal.note(f"{name} was scored on these already: {last.artifact.path}")
                continue
            order = Order(planned=plan, name=dated(name), command=typed())
            terminal.title(f"{name}  ·  run “{order.name}” of {plan.recipe.name}")
            with (
                pipeline_of(order, listeners(terminal, as_json=False)) as pipeline,
                ready(pipeline, server, {"models": [name]}) as begin,
            ):
                begin()
            warn_of_mlflow(pipeline, terminal, home)
            if "score" not in pipeline.executor.results:
                raise UserError(
                    f"{name} was not scored; what was done is kept, and the same command resumes it"
                )
            scored.append((name, pipeline.executor.results["score"].artifact))
    return scored
