"""Begin with a text of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.core.errors import UserError


def init(
    name: Annotated[str, typer.Argument(help="What the recipe is called; it is written to NAME.yaml here.")],
    place: Annotated[
        str,
        typer.Option(
            "--from", help="A file, a folder or a pattern of text; or OWNER/NAME, a data set of the Hub."
        ),
    ] = ".",
) -> None:
    """Write a commented recipe for a text of one's own."""
    from flows.listeners.terminal import Terminal
    from flows.new_recipe import new_recipe
    from flows.recipe import load_recipe

    path = Path(f"{name}.yaml")
    if path.exists():
        raise UserError(f"{path} is there already: choose another name, or remove it")
    text = new_recipe(name, place)
    try:
        path.write_text(text, encoding="utf-8")
        load_recipe(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UserError:
        path.unlink()
        raise
    console = Terminal().console
    console.print(f"{path}: {text.splitlines()[0].removeprefix('# ')}")
    console.print(f"next    llmill plan {path}   ·   llmill run {path}")
