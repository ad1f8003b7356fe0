"""Look at what is sealed."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.core.errors import UserError
from data_pipeline.core.text import clock, duration, human_bytes
from flows.cli.options import HOME, AsJson, Home, at_home, refuse_read_only
from flows.cli.servers import show_servers
from flows.engine.logged_runs import runs_at_work
from flows.engine.process import quiet_libraries
from flows.engine.services import read_services
from flows.engine.store import Artifact, Damaged, Store
from flows.headline import headline
from flows.prefect.up import described
from flows.stages import BY_NAME

if TYPE_CHECKING:
    from rich.console import Console

    from flows.gc import Candidate


def status(
    listed: Annotated[
        bool, typer.Option("--artifacts", help="List each artifact, not only how many there are.")
    ] = False,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Show the servers that are up, the runs at work, and what is sealed and unfinished, with sizes."""
    from flows.listeners.terminal import Terminal

    store = Store(home)
    artifacts, unfinished = store.artifacts(), store.unfinished()
    services = read_services(home)
    if as_json:
        print_status(store, artifacts, unfinished)
        return
    console = Terminal().console
    show_servers(console, described(services), services.database)
    show_work(console, store)
    if not artifacts and not unfinished:
        console.print(
            f"nothing is sealed in {home} yet; start with: llmill run flows/recipes/quickstart.yaml{at_home(home)}"
        )
    if listed:
        list_artifacts(console, artifacts, unfinished)
    else:
        show_stages(console, artifacts, unfinished)
    total = human_bytes(sum(artifact.size for artifact in artifacts))
    console.print(f"{len(artifacts)} sealed, {total}, in {store.root}")
    if artifacts and not listed:
        console.print(f"next    llmill runs{at_home(home)}   ·   llmill status{at_home(home)} --artifacts")


def print_status(store: Store, artifacts: Sequence[Artifact], unfinished: Sequence[Path]) -> None:
    """Print all of it for scripts."""
    sealed = [
        {"stage": a.stage, "fingerprint": a.fingerprint, "bytes": a.size, "path": str(a.path),
         "finished": a.manifest["finished"], "recipe": a.manifest["recipe"], "metrics": a.metrics}
        for a in artifacts
    ]  # fmt: skip
    found = {
        "servers": described(read_services(store.home)),
        "at_work": [run.as_json(store) for run in runs_at_work(store.home)],
        "sealed": sealed,
        "unfinished": [str(path) for path in unfinished],
    }
    print(json.dumps(found, indent=1, allow_nan=False))


def show_work(console: Console, store: Store) -> None:
    """Print a line for each step at work."""
    for run in runs_at_work(store.home):
        name = run.name if run.name.startswith(run.recipe) else f"{run.recipe} {run.name}"
        if not run.steps:
            console.print(f"… {name}  {since(run.since)}")
        for step in run.steps.values():
            said = "  ".join(part for part in (step.name, step.progress(store), since(step.since)) if part)
            console.print(f"… {name}  {said}")


def since(begun: int) -> str:
    """A time (in milliseconds since 1970) as a person asks for it: ``since 14:02 (3:10)``."""
    return f"since {clock(begun)} ({duration(max(0.0, time.time() - begun / 1000))})"


def show_stages(console: Console, artifacts: Sequence[Artifact], unfinished: Sequence[Path]) -> None:
    """Print a line for each stage: how many artifacts it has, and their size."""
    sealed = Counter(artifact.stage for artifact in artifacts)
    begun = Counter(path.parent.name for path in unfinished)
    for stage in [*BY_NAME, *sorted((sealed | begun).keys() - BY_NAME.keys())]:
        if not sealed[stage] and not begun[stage]:
            continue
        size = human_bytes(sum(one.size for one in artifacts if one.stage == stage))
        line = f"{stage:<16}{sealed[stage]:>4} sealed  {size:>9}"
        if begun[stage]:
            left = sum(bytes_below(path) for path in unfinished if path.parent.name == stage)
            line += f"  {begun[stage]:>4} unfinished  {human_bytes(left):>9}"
        console.print(line)


