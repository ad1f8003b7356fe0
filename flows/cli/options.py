"""Options and checks that several commands share."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.core.errors import UserError
from flows.cli import completion
from flows.cli.signals import STOPPED
from flows.engine.stopping import unwind_on_signals

RecipePath = Annotated[
    Path,
    typer.Argument(
        help="A recipe, such as flows/recipes/quickstart.yaml.", autocompletion=completion.recipes
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="STEP.FIELD=VALUE",
        help="Change one setting; repeatable.",
        autocompletion=completion.overrides,
    ),
]


def expanded(home: Path) -> Path:
    """``~`` as a shell would have it, which leaves it alone in variables and after ``--home=``."""
    try:
        return home.expanduser()
    except RuntimeError as error:
        raise UserError(f"--home {home}: {error}") from None


Home = Annotated[
    Path, typer.Option(envvar="LLMILL_HOME", help="Where everything is kept.", callback=expanded)
]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at once, each with its share of the GPUs and cores.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
HOME = Path(".llmill")


def at_home(home: Path) -> str:
    """Return the option that has a hint speak of this home; empty where that is the one of everybody."""
    return "" if home == HOME else f" --home {shlex.quote(str(home))}"


def writable(home: Path) -> None:
    """Make the home folder, or report why not."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        if not os.access(home, os.W_OK):
            raise PermissionError("it can't be written to")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--home {home}: {reason}; name another folder with --home or LLMILL_HOME") from None


def refuse_read_only(home: Path) -> None:
    """End a command that must write to a home that is there and can't be written to."""
    if is_read_only(home):
        raise UserError(f"--home {home}: it can't be written to, and this command has to")


def is_read_only(home: Path) -> bool:
    return home.exists() and not os.access(home, os.W_OK)


def announce(what: str) -> None:
    """Show what a command begins with, before it imports libraries for seconds."""
    print(f"{what} ...", flush=True)


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """Let signals unwind what the block does; then report it, and end as a stopped process does."""
    from flows.listeners.terminal import fail

    unwind_on_signals()
    try:
        yield
    except KeyboardInterrupt:
        fail(message)
        raise typer.Exit(STOPPED) from None


def typed() -> str:
    """The command line as a person typed it, to be typed again; ``***`` stands for what nobody should keep."""
    from flows.recipe import shown

    home = os.environ.get("LLMILL_HOME")
    prefix = f"LLMILL_HOME={shlex.quote(home)} " if home and "--home" not in sys.argv else ""
    return prefix + shlex.join(["llmill", *map(shown, sys.argv[1:])])
