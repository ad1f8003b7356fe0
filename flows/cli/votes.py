"""Show what people voted on pairs of models, and write it down for a training on preferences."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from flows.cli.options import HOME, AsJson, Home, at_home
from flows.engine.store import Store


def votes(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the preferences there, as JSON lines of prompt, chosen, rejected.", metavar="FILE"
        ),
    ] = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Show which of two models people prefer, by the votes of llmill chat --web MODEL MODEL."""
    from flows.listeners.terminal import Terminal
    from llm.chat.votes import preference_row, read_votes, tallies, unfit, votes_file

    store, console = Store(home), Terminal().console
    found = read_votes(votes_file(store.home))
    pairs = tallies(found.votes)
    why = [unfit(vote) for vote in found.votes]
    left_out = Counter(filter(None, why))
    rows = [preference_row(vote) for vote, reason in zip(found.votes, why, strict=True) if not reason]
    if out is not None:
        write_rows(out, rows)
    if as_json:
        written = None if out is None else {"file": str(out), "rows": len(rows), "left_out": left_out}
        value = {
            "pairs": [one.as_json() for one in pairs],
            "damaged_lines": found.damaged,
            "written": written,
        }
        print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))
        return
    for one in pairs:
        console.print(one.in_words())
    if not pairs:
        console.print(f"no votes in {home} yet; give some with: llmill chat --web MODEL MODEL{at_home(home)}")
    if found.damaged:
        console.print(f"left out: {found.damaged} lines of {votes_file(store.home)} that hold no whole vote")
    if out is not None:
        reasons = ", ".join(f"{count} ({reason})" for reason, count in left_out.most_common())
        console.print(f"{len(rows)} preferences in {out}" + (f"; left out: {reasons}" if reasons else ""))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines, all or nothing.

    Raises:
        UserError: they can't be.
    """
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    try:
        with atomic_path(path.expanduser()) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}") from None
