"""What a plan says when something can't be known from here."""

from pathlib import Path

import pytest

from data_pipeline.context import UserError
from flows.plan import Selection, make_plan
from flows.recipe import load_recipe
from flows.store import Store

ROOT = Path(__file__).parents[2]


def test_a_hub_out_of_reach_leaves_the_rest_of_the_plan_standing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = load_recipe(ROOT / "flows/recipes/fineweb_edu.yaml")
    first, *rest = make_plan(recipe, Store(tmp_path))
    assert first.action == "unknown"
    assert "fineweb" in first.why[0]
    assert all(step.action == "unknown" and step.why[0].startswith("waits for") for step in rest)
    assert all(step.config is not None for step in rest)


@pytest.mark.parametrize(
    ("selection", "runs", "goes_as_far_as"),
    [
        (Selection(), ["clean", "tokenize", "export"], "export"),
        (Selection(only="tokenize"), ["tokenize"], "tokenize"),
        (Selection(start="tokenize"), ["tokenize", "export"], "export"),
    ],
)
def test_a_selection_says_what_may_run_and_how_far(selection, runs, goes_as_far_as):
    for stage in ("clean", "tokenize", "export"):
        assert selection.may_run(stage) == (stage in runs)
    assert selection.includes(goes_as_far_as)
    assert selection.includes("export") == (goes_as_far_as == "export")


def test_a_selection_that_makes_no_sense_is_refused():
    with pytest.raises(UserError, match="exclude one another"):
        Selection(start="clean", only="dedup")
    with pytest.raises(UserError, match="no such stage"):
        Selection(force="cleam")
