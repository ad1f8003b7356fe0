"""``llmill``: run, plan and look at recipes from the command line.

Exit codes: 0 done, 1 a stage failed, 2 the user's mistake (one or two lines say what to do), 130 stopped.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import socket
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from data_pipeline.context import UserError, human_bytes

# Everything heavy (torch, Prefect, MLflow) is imported by the command that needs it: worker processes import
# this module too, and `llmill --help` should answer at once.

app = typer.Typer(
    help="Raw text to an evaluated, exported language model, as one pipeline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RecipePath = Annotated[Path, typer.Argument(help="A recipe, such as flows/recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="STAGE.FIELD=VALUE", help="Change one setting; repeatable."),
]
Home = Annotated[Path, typer.Option(envvar="LLMILL_HOME", help="Where everything is kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
HOME = Path(".llmill")


@app.command()
def run(
    recipe: RecipePath,
    set_: Overrides = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Run from this stage on; earlier ones are sealed.")
    ] = None,
    stop: Annotated[str | None, typer.Option("--to", help="Run no stage after this one.")] = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone; its inputs are sealed.")] = None,
    force: Annotated[str | None, typer.Option(help="Build this stage again although it is sealed.")] = None,
    home: Home = HOME,
    debug: Annotated[bool, typer.Option(help="Show the trace of an error.")] = False,
) -> None:
    """Run a recipe: reuse what is sealed, resume what is unfinished, build the rest."""
    quiet_libraries()
    from flows.plan import Selection
    from flows.recipe import load_recipe
    from flows.servers import PrefectServer
    from flows.terminal import Terminal, fail

    selection, loaded = Selection(start, stop, only, force), load_recipe(recipe, set_ or ())
    writable(home)
    end_like_ctrl_c()
    save_when_asked()
    terminal = Terminal()
    terminal.title(f"{loaded.name}  ·  {recipe}  ·  {home}")
    with PrefectServer(home) as server:
        from flows.pipeline import Run  # Prefect reads its settings when it is imported

        pipeline = Run(loaded, home, selection, terminal, f"`{typed()}`")
        try:
            pipeline.prepare()
            server.wait()
            pipeline.execute()
        except KeyboardInterrupt:
            fail(f"stopped; the same command goes on from here: {typed()}")
            raise typer.Exit(130) from None
        report(pipeline, home)


def report(pipeline: Any, home: Path) -> None:
    """The end of a run: the table, what it cost, and where to look."""
    from flows.terminal import duration

    console, results = pipeline.terminal.console, pipeline.results.values()
    pipeline.terminal.summary((result.artifact, result.how, result.seconds) for result in results)
    reused = sum(result.how == "reused" for result in results)
    seconds = duration(sum(result.seconds for result in results))
    what = "every stage was reused" if reused == len(results) else f"{reused} of {len(results)} stages reused"
    console.print(f"\n{what}; stages {seconds}, everything else {duration(pipeline.overhead_seconds)}")
    if exported := pipeline.results.get("export"):
        console.print(f"model   {exported.artifact.path}")
    tracker = pipeline.tracker
    if tracker.failure:
        pipeline.terminal.note(
            f"not all figures reached MLflow at {tracker.uri}: {tracker.failure}", warning=True
        )
    elif tracker.parent_name:
        console.print(f"MLflow  run “{tracker.parent_name}” of experiment {pipeline.recipe.name}")
    option = "" if home == HOME else f" --home {home}"
    speak = f'   ·   llmill generate{option} --prompt "..."' if exported else ""
    console.print(f"next    llmill ui{option}{speak}")


@app.command()
def plan(recipe: RecipePath, set_: Overrides = None, home: Home = HOME, as_json: AsJson = False) -> None:
    """Say what a run would do, stage by stage, and why; runs nothing."""
    from flows.plan import make_plan
    from flows.recipe import load_recipe
    from flows.store import Store
    from flows.terminal import Terminal, headline

    quiet_libraries()
    steps = make_plan(load_recipe(recipe, set_ or ()), Store(home))
    if as_json:
        print(json.dumps([step.as_json() for step in steps], indent=1))
        return
    console = Terminal().console
    for step in steps:
        mark = {"reuse": "= reuse  ", "run": "+ run    ", "resume": "> resume ", "unknown": "? unknown"}[
            step.action
        ]
        first, *rest = step.why or [headline(step.artifact) if step.artifact else ""]
        console.print(f"{mark} {step.stage.name:<16}{step.fingerprint or '-':<18}{first}")
        for line in [*rest, *step.predicted]:
            console.print(f"{'':<44}{line}")


@app.command()
def status(home: Home = HOME, as_json: AsJson = False) -> None:
    """List what is sealed and what is unfinished, with sizes and places."""
    from flows.store import Store
    from flows.terminal import Terminal, headline

    store = Store(home)
    artifacts, unfinished = store.artifacts(), store.unfinished()
    if as_json:
        sealed = [
            {"stage": a.stage, "fingerprint": a.fingerprint, "bytes": a.size, "path": str(a.path),
             "finished": a.manifest["finished"], "recipe": a.manifest["recipe"], "metrics": a.metrics}
            for a in artifacts
        ]  # fmt: skip
        print(json.dumps({"sealed": sealed, "unfinished": [str(path) for path in unfinished]}, indent=1))
        return
    console = Terminal().console
    if not artifacts and not unfinished:
        console.print(
            f"nothing is sealed in {home} yet; start with: llmill run flows/recipes/quickstart.yaml"
        )
    for artifact in artifacts:
        size, when = human_bytes(artifact.size), artifact.manifest["finished"][:16].replace("T", " ")
        console.print(f"{artifact.stage:<16}{artifact.fingerprint}  {size:>9}  {when}  {headline(artifact)}")
    for path in unfinished:
        console.print(f"{path.parent.name:<16}{path.name.removesuffix('.partial')}  unfinished")
    total = human_bytes(sum(artifact.size for artifact in artifacts))
    console.print(f"{len(artifacts)} sealed, {total}, in {store.root}")


@app.command()
def verify(
    fingerprint: Annotated[str | None, typer.Argument(help="One artifact; without it, all.")] = None,
    home: Home = HOME,
) -> None:
    """Check sealed files against their checksums."""
    from flows.store import Damaged, Store
    from flows.terminal import Terminal

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
            console.print(f"    build it again with: llmill run RECIPE --force {artifact.stage}")
    if bad:
        raise UserError(f"{bad} of {len(folders)} artifacts are damaged")


@app.command()
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


@app.command()
def join(
    job: Annotated[Path, typer.Argument(help="The job.json that the first machine names.")],
) -> None:
    """Run this machine's part of a training that another machine started; see docs/training.md."""
    from flows import launch
    from llm.pretrain import Job

    if not job.is_file():
        raise UserError(f"{job}: there is no such file; the machines must see the store under one path")
    ranks = Job.model_validate_json(job.read_text(encoding="utf-8")).config.runtime.ranks
    sys.exit(launch.join("llm.trainer", job, ranks))


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where on this machine.")] = 5000,
    home: Home = HOME,
) -> None:
    """Open MLflow's web pages on the runs of this home; stop with Ctrl-C."""
    from flows.tracking import tracking_uri

    uri = tracking_uri(home)
    if uri.startswith("http"):
        typer.echo(f"the runs are on the MLflow server at {uri}")
        return
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (home / "mlflow.db").exists():
        raise UserError(f"no runs in {home} yet; start with: llmill run flows/recipes/quickstart.yaml")
    with socket.socket() as listener:
        if listener.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"port {port} of this machine is in use; name another with --port")
    typer.echo(f"MLflow on http://127.0.0.1:{port}  (Ctrl-C stops it)")
    sys.stdout.flush()
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    arguments = ["--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)]
    quiet = ["--uvicorn-opts", "--log-level warning"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *arguments, *quiet])


