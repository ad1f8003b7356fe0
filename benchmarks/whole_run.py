"""The quickstart from sources to an exported model: its bodies called directly, and `llmill run`."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import ROOT, Work
from data_pipeline.stage import LocalContext
from flows.prefect.servers import client_settings
from flows.recipe import Recipe, load_recipe

RECIPE = ROOT / "flows" / "recipes" / "quickstart.yaml"


def directly(settings: list[str], work: str, cores: int, servers: Sequence[int] = ()) -> Work:
    """Every stage's body in order, on folders; ``servers`` are processes that have nothing to do with it."""
    from flows.engine import launch

    recipe = load_recipe(RECIPE, settings)
    load_bodies(recipe)
    home = Path(work, "direct")
    training = watch_training(servers)

    def run() -> dict[str, Any]:
        shutil.rmtree(home, ignore_errors=True)
        before = cpu_seconds(servers)
        bodies = {}
        with LocalContext(cores, launch.local) as context:
            for step in recipe.steps:
                out = home / step.name
                out.mkdir(parents=True)
                config = step.config.resolve()
                clock = time.monotonic()
                folders = {type_: home / name for type_, name in step.sources.items()}
                step.stage.body(config, folders, out, context)
                bodies[step.name] = time.monotonic() - clock
        return {
            "bodies": bodies,
            "cpu": sum(cpu_seconds(servers)) - sum(before),
            "step": step_seconds(home / "pretrain"),
            "training": training,
        }

    return run


def through(
    settings: list[str], work: str, cores: int, environment: dict[str, str], servers: Sequence[int] = ()
) -> Work:
    """``llmill run`` on a new home; ``servers`` are the processes of servers that it uses."""
    os.environ.update(environment)
    for name, value in client_settings("http://").items():  # before Prefect is imported
        os.environ.setdefault(name, value)
    home = Path(work, "home")
    from flows.engine.order import Order
    from flows.engine.plan import Planned, Selection
    from flows.listeners.terminal import Terminal, TerminalListener
    from flows.prefect.pipeline import Pipeline
    from flows.prefect.servers import PrefectServer

    recipe = load_recipe(RECIPE, settings)
    assert recipe.runtime.worker_count == cores
    load_bodies(recipe)
    training = watch_training(servers)

    def run() -> dict[str, Any]:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        before = cpu_seconds(servers)
        order = Order(name="measured", planned=Planned.of(recipe, home, Selection()), command="")
        listeners = {"the terminal": TerminalListener(Terminal())}
        with PrefectServer(home) as server, Pipeline(order, listeners) as pipeline:
            pipeline.prepare()
            server.wait()
            with pipeline.flow({"recipe": str(RECIPE)}) as begin:
                begin()
        rest, results = pipeline.executor.overhead_seconds, pipeline.executor.results
        bodies = {name: result.seconds for name, result in results.items()}
        step = step_seconds(results["pretrain"].artifact.path)
        return {
            "bodies": bodies,
            "rest": rest,
            "cpu": sum(cpu_seconds(servers)) - sum(before),
            "step": step,
            "training": training,
        }

    return run


def load_bodies(recipe: Recipe) -> None:
    """Import what the stages compute with, which takes seconds."""
    for step in recipe.steps:
        _ = step.stage.body


def step_seconds(pretrain: Path) -> float:
    """Return the median time from one step of a training to the next, in seconds."""
    events = map(json.loads, (pretrain / "logs" / "events.jsonl").read_text().splitlines())
    return statistics.median(
        later - earlier
        for earlier, later in pairwise(event["time"] for event in events if event["event"] == "step")
    )


def watch_training(servers: Sequence[int]) -> dict[str, float]:
    """Let the launcher measure how long its processes are at work, and what others take of the processors meanwhile.

    Returns what is to hold these once it has been called: ``seconds``, and ``beside``, the processor time of this
    process and the servers.
    """
    from flows.engine import launch

    measured: dict[str, float] = {}
    start = launch.local

    def local(*arguments: Any, **more: Any) -> None:
        clock, (before, _) = time.monotonic(), cpu_seconds(servers)
        start(*arguments, **more)
        measured["seconds"] = time.monotonic() - clock
        measured["beside"] = cpu_seconds(servers)[0] - before

    launch.local = local
    return measured


def cpu_seconds(servers: Sequence[int]) -> tuple[float, float]:
    """Processor time so far: ours and that of servers with what they started; that of processes we waited for."""
    ours = os.times()
    beside = ours.user + ours.system
    for server in map(psutil.Process, servers):
        for process in (server, *server.children(recursive=True)):
            times = process.cpu_times()
            beside += times.user + times.system
    return beside, ours.children_user + ours.children_system
