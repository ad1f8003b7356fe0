"""The form of a deployment: a field for each plain setting, and only what a person changed is a setting of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.schema_tools.validation import is_valid_schema, validate

from data_pipeline.core.errors import UserError
from flows.prefect.deployed import pipeline
from flows.prefect.form import (
    OTHERS,
    changed,
    offer_settings,
    offer_steps,
    settings_in,
    together,
    without_defaults,
    written,
)
from flows.recipe import Recipe, apply_override, load_recipe, shipped_recipes
from flows.settings import settings
from flows.stages import STAGES

ROOT = Path(__file__).parents[2]
RECIPE = """
name: tiny
download: {sources: [{name: texts, kind: local, path: texts}]}
pretrain: {tokens: 1024, batch_tokens: 1024, lr: 3.0e-3}
"""


def offered(recipe: Recipe, only: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema of a deployment's form, and what its fields show."""
    schema = pipeline.parameters.model_dump_for_openapi()
    offer_steps(schema, [step.name for step in recipe.steps])
    defaults = offer_settings(schema, recipe, only)
    is_valid_schema(schema)
    return schema, defaults


def untouched(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields as a form sends them where a person only opened all of it."""
    steps = schema["properties"]["config"]["properties"]
    sent = {step: shown_in(one) for step, one in steps.items()}
    for step, fields in sent.items():
        if OTHERS in steps[step]["properties"]:
            fields[OTHERS] = shown_in(schema["definitions"][f"{step}.others"])
    return sent


def shown_in(group: dict[str, Any]) -> dict[str, Any]:
    return {name: one["default"] for name, one in group["properties"].items() if "default" in one}


@pytest.fixture
def tiny(tmp_path: Path) -> Recipe:
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE)
    return load_recipe(file)


def test_the_main_settings_of_a_stage_are_settings():
    known = {one.name for one in settings()}
    assert [
        f"{stage.name}.{one}" for stage in STAGES for one in stage.main if f"{stage.name}.{one}" not in known
    ] == []


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_a_form_that_nobody_touched_is_valid_and_sets_nothing(recipe: str):
    schema, defaults = offered(load_recipe(ROOT / recipe))
    sent = untouched(schema)
    assert validate({"recipe": recipe, "config": sent}, schema) == []
    assert len(changed(sent, {})) == len(defaults) > 60
    assert changed(sent, defaults) == []
    assert without_defaults(sent, defaults) == {}


def test_a_field_has_its_settings_name_type_range_help_and_what_the_recipe_says(tiny: Recipe):
    schema, defaults = offered(tiny)
    steps = schema["properties"]["config"]["properties"]
    assert list(steps) == [*(step.name for step in tiny.steps), "runtime"]
    lr = {name: value for name, value in steps["pretrain"]["properties"]["lr"].items() if name != "position"}
    assert lr == {
        "title": "lr",
        "type": "number",
        "exclusiveMinimum": 0,
        "default": 3e-3,
        "description": "Peak learning rate. Range: above 0.",
    }
    assert steps["pretrain"]["properties"]["precision"]["enum"] == ["auto", "fp32", "bf16"]
    either = steps["pretrain"]["properties"]["runtime.micro_batch"]["anyOf"]
    assert [one["title"] for one in either] == ["integer", "auto"]
    assert "default" not in steps["pretrain"]["properties"]["depth"], "the recipe leaves it open"
    assert "optimizer.momentum" in schema["definitions"]["pretrain.others"]["properties"]
    assert not [name for name in defaults if name.startswith("download.sources")], (
        "that is a list of settings"
    )
    assert "defaults" not in schema["properties"]


def test_a_step_that_runs_alone_has_its_own_fields_only(tiny: Recipe):
    schema, defaults = offered(tiny, "clean")
    assert list(schema["properties"]["config"]["properties"]) == ["clean", "runtime"]
    assert {name.partition(".")[0] for name in defaults} == {"clean", "runtime"}


def test_a_bound_or_value_that_a_browser_would_round_is_left_to_the_recipe(tiny: Recipe, tmp_path: Path):
    schema, _ = offered(tiny)
    assert "exclusiveMaximum" not in schema["definitions"]["dedup.others"]["properties"]["seed"]
    large = load_recipe(tmp_path / "tiny.yaml", [f"pretrain.seed={2**60 + 1}"])
    assert "pretrain.seed" not in offered(large)[1]


def test_no_secret_is_shown_in_a_field(tmp_path: Path):
    file = tmp_path / "adopts.yaml"
    file.write_text(
        "name: adopts\nadopt: {type: tokenizer, path: here, origin: 'https://user:hidden@example.org/x?signature=hidden'}\n"
    )
    schema, defaults = offered(load_recipe(file))
    assert "hidden" not in json.dumps([schema, defaults])
    assert defaults["adopt.path"] == "here"


def test_what_is_changed_is_a_setting_as_the_command_line_takes_it():
    defaults = {"pretrain.lr": 3e-3, "pretrain.tokens": 1024, "pretrain.optimizer.momentum": 0.95}
    fields = {
        "pretrain": {"lr": 1e-5, "tokens": 1024, OTHERS: {"optimizer.momentum": 0.9}},
        "export": {OTHERS: None},
    }
    assert changed(fields, defaults) == ["pretrain.lr=1e-05", "pretrain.optimizer.momentum=0.9"]
    assert without_defaults(fields, defaults) == {
        "pretrain": {"lr": 1e-5, OTHERS: {"optimizer.momentum": 0.9}}
    }
    run = {"settings": ["clean=null"], "config": fields, "defaults": defaults}
    assert settings_in(run) == ["clean=null", "pretrain.lr=1e-05", "pretrain.optimizer.momentum=0.9"]
    assert settings_in({}) == []


def test_a_field_that_settings_name_too_is_refused():
    assert together(["pretrain.lr=1"], ["pretrain.tokens=2"]) == ["pretrain.lr=1", "pretrain.tokens=2"]
    for listed in ("pretrain.model.layers=2", "pretrain.model={layers: 2}", "pretrain=null"):
        with pytest.raises(UserError, match=r"pretrain\.model\.layers is set twice"):
            together([listed], ["pretrain.model.layers=3"])


@pytest.mark.parametrize(
    "value",
    ["bf16", "null", "1e-3", "yes", "", " a ", "a: b", "a # b", "'", '"\\', "a\nb", "日本語 🧹", True, None, 3, 0.5,
     ["", "x"]],
)  # fmt: skip
def test_a_value_is_read_as_it_was_sent(value: Any):
    values: dict[str, Any] = {}
    apply_override(values, f"step.field={written(value)}")
    assert values == {"step": {"field": value}}
    assert written("bf16") == "bf16", "as a person would write it"
