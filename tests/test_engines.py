"""The engines: threads, processes, Dask and Ray make the same bytes, tell the same mistakes, and stop alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Llmill
from conftest import RECIPE

from data_pipeline.core.errors import UserError
from flows.engine.parts import unfit, versions
from flows.recipe import RecipeRuntime

STAGES = ["download", "clean", "dedup", "train_tokenizer", "tokenize"]
MANY_SHARDS = RECIPE.replace("shard_bytes: 150_000", "shard_bytes: 100_000")

RUNS = """
import sys
from pathlib import Path

from flows.engine.plan import Planned, Selection
from flows.recipe import load_recipe
from flows.prefect.servers import PrefectServer

def main(recipe, homes, engines):
    with PrefectServer(homes):
        from flows.engine.order import Order
        from flows.prefect.pipeline import Pipeline

        for engine in engines:
            runner, workers = engine.split("-")
            loaded = load_recipe(recipe, [f"runtime.task_runner={runner}", f"runtime.workers={workers}"])
            home = homes / (engines[0] if engine == engines[-1] else engine)  # the last one, in the home of the first
            planned = Planned.of(loaded, home, Selection(stop="tokenize"))
            with Pipeline(Order(planned=planned, name="ours", command=""), {}) as run:
                run.prepare()
                with run.flow({}) as begin:
                    begin()
            print(engine, *[result.how for result in run.executor.results.values()])

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
"""

FAILURES = """
import sys, time
from functools import partial
from pathlib import Path

from data_pipeline.core.errors import UserError
from flows.prefect.servers import PrefectServer

def step(folder, item):
    time.sleep(0.05)
    if item % 5 == 2:
        raise UserError("an item is broken")
    (folder / f"{item}.txt").write_text("done")

def main(folder, engines):
    from work import step  # this file, by a name that workers can import

    with PrefectServer(folder):
        from prefect import flow
        from flows.engine.events import StepStarted
        from flows.engine.log import LogFile, RunLog
        from flows.prefect.context import PrefectContext
        from flows.recipe import RecipeRuntime
        from flows.prefect.runners import start_workers

        started = StepStarted(step="stage", stage="stage", fingerprint="f00d", key="1", run="2")
        log = RunLog(LogFile.begin(folder, "failures", "home"))

        for engine in engines:
            out = folder / engine
            out.mkdir()
            with start_workers(RecipeRuntime(task_runner=engine, workers=2), out) as workers:
                @flow(task_runner=workers.task_runner())
                def stage():
                    context = PrefectContext(started, out, log, workers)
                    context.map(partial(step, out), range(1000))

                try:
                    stage()
                except Exception as error:
                    written = len(list(out.glob("*.txt")))
                    time.sleep(0.5)
                    print(engine, repr(error), 0 < written < 50, len(list(out.glob("*.txt"))) - written)

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
"""


def drive(script: str, folder: Path, *arguments: str, **environment: str) -> list[str]:
    """What a script prints, run in a process of its own; it must print nothing else, and no trace."""
    (folder / "work.py").write_text(script)
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[1])])
    result = subprocess.run(
        [sys.executable, str(folder / "work.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    "engines",
    [
        ["processes-1", "processes-4", "dask-2"],
        pytest.param(["processes-4", "threads-2", "ray-2", "dask-2"], marks=pytest.mark.long),
    ],
)
def test_whatever_computes_a_run_it_ends_with_the_same_bytes(engines, make_llmill, prefect_server, tmp_path):
    recipe = make_llmill(recipe=MANY_SHARDS).recipe
    printed = drive(
        RUNS, tmp_path, str(recipe), str(tmp_path), *engines, "dask-1",
        MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db",
    )  # fmt: skip
    said = [line.split() for line in printed if line.split()[0] in (*engines, "dask-1")]
    assert said[:-1] == [[engine, *["ran"] * 5] for engine in engines]
    assert said[-1] == ["dask-1", *["reused"] * 5], "what one engine sealed, another one uses"

    first, *others = [Llmill(tmp_path / engine, recipe).payloads() for engine in engines]
    assert {name.split("/")[0] for name in first} == set(STAGES)
    for engine, payloads in zip(engines[1:], others, strict=True):
        assert payloads == first, engine
    [manifest] = (tmp_path / "dask-2").glob("store/dedup/*/manifest.json")
    metrics = json.loads(manifest.read_text())["metrics"]
    assert metrics["removed/exact"] + metrics["removed/near"] == 2
    assert len(list(manifest.parent.glob("documents-*.parquet"))) > 4


@pytest.mark.long
def test_a_failing_item_is_told_as_what_it_is_and_nothing_goes_on_writing(tmp_path, prefect_server):
    engines = ["threads", "processes", "dask", "ray"]
    printed = drive(FAILURES, tmp_path, str(tmp_path), *engines)
    assert printed == [f"{engine} UserError('an item is broken') True 0" for engine in engines]


@pytest.mark.parametrize(
    ("engine", "address"), [("dask", "127.0.0.1:9"), ("dask", "nonsense"), ("ray", "127.0.0.1:9")]
)
def test_an_address_where_no_cluster_is_is_told_in_a_line(engine, address, monkeypatch):
    from flows.prefect import runners

    monkeypatch.setattr(runners, "CONNECT_SECONDS", 1)
    with pytest.raises(UserError, match=rf"runtime.address: no \w+ \w+ at {address}"):
        runners.reach(RecipeRuntime(task_runner=engine, address=address))


def test_a_missing_extra_is_named(monkeypatch):
    from flows.prefect import runners

    monkeypatch.setattr(runners, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'llmill\[ray\]'"):
        runners.reach(RecipeRuntime(task_runner="ray"))


def test_a_worker_that_lacks_the_home_or_the_server_or_our_versions_says_so(tmp_path, prefect_server):
    seen = tmp_path / "seen"
    assert "that all workers share" in unfit(seen, prefect_server, versions())
    seen.touch()
    assert unfit(seen, prefect_server, versions()) == ""
    assert "set PREFECT_API_URL" in unfit(seen, "http://127.0.0.1:9/api", versions())
    other = {**versions(), "pyarrow": "1.0"}
    assert f"pyarrow {versions()['pyarrow']} (here 1.0)" in unfit(seen, prefect_server, other)
