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
from data_pipeline.context import LocalContext
from flows.servers import client_settings

RECIPE = ROOT / "flows" / "recipes" / "quickstart.yaml"


def directly(settings: list[str], work: str, cores: int) -> Work:
    """Every stage's body in order, on folders."""
    from flows import launch
    from flows.recipe import load_recipe
    from flows.stages import STAGES

    recipe = load_recipe(RECIPE, settings)
    home = Path(work, "direct")

    def run() -> dict[str, Any]:
        shutil.rmtree(home, ignore_errors=True)
        before = cpu_seconds()
        bodies = {}
        with LocalContext(cores, launch.local) as context:
            for stage in STAGES:
                out = home / stage.name
                out.mkdir(parents=True)
                config = getattr(recipe, stage.name).resolve()
                clock = time.monotonic()
                stage.body(config, {name: home / name for name in stage.inputs}, out, context)
                bodies[stage.name] = time.monotonic() - clock
        return {
            "bodies": bodies,
            "cpu": cpu_seconds() - before,
            "step": step_seconds(home / "pretrain"),
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
    from flows.pipeline import Run
    from flows.plan import Selection
    from flows.recipe import load_recipe
    from flows.servers import PrefectServer
    from flows.terminal import Terminal

    recipe = load_recipe(RECIPE, settings)
    assert recipe.runtime.worker_count == cores

    def run() -> dict[str, Any]:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        before = cpu_seconds(servers)
        with PrefectServer(home) as server:
            pipeline = Run(recipe, home, Selection(), Terminal(), "")
            pipeline.prepare()
            server.wait()
            pipeline.execute({"recipe": str(RECIPE)})
            rest = pipeline.overhead_seconds
        bodies = {name: result.seconds for name, result in pipeline.results.items()}
        step = step_seconds(pipeline.results["pretrain"].artifact.path)
        return {
            "bodies": bodies,
            "rest": rest,
            "cpu": cpu_seconds(servers) - before,
            "step": step,
        }

    return run


def step_seconds(pretrain: Path) -> float:
    """From one step of a training to the next, the median."""
    events = map(json.loads, (pretrain / "logs" / "events.jsonl").read_text().splitlines())
    return statistics.median(
        later - earlier
        for earlier, later in pairwise(event["time"] for event in events if event["event"] == "step")
    )


def cpu_seconds(servers: Sequence[int] = ()) -> float:
    """Processor time so far: ours, that of processes we waited for, and that of servers with what they started."""
    ours = os.times()
    total = ours.user + ours.system + ours.children_user + ours.children_system
    for server in map(psutil.Process, servers):
        for process in (server, *server.children(recursive=True)):
            times = process.cpu_times()
            total += times.user + times.system
    return total
