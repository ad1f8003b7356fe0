"""Use the models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.context import UserError
from flows.commands.options import HOME, AsJson, Home
from flows.process import quiet_libraries


def generate(
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    model: Annotated[
        str | None, typer.Option(help="A fingerprint or an exported folder; else the newest model.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 120,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 0.95,
    seed: int = 0,
    home: Home = HOME,
) -> None:
    """Continue a prompt with a trained model."""
    quiet_libraries()
    from flows.store import Store

    folder = exported_model(Store(home), model)
    from llm.generate import generate_from_folder

    try:
        text = generate_from_folder(
            folder, prompt, max_new_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
    except (KeyError, ValueError, OSError) as error:
        raise UserError(
            f"{folder} holds no model that llmill exported: {type(error).__name__}: {error}"
        ) from None
    typer.echo(prompt + text)


def promote(
    model: Annotated[
        str | None, typer.Argument(help="A registered model; else the one that has a candidate.")
    ] = None,
    version: Annotated[str | None, typer.Option(help="Of it; else its candidate.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be decided.")] = False,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Make a model's candidate its champion, if all gates hold."""
    quiet_libraries()
    from flows.promote import carry_out, decide, find_version
    from flows.store import Store
    from flows.terminal import Terminal, fail
    from flows.tracking.lineage import NotAsked
    from flows.tracking.registry import Registry

    try:
        registry = Registry(home)
        found = find_version(registry, model, version)
        decision = decide(Store(home), found, registry.champion(found.name))
        where = "" if dry_run else carry_out(registry, home, decision)
    except NotAsked as error:
        raise UserError(str(error)) from None
    if as_json:
        print(json.dumps(decision.as_json(), indent=1))
    else:
        console = Terminal().console
        for gate in decision.gates:
            console.print(f"{'✓' if gate.holds else '✗'} {gate.name:<16}{gate.says}")
        would = f"would be {decision.outcome}" if dry_run else f"is {decision.outcome}"
        console.print(f"{found.uri} {would}" + (f"; evidence: {where}" if where else ""))
    if decision.failed:
        fail(f"{found.uri} does not pass: {', '.join(decision.failed)}")
        raise typer.Exit(1)


def exported_model(store: Any, model: str | None) -> Path:
    """The folder of an exported model: one given as a path, by fingerprint, or the newest sealed one."""
    if model and (Path(model) / "config.json").exists():
        return Path(model)
    exports = [a for a in store.artifacts("export") if model is None or a.fingerprint.startswith(model)]
    if not exports:
        known = ", ".join(a.fingerprint for a in store.artifacts("export")) or "none"
        what = f"no exported model {model}" if model else "no exported model"
        raise UserError(f"{what} in {store.root} (there: {known}); make one with: llmill run RECIPE")
    return exports[-1].path
