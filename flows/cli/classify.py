"""Give texts labels."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from data_pipeline.core.errors import UserError
from flows.cli.options import HOME, AsJson, Home
from flows.engine.process import quiet_libraries
from flows.engine.store import Store

SHOWN = 60
"""Characters of a text that stand beside its label."""


def classify(
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Without any, each line of standard input.", metavar="[TEXT ...]", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A folder, a fingerprint, or a run's name; else the newest classifier."),
    ] = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Give texts labels with a trained classifier."""
    quiet_libraries()
    wanted = texts or read_lines()
    from flows.listeners.terminal import Screen

    Screen(stderr=True).print(
        f"loading {model or 'the newest classifier'} ..."
    )  # torch takes seconds to import
    from flows.compare.classifiers import load_classifier
    from llm.classify.predict import chosen

    classifier = load_classifier(model, Store(home))
    screen = Screen()
    for text in wanted:
        [probabilities] = found = classifier.probabilities(classifier.logits([classifier.tokens(text)]))
        [has] = chosen(found, several=classifier.several)
        given = [name for name, one in zip(classifier.labels, has, strict=True) if one]
        shares = dict(zip(classifier.labels, map(float, probabilities), strict=True))
        if as_json:
            row = {"text": text, "labels": given, "probabilities": shares}
            print(json.dumps(row, ensure_ascii=False, allow_nan=False))
            continue
        beginning = " ".join(text.split())
        beginning = beginning if len(beginning) <= SHOWN else beginning[: SHOWN - 1] + "…"
        named = ", ".join(f"{name} {shares[name]:.1%}" for name in given) or "no label"
        screen.print(f"{named}  {beginning}")


def read_lines() -> list[str]:
    """Return the lines of standard input that hold anything.

    Raises:
        UserError: there are none, or they are not UTF-8.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("nothing to give a label: name a TEXT, or pipe one a line in")
    try:
        lines = sys.stdin.buffer.read().decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8: byte {error.object[error.start]:#04x}") from None
    if not (lines := [line for line in lines if line.strip()]):
        raise UserError("nothing to give a label: standard input is empty")
    return lines
