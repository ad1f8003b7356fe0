"""Names of runs: they say what was set, are the same everywhere, and a run keeps its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from command_line import Llmill, kill_tree
from mlflow import MlflowClient
from prefect.utilities.names import generate_slug

from flows.engine.continuation import Continuation, plan_id
from flows.engine.naming import in_words
from flows.engine.plan import Step
from flows.prefect.names import is_made_up
from flows.recipe import Recipe
from flows.stages import STAGES


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["pretrain.lr=1e-3", "pretrain.seed=1"], "lr=1e-3 seed=1"),
        (["pretrain.lr=1e-3", "pretrain_b.lr=2e-3"], "pretrain.lr=1e-3 pretrain_b.lr=2e-3"),
        (["runtime.workers=1", "pretrain.runtime.ranks=2"], ""),
        (["download.sources.0.path=/a/very/long/path/to/some/books"], ""),
        (["download.sources.0.path=книги/本"], "path=книги/本"),
        (["pretrain.token=hf_secret"], "token=***"),
        ([f"clean.rule{number}.value={number}" for number in range(9)], None),
    ],
)
def test_a_name_says_what_was_set(settings: list[str], said: str | None) -> None:
    text = in_words(settings)
    if said is None:
        assert text.endswith("…")
        assert len(text) < 65
    else:
        assert text == said


def test_a_name_that_prefect_makes_up_is_told_from_one_that_a_person_types() -> None:
    assert all(is_made_up(generate_slug(2)) for _ in range(500))
    assert all(map(is_made_up, ("mu929-sarona", "eta3-loren-manifold", "mu424-acanceh-g", "Awesome-Corkie")))
    typed = (
        "second-try",
        "baseline",
        "lr-up",
        "größe-テスト",
        "a b",
        "",
        "beta-test",
        "mu2",
        "Small-batches",
    )
    assert not any(map(is_made_up, typed))


@pytest.fixture(scope="module")
def named(make_llmill: Any) -> Llmill:
    return make_llmill()


def runs(llmill: Llmill) -> list[Any]:
    """The whole runs of the home in MLflow, oldest first."""
    client = MlflowClient(f"sqlite:///{llmill.home}/mlflow.db")
    experiment = client.get_experiment_by_name("small")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    return [run for run in found if "llmill.stage" not in run.data.tags]


@pytest.mark.long
def test_a_run_has_one_name_everywhere_and_one_that_resumes_it_keeps_it(
    named: Llmill, prefect_server: str
) -> None:
    words = ("--set", "clean.min_chars=3", "--to", "clean")
    run = named.start("run", str(named.recipe), *words, "--note", "shorter ones too: 短い")
    while not list(named.home.glob("store/download/*/manifest.json")):
        assert run.poll() is None, run.communicate()
    kill_tree(run)
    out = named.run(*words).stdout
    [whole] = runs(named)
    name = whole.info.run_name
    assert name.startswith("min_chars=3 · ")
    assert out.count(f"run “{name}”") == 2, "at its beginning, and where MLflow has it"
    assert f"MLflow  run “{name}” of experiment small" in out
    asked = {"flow_runs": {"name": {"any_": [name]}}}
    found = httpx.post(f"{prefect_server}/flow_runs/filter", json=asked).raise_for_status().json()
    assert {run["name"] for run in found} == {name}
    assert len(found) >= 1


def test_a_run_is_named_by_a_person_or_after_what_differs_from_the_nearest(named: Llmill) -> None:
    named.run("--to", "clean", "--name", "第一 run", "--note", "a note: <b>何</b>")
    assert runs(named)[-1].info.run_name == "第一 run"
    assert "a note: " in runs(named)[-1].data.tags["mlflow.note.content"]
    text = named.recipe.read_text().replace("clean:\n", "clean:\n  max_chars: 90_000\n")
    Path(named.recipe).write_text(text)
    named.run("--to", "clean")
    assert runs(named)[-1].info.run_name.startswith("max_chars=90000 · ")
    named.run("--to", "clean")
    assert runs(named)[-1].info.run_name.startswith("small · ")


def test_a_recipe_that_is_called_as_a_stage_has_a_run_beside_the_step(tmp_path: Path) -> None:
    for stage in STAGES:
        keys = Continuation(tmp_path)
        step = Step(name=stage.name, stage=stage, action="run", why=[], fingerprint="0123456789abcdef")
        run = keys.claim(plan_id(Recipe(name=stage.name), [step]), "a name")
        assert keys.step(stage.name, "0123456789abcdef").key != run.key
        keys.release()
