"""Use the models."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.core.errors import UserError
from flows.cli.options import (
    HOME,
    AsJson,
    Home,
    announce,
    refuse_read_only,
    stoppable,
    typed,
    writable,
)
from flows.engine.process import quiet_libraries
from flows.engine.store import Store


def finite(value: float) -> float:
    """Refuse infinity and what is no number, which typer lets pass any bounds."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def generate(
    prompt: Annotated[
        str | None, typer.Option(help="The text to continue; without it, what standard input holds.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A fingerprint or an exported folder; else the newest model.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Texts to write, each with the seed after the last.")
    ] = 1,
    max_tokens: Annotated[int, typer.Option(min=1)] = 120,
    temperature: Annotated[
        float, typer.Option(min=0, callback=finite, help="0 takes the likeliest token each time.")
    ] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, callback=finite)] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt with a trained model."""
    quiet_libraries()
    from flows.listeners.terminal import Screen

    folder = exported_model(Store(home), model)
    Screen(stderr=True).print(f"model {folder}")  # torch takes seconds to import
    text = read_prompt(prompt)
    from llm.model.generate import open_folder, stream

    opened = open_folder(folder)
    for number in range(samples):
        pieces = stream(
            *opened,
            text,
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed + number,
        )
        if as_json:
            print(
                json.dumps({"seed": seed + number, "prompt": text, "text": "".join(pieces)}, allow_nan=False)
            )
        else:
            if samples > 1:
                print(f"--- {number + 1} of {samples}, seed {seed + number}")
            write_pieces(chain([text], pieces))


def adopt(
    kind: Annotated[str, typer.Argument(help="tokenizer, model, documents or tokens.")],
    path: Annotated[Path, typer.Argument(help="The folder that holds it.")],
    name: Annotated[str, typer.Option(help="Of the step in a recipe.")] = "adopt",
    license_: Annotated[str | None, typer.Option("--license", help="Under which it may be used.")] = None,
    origin: Annotated[str | None, typer.Option(help="Where it comes from, in words.")] = None,
    revision: Annotated[str | None, typer.Option(help="Which one it is.")] = None,
    end_of_text: Annotated[str | None, typer.Option(help="The token that ends documents.")] = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Seal a model, tokenizer, documents or tokens that were made elsewhere, for recipes to begin from."""
    if not as_json:
        announce(f"reading {path}")
    quiet_libraries()
    writable(home)
    from flows.engine.adoption import adopt as seal
    from flows.engine.adoption import config_of, recipe_lines
    from flows.headline import headline
    from flows.listeners.terminal import Terminal

    about = {"license": license_, "origin": origin, "revision": revision, "end_of_text": end_of_text}
    with stoppable(f"stopped; the same command resumes it: {typed()}"):
        config = config_of(name, {"type": kind, "path": path.expanduser().absolute(), **about})
        adopted = seal(config, name, Store(home))
    artifact, lines = adopted.artifact, recipe_lines(name, config)
    if as_json:
        value = {"stage": artifact.stage, "fingerprint": artifact.fingerprint, "path": str(artifact.path),
                 "reused": adopted.reused, "metrics": artifact.metrics, "notes": artifact.manifest["notes"],
                 "recipe": lines}  # fmt: skip
        print(json.dumps(value, indent=1, allow_nan=False))
        return
    console = Terminal().console
    for note in artifact.manifest["notes"]:
        console.print(f"  {note}")
    how = "was sealed already" if adopted.reused else "sealed"
    console.print(
        f"✓ {artifact.stage:<16}{artifact.fingerprint}  {headline(artifact.stage, artifact.metrics)}  ({how})"
    )
    console.print(f"in a recipe:\n\n{lines.rstrip()}")


def write_pieces(pieces: Iterable[str]) -> None:
    """Write a text as it comes; a terminal is shown what it would obey (`flows.listeners.terminal.visible`)."""
    from flows.listeners.terminal import visible

    show = visible if sys.stdout.isatty() else str
    for piece in chain(pieces, ["\n"]):
        sys.stdout.write(show(piece))
        sys.stdout.flush()


def read_prompt(given: str | None) -> str:
    """The prompt: as given, or standard input less the end of its last line.

    Raises:
        UserError: there is none, or it is not UTF-8.
    """
    if given is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError("nothing to continue: give --prompt TEXT, or the text on standard input")
        given = sys.stdin.buffer.read().decode("utf-8", "surrogateescape").removesuffix("\n")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        byte = ord(given[error.start]) & 0xFF
        raise UserError(f"the prompt is not UTF-8: byte {byte:#04x} after {error.start} characters") from None
    return given


def promote(
    model: Annotated[
        str | None, typer.Argument(help="A registered model; else the one that has a candidate.")
    ] = None,
    version: Annotated[str | None, typer.Option(help="Of it; else its candidate.")] = None,
    on: Annotated[
        list[str] | None,
        typer.Option(help="A set or task that decides, in place of the held-out documents.", metavar="NAME"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be decided.")] = False,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Make a model's candidate its champion, if all gates hold."""
    quiet_libraries()
    if not dry_run:
        refuse_read_only(home)
    from flows.compare.promote import carry_out, decide, find_version
    from flows.listeners.mlflow.lineage import NotAsked
    from flows.listeners.mlflow.registry import Registry
    from flows.listeners.terminal import Terminal, fail

    try:
        registry = Registry(home)
        found = find_version(registry, model, version)
        decision = decide(Store(home), found, registry.champion(found.name), on or ())
        where = "" if dry_run else carry_out(registry, home, decision)
    except NotAsked as error:
        raise UserError(str(error)) from None
    if as_json:
        print(json.dumps(decision.as_json(), indent=1, allow_nan=False))
    else:
        console = Terminal().console
        for gate in decision.gates:
            console.print(f"{'✓' if gate.holds else '✗'} {gate.name:<16}{gate.says}")
        would = f"would be {decision.outcome}" if dry_run else f"is {decision.outcome}"
        console.print(f"{found.uri} {would}" + (f"; evidence: {where}" if where else ""))
    if decision.failed:
        fail(f"{found.uri} does not pass: {', '.join(decision.failed)}")
        raise typer.Exit(1)


def gives_labels(folder: Path) -> bool:
    """Return whether the model in a folder gives texts labels: it continues none."""
    return (folder / "labels.json").exists()


def exported_model(store: Any, model: str | None) -> Path:
    """The folder of an exported model: one given as a path, by fingerprint, or the newest sealed one.

    Raises:
        UserError: there is none, or a fingerprint's beginning stands for several.
    """
    if model and (Path(model) / "config.json").exists():
        return Path(model)
    sealed = [one for one in store.artifacts("export") if not gives_labels(one.path)]
    exports = [one for one in sealed if model is None or one.fingerprint.startswith(model)]
    known = ", ".join(one.fingerprint for one in sealed) or "none"
    if not exports and model and Path(model).is_dir():
        raise UserError(f"{model} holds no model: it has no config.json")
    if not exports:
        what = f"no exported model {model}" if model else "no exported model"
        raise UserError(f"{what} in {store.root} (there: {known}); make one with: llmill run RECIPE")
    if model and len(exports) > 1:
        names = ", ".join(one.fingerprint for one in exports)
        raise UserError(f"{model} may be any of {names}: give more digits")
    return exports[-1].path
