"""Show what a recipe may set."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from flows.cli import completion
from flows.cli.options import AsJson


def settings(
    name: Annotated[
        str,
        typer.Argument(
            help="STAGE or STEP.FIELD, as pretrain.lr; all where it is left out.",
            show_default=False,
            autocompletion=completion.settings,
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Show what a recipe may set: type, default, range, and what it does."""
    from flows.listeners.terminal import Terminal
    from flows.settings import settings as known

    found, console = known(name), Terminal().console
    if as_json:
        print(json.dumps([one.as_json() for one in found], indent=1, allow_nan=False, ensure_ascii=False))
        return
    for one in found:
        default = f"default {one.default}" if one.default else "required"
        console.print(f"{one.name}  {', '.join(part for part in (one.type, one.range, default) if part)}")
        if one.description:
            console.print(f"    {one.description}", style="dim")
