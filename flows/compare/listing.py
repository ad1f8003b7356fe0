"""A home's runs as a table: in what those of a recipe differ, and what came of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipeline.core.text import clock, duration
from flows.engine.logged_runs import LoggedRun
from flows.listeners.mlflow.reader import ListedRun
from flows.stages import BY_NAME

MOST_SETTINGS, VALUE_LENGTH = 4, 20
"""Settings that a row names, and characters of a value."""
UNBOUNDED = 10_000
"""Characters, more than a row has."""
ID_DIGITS = 8  # `llmill compare` takes six or more
PLACES = {stage: place for place, stage in enumerate(BY_NAME)}


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A run with what sets it apart."""

    found: ListedRun
    state: str
    """``running``, ``finished``, ``failed`` or ``killed``."""
    settings: dict[str, str]
    """Those that are not equal in all runs of its recipe, by short names; the nearest to the model first."""

    def as_json(self) -> dict[str, Any]:
        run = self.found.run
        return {
            "name": run.name,
            "recipe": run.recipe,
            "settings": self.settings,
            "bits_per_byte": self.found.bits_per_byte,
            "state": self.state,
            "started": run.started,
            "ended": self.found.ended,
            "run_id": run.run_id,
            "mlflow_url": run.url,
            "prefect_url": self.found.prefect_url,
        }


def listing(found: Sequence[ListedRun], logged: Mapping[str, LoggedRun]) -> list[Listed]:
    """Return what to show of runs; ``logged`` knows how one ended that MLflow takes to be at work still."""
    recipes = dict.fromkeys(one.run.recipe for one in found)
    differing = {
        recipe: differences([one for one in found if one.run.recipe == recipe]) for recipe in recipes
    }
    return [
        Listed(found=one, state=state_of(one, logged), settings=set_in(one, differing[one.run.recipe]))
        for one in found
    ]


def state_of(one: ListedRun, logged: Mapping[str, LoggedRun]) -> str:
    open_ = one.state == "RUNNING" and one.key in logged
    return (logged[one.key].state if open_ else one.state).lower()


def differences(found: Sequence[ListedRun]) -> dict[str, str]:
    """Param -> short name, of those that are not equal in all runs of a recipe; the nearest to the model first."""
    names = {name for one in found for name in one.params}
    differ = [name for name in names if len({one.params[name] for one in found if name in one.params}) > 1]
    stages = {step: stage for one in found for step, (stage, _) in one.run.artifacts.items()}

    def place(name: str) -> tuple[int, str]:
        step = name.partition(".")[0]
        return -PLACES.get(stages.get(step, step), len(PLACES)), name

    return {name: short(name, differ) for name in sorted(differ, key=place)}


def short(name: str, among: Sequence[str]) -> str:
    """The shortest end of a setting's name that no other one has."""
    parts = name.split(".")
    ends = (".".join(parts[start:]) for start in reversed(range(len(parts))))
    others = [other for other in among if other != name]
    return next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others))


def set_in(one: ListedRun, differing: Mapping[str, str]) -> dict[str, str]:
    return {shown: one.params[name] for name, shown in differing.items() if name in one.params}


def show(rows: Sequence[Listed], console: Console, prefect: str, now: float) -> None:
    """Print the table; with the pages in Prefect, where there is room.

    Args:
        prefect: address of the server whose pages can be opened; empty where there is none.
        now: the time, in seconds since 1970.
    """
    urls = [row.found.prefect_url for row in rows]
    links = [url if prefect and url.startswith(prefect) else "" for url in urls]
    wide = table_of(rows, now, links)
    # Rich measures nothing as wider than the console, unless it is told of a wider one.
    unbounded = console.options.update_width(UNBOUNDED)
    fits = any(links) and console.measure(wide, options=unbounded).maximum <= console.width
    console.print(wide if fits else table_of(rows, now), soft_wrap=False)


def table_of(rows: Sequence[Listed], now: float, links: Sequence[str] = ()) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    named = all(row.found.run.name.startswith(row.found.run.recipe) for row in rows)
    head = [
        "run",
        *(() if named else ("recipe",)),
        "set",
        "bits per byte",
        "state",
        "began",
        "took",
        "MLflow",
    ]
    for name in [*head, *(("Prefect",) if links else ())]:
        folds = name in ("run", "recipe", "set", "bits per byte")
        table.add_column(
            name, justify="right" if name == "took" else "left", overflow="fold", no_wrap=not folds
        )
    for number, row in enumerate(rows):
        found = row.found
        seconds = max(0.0, (found.ended / 1000 if found.ended else now) - found.run.started / 1000)
        cells = [
            found.run.name,
            *(() if named else (found.run.recipe,)),
            settings_text(row.settings),
            scores_text(found.bits_per_byte),
            row.state,
            clock(found.run.started),
            duration(seconds) if found.ended or row.state == "running" else "",
            found.run.run_id[:ID_DIGITS],
        ]
        table.add_row(*cells, *links[number : number + 1])
    return table


def settings_text(settings: Mapping[str, str]) -> str:
    """``lr=0.001 seed=1``; of many or long ones, the first and their beginnings."""
    shown = [f"{name}={clipped(value)}" for name, value in list(settings.items())[:MOST_SETTINGS]]
    more = len(settings) - MOST_SETTINGS
    return " ".join([*shown, *([f"and {more} more"] if more > 0 else [])])


def clipped(value: str) -> str:
    return value if len(value) <= VALUE_LENGTH else value[: VALUE_LENGTH - 1] + "…"


def scores_text(scores: Mapping[str, float]) -> str:
    """``1.2345``; of several models, each by the step that evaluated it."""
    if len(scores) == 1:
        return f"{next(iter(scores.values())):.4f}"
    return "\n".join(f"{step}: {value:.4f}" for step, value in scores.items())