def bytes_below(folder: Path) -> int:
    """The size of all files of a folder, in which others may be at work."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(FileNotFoundError):
                total += Path(place, name).stat().st_size
    return total


def list_artifacts(console: Console, artifacts: Sequence[Artifact], unfinished: Sequence[Path]) -> None:
    """Print a line for each artifact."""
    for artifact in artifacts:
        size, when = human_bytes(artifact.size), artifact.manifest["finished"][:16].replace("T", " ")
        line = f"{artifact.stage:<16}{artifact.fingerprint}  {size:>9}  {when}"
        console.print(f"{line}  {artifact.manifest['recipe']}  {headline(artifact.stage, artifact.metrics)}")
    for path in unfinished:
        console.print(f"{path.parent.name:<16}{path.name.removesuffix('.partial')}  unfinished")


def verify(
    fingerprint: Annotated[str | None, typer.Argument(help="One artifact; without it, all.")] = None,
    home: Home = HOME,
) -> None:
    """Check sealed files against their checksums."""
    from flows.listeners.terminal import Terminal

    store, console = Store(home), Terminal().console
    folders = [path for path in store.sealed_folders() if path.name.startswith(fingerprint or "")]
    if not folders:
        raise UserError(f"nothing sealed in {home}" + (f" is called {fingerprint}" if fingerprint else ""))
    bad = 0
    for folder in folders:
        try:
            artifact = store.get(folder.parent.name, folder.name)
        except Damaged as error:
            bad += 1
            console.print(f"✗ {folder.parent.name:<16}{folder.name}\n    {error}")
            continue
        if artifact is None:
            continue  # removed meanwhile
        problems = store.verify(artifact)
        bad += bool(problems)
        mark = "✗" if problems else "✓"
        console.print(
            f"{mark} {artifact.stage:<16}{artifact.fingerprint}  {len(artifact.manifest['files'])} files"
        )
        for problem in problems:
            console.print(f"    {problem}")
        if problems:
            console.print(
                f"    build it again with: llmill run RECIPE --force {artifact.stage}{at_home(home)}"
            )
    if bad:
        raise UserError(f"{bad} of {len(folders)} artifacts are damaged")


def trace(
    target: Annotated[
        str,
        typer.Argument(
            help="A fingerprint, an exported folder, models:/NAME/VERSION, or the id of a document.",
            metavar="MODEL|FINGERPRINT|DOCUMENT-ID",
        ),
    ],
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Show what an artifact was made from and went into; or where a document is, and which steps read it."""
    quiet_libraries()
    from flows.lineage import report
    from flows.lineage.documents import DocumentTrace
    from flows.lineage.graph import Graph
    from flows.lineage.target import find_target
    from flows.listeners.terminal import Terminal

    store = Store(home)
    graph = Graph(store)
    found, known = find_target(graph, target), report.Known(store)
    if isinstance(found, DocumentTrace):
        value, lines = report.document_json(found, known), report.document_lines(found, known)
    else:
        value, lines = report.artifact_json(graph, found, known), report.artifact_lines(graph, found, known)
    if as_json:
        print(json.dumps(value, indent=1, allow_nan=False))
        return
    console = Terminal().console
    for line in lines:
        console.print(line)


def find(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Some words that stand in the text alone.", metavar="TEXT...")
    ] = None,
    file: Annotated[list[Path] | None, typer.Option(help="A file that holds the text; repeatable.")] = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Find where a text is: in any file of the home, packed or not, in databases, as tokens, and in MLflow."""
    quiet_libraries()
    from flows.lineage.search import search
    from flows.listeners.terminal import Terminal

    if not home.is_dir():
        raise UserError(f"there is no home {home}")
    found = search(home, [*(texts or ()), *(read_text(path) for path in file or ())])
    if as_json:
        print(json.dumps(asdict(found), indent=1, allow_nan=False))
    else:
        console = Terminal().console
        for place in found.places:
            console.print(place)
        for place in found.unread:
            console.print(f"not looked into: {place}")
        what = f"it is in {len(found.places)} places" if found.places else "it is nowhere"
        where = f"{found.files:,} files ({human_bytes(found.bytes)}) of {home}"
        console.print(f"{what}; looked through {where}")
    if found.places or found.unread:
        raise typer.Exit(1)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {path}: {error}") from None


def removal_json(one: Candidate, left: str) -> dict[str, Any]:
    """Something that is removed, or why it is ``left``."""
    return {"kind": one.kind, "path": str(one.path), "bytes": one.size, "why": one.why, "left": left,
            "copies": list(one.copies)}  # fmt: skip


def gc(
    days: Annotated[float, typer.Option(min=0, help="What runs of so many days refer to is kept.")] = 30,
    artifact: Annotated[
        list[str] | None,
        typer.Option(
            help="Remove this artifact and all that was made from it, though young; repeatable.",
            metavar="FINGERPRINT",
        ),
    ] = None,
    models: Annotated[
        bool, typer.Option("--models", help="With --artifact: registered versions with an alias go too.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this it is only listed.")] = False,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """List what no run of the last days refers to, and with --yes remove it."""
    quiet_libraries()
    from flows.gc import remove, select, survey
    from flows.listeners.terminal import Terminal

    refuse_read_only(home)
    store, console = Store(home), Terminal().console
    if models and not artifact:
        raise UserError("--models goes with an --artifact: name one")
    found = select(store, artifact, models) if artifact else survey(store, days)
    if yes and found.refusal:
        raise UserError(f"nothing is removed: {found.refusal}")
    done = [
        (one, left)
        for one, left in (remove(store, found) if yes else ((one, "") for one in found.candidates))
    ]
    if as_json:
        value = {"removed" if yes else "found": [removal_json(*one) for one in done]}
        kept = [
            {"stage": stage, "fingerprint": name, "why": why} for (stage, name), why in found.kept.items()
        ]
        print(json.dumps({**value, "kept": kept, "refusal": found.refusal}, indent=1, allow_nan=False))
        return
    for one, left in done:
        name = f"{one.path.parent.name:<16}{one.path.name:<26}"
        reason = f"stays: {left}" if left else one.why
        console.print(f"{name}{human_bytes(one.size):>9}  {reason}")
    size = human_bytes(sum(one.size for one, left in done if not left))
    if found.kept:
        reasons = Counter(found.kept.values())
        console.print(f"kept: {', '.join(f'{count} ({why})' for why, count in reasons.most_common())}")
    if yes:
        console.print(f"removed {sum(not left for _, left in done)}, {size}")
    elif found.candidates:
        console.print(f"{len(done)} to be removed, {size}: do it with --yes")
    else:
        console.print(f"nothing in {store.root} is to be removed")
    if found.refusal:
        console.print(f"but nothing would be removed now: {found.refusal}")
