"""``llmill``: the command line.

Exit codes: 0 done, 1 a step failed, 2 the user's mistake (one or two lines say what to do), 130 stopped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from io import TextIOWrapper

import typer

from data_pipeline.core.errors import UserError
from flows.cli import (
    artifacts,
    chat,
    classify,
    comparison,
    init,
    listing,
    models,
    runs,
    scaling,
    schedule,
    score,
    servers,
    settings,
    tracking,
    votes,
)
from flows.cli.signals import heed_signals

COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Run": (init.init, runs.run, runs.plan, comparison.sweep, scaling.ladder, runs.join),
    "Schedule": (schedule.deploy,),
    "Inspect": (
        listing.runs,
        artifacts.status,
        artifacts.verify,
        artifacts.trace,
        artifacts.find,
        artifacts.gc,
        settings.settings,
    ),
    "Compare": (comparison.compare, score.score, votes.votes, scaling.forecast, scaling.forecasts),
    "Models": (models.generate, chat.chat, classify.classify, models.adopt, models.promote),
    "Servers": (servers.up, servers.down, servers.worker, servers.ui, tracking.sync),
}
"""Heading in the help -> the commands under it, each called as its function."""


def make_app() -> typer.Typer:
    """All commands as one."""
    app = typer.Typer(
        help="Raw text to an evaluated, exported language model, as one pipeline.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    for heading, commands in COMMANDS.items():
        for command in commands:
            app.command(rich_help_panel=heading)(command)
    return app


def main() -> None:
    """Entry point: run the command; turn what went wrong into a few lines and an exit code."""
    from flows.listeners.terminal import fail

    heed_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal's encoding must not end a command
    try:
        make_app()()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        message, code = in_words(error)
        fail(message)
        sys.exit(code)


def in_words(error: Exception) -> tuple[str, int]:
    """Return a person's words for an error, and the exit code. Classes go by name: Prefect may not be imported yet."""
    if isinstance(error, UserError):
        return str(error), 2
    kind = type(error).__name__
    if kind == "PrefectHTTPStatusError" and (status := error.response.status_code) in (401, 403):  # type: ignore[attr-defined]
        api = os.environ.get("PREFECT_API_URL", "")
        return f"Prefect at {api} refuses us ({status}): set PREFECT_API_AUTH_STRING=USER:PASSWORD", 2
    return (str(error) if kind == "StageFailed" else f"{kind}: {error}"), 1


if __name__ == "__main__":
    main()