def writable(home: Path) -> None:
    """Make the home folder, or say why not."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        if not os.access(home, os.W_OK):
            raise PermissionError("it can't be written to")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--home {home}: {reason}; name another folder with --home or LLMILL_HOME") from None


def typed() -> str:
    """The command line as a person typed it, to be typed again."""
    home = os.environ.get("LLMILL_HOME")
    prefix = f"LLMILL_HOME={shlex.quote(home)} " if home and "--home" not in sys.argv else ""
    return prefix + shlex.join(["llmill", *sys.argv[1:]])


def end_like_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP unwind as Ctrl-C does, so that ranks, workers and our server end with us."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


def save_when_asked() -> None:
    """Let SIGUSR1 have a training that runs write a checkpoint, and go on."""
    from flows import launch

    signal.signal(signal.SIGUSR1, lambda number, frame: launch.save_asked.set())


def quiet_libraries() -> None:
    """Settings that keep libraries from printing what a user can do nothing about. Before their import."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONWARNINGS": "ignore",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.raiseExceptions = False  # a log record that can't be delivered is no news for the terminal


def main() -> None:
    """Entry point: run the command; turn what went wrong into a few lines and an exit code."""
    from flows.terminal import fail

    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, UserError):
            fail(str(error))
            sys.exit(2)
        fail(str(error) if type(error).__name__ == "StageFailed" else f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
