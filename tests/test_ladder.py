"""``llmill ladder`` and ``llmill forecast``: trainings of some sizes and budgets, the law of their loss, and forecasts
that are sealed before their recipes run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Llmill
from mlflow import MlflowClient

from flows.recipe import load_recipe
from flows.scaling.record import read_forecasts, read_ladder

SMALL = (
    *("--set", "train_tokenizer.vocab_size=300", "--set", "pretrain.model.width=16"),
    *("--set", "download.sources.0.split_chars=2000"),
)
BUDGETS = "1.2e10,2.4e10,4.8e10"
LARGER = (*SMALL, "--set", "pretrain.tokens=921_600")


@pytest.fixture(scope="module")
def llmill(make_llmill: Callable[..., Llmill]) -> Llmill:
    """A home with a ladder of three budgets, three sizes and one seed, of which the last run is made already."""
    made = make_llmill()
    made("ladder", str(made.recipe), "--flops", BUDGETS, "--sizes", "3", "--seeds", "1", *SMALL)
    return made


def ladder_name(llmill: Llmill) -> str:
    [path] = (llmill.home / "ladders").glob("*.json")
    return path.stem


@pytest.mark.long
def test_the_runs_are_of_their_budgets_and_share_what_they_can(llmill: Llmill) -> None:
    record = read_ladder(llmill.home, "latest")
    assert record.name == ladder_name(llmill)
    assert len(record.rungs) == 9
    for one in record.rungs:
        assert one.flops == pytest.approx(one.budget, rel=0.05)
        assert 1 < one.loss < 8
    for budget in record.ladder.budgets:
        sizes = [one.parameters for one in record.rungs if one.budget == budget]
        assert sorted(set(sizes)) == sizes
        assert len(sizes) == 3
    for stage, count in {"tokenize": 1, "train_tokenizer": 1, "pretrain": 9, "evaluate": 9}.items():
        assert len(list((llmill.home / "store" / stage).glob("[!.]*"))) == count, stage
    assert record.flops_per_second > 0


@pytest.mark.long
def test_again_it_trains_nothing_and_says_the_same(llmill: Llmill) -> None:
    before = read_ladder(llmill.home, "latest").rungs
    said = llmill(
        "ladder", str(llmill.recipe), "--flops", BUDGETS, "--sizes", "3", "--seeds", "1", *SMALL
    ).stdout
    assert read_ladder(llmill.home, "latest").rungs == before
    assert "9 runs of 72 steps, of which 0 are built" in said
    for words in ("L(N, D) = ", "the best size grows as FLOPs^", "tokens a parameter", "by the parabola"):
        assert words in said
    assert len(list((llmill.home / "ladders").iterdir())) == 1


@pytest.mark.long
def test_it_is_one_parent_in_mlflow_with_its_page(llmill: Llmill) -> None:
    client = MlflowClient(f"sqlite:///{llmill.home / 'mlflow.db'}")
    experiments = [one.experiment_id for one in client.search_experiments()]
    parents = [
        run
        for run in client.search_runs(experiments, "tags.`llmill.kind` = 'sweep'")
        if run.info.run_name.startswith("ladder of 1.2e10")
    ]
    assert [run.info.status for run in parents] == ["FINISHED"] * len(parents)
    assert "L(N, D) = " in parents[0].data.tags["mlflow.note.content"]
    assert "ladder.html" in {one.path for one in client.list_artifacts(parents[0].info.run_id)}
    children = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parents[-1].info.run_id}'")
    assert len(children) == 9


@pytest.mark.long
def test_a_forecast_is_sealed_before_its_recipe_runs_and_scored_when_it_has(
    llmill: Llmill, tmp_path: Path
) -> None:
    recipe = str(llmill.recipe)
    said = llmill("forecast", recipe, *LARGER, "--set", "runtime.price_per_hour=3").stdout
    assert said.startswith("forecast 1: ")
    assert "times the largest budget of ladder" in " ".join(said.split())
    assert "at 3 an hour" in said
    llmill("forecast", recipe, *LARGER, "--set", "pretrain.seed=1", "--json")
    assert "none of them has run yet" in llmill("forecasts").stdout

    llmill("run", recipe, *LARGER)
    first, second = json.loads(llmill("forecasts", "--json").stdout)
    assert (first["outcome"] in ("inside", "outside"), second["outcome"]) == (True, "has not run")
    assert (first["outcome"] == "inside") == (first["low"] <= first["measured"] <= first["high"])
    assert first["middle"] == pytest.approx(first["measured"], rel=0.3)
    assert first["beyond"] > 1
    assert " of 1 lie inside their bounds" in llmill("forecasts").stdout

    refused = llmill("forecast", recipe, *LARGER, code=2).stderr
    assert "pretrain of this recipe is made already: there is nothing to foresee" in refused
    assert len(read_forecasts(llmill.home)) == 2

    for change in ("edited", "taken out"):
        home = tmp_path / change
        shutil.copytree(llmill.home / "forecasts", home / "forecasts")
        path = home / "forecasts" / "00001.json"
        if change == "edited":
            path.write_text(path.read_text().replace('"number": 1', '"number": 7'))
        else:
            path.unlink()
        assert (
            "is not what was written, or one before it was"
            in llmill("forecasts", "--home", str(home), code=2).stderr
        )


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ladder", "{recipe}", "--flops", "1e9,2e9"), "give 3 rising budgets at least"),
        (("ladder", "{recipe}", "--flops", "3e9,2e9,1e9"), "give 3 rising budgets at least"),
        (("ladder", "{recipe}", "--flops", "much"), "write it as 1e14,3e14,1e15"),
        (("ladder", "{recipe}", "--flops", "1e6,2e6,3e6"), "too small to differ"),
        (("forecast", "{recipe}", "--ladder", "nobody"), "no ladder is called nobody; there are small-"),
        (
            (
                "forecast",
                "{recipe}",
                *LARGER,
                "--set",
                "pretrain.seed=5",
                "--set",
                "evaluate.max_documents=3",
            ),
            "measured on another text than ladder",
        ),
        (("forecast", "{recipe}", "--set", "pretrain.tokens=921_600"), "another text than ladder"),
    ],
)
def test_what_can_not_be_foreseen_is_refused(
    arguments: tuple[str, ...], message: str, llmill: Llmill
) -> None:
    said = llmill(*(one.format(recipe=llmill.recipe) for one in arguments), code=2).stderr
    assert message in " ".join(said.split())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("pretrain.decay_at=4096", "pretrain.schedule.kind=wsd", "pretrain.schedule.warmup_steps=1"),
            "set tokens",
        ),
        (("pretrain.init_from=folder",), "trainings that begin from nothing"),
    ],
)
def test_trainings_of_which_no_law_holds_are_refused(
    settings: tuple[str, ...], message: str, make_llmill: Callable[..., Llmill]
) -> None:
    fresh = make_llmill()
    changes = [word for one in settings for word in ("--set", one)]
    said = fresh("ladder", str(fresh.recipe), "--flops", BUDGETS, *changes, code=2).stderr
    assert message in " ".join(said.split())


def test_without_a_ladder_nothing_is_foreseen(make_llmill: Callable[..., Llmill]) -> None:
    fresh = make_llmill()
    assert "has none yet; llmill ladder RECIPE" in fresh("forecast", str(fresh.recipe), code=2).stderr
    assert "has no forecast yet" in fresh("forecasts").stdout
    assert load_recipe(fresh.recipe).runtime.price_per_hour is None
