"""What follows from the one dial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flows.engine.plan import make_plan
from flows.engine.store import Store
from flows.recipe import load_recipe
from llm.pretrain import presets
from llm.pretrain.config import PretrainConfig

DOCS = Path(__file__).parents[2] / "docs"


def config(**fields: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({"precision": "fp32", **fields})


@pytest.mark.parametrize("depth", [6, 12, 20])
def test_the_guide_says_what_follows_from_a_depth(depth: int) -> None:
    given = config(depth=depth)
    row = (
        f"| {depth} | {given.model.width:,} | {given.model.heads} | {given.model.block_parameters / 1e6:,.1f}M "
        f"| {given.tokens:,} | {given.batch_tokens:,} | {given.lr:g} | {given.steps:,} |"
    )
    assert row in (DOCS / "training.md").read_text(encoding="utf-8").splitlines()


def test_the_rules_are_those_that_are_stated() -> None:
    given = config(depth=20)
    shape = given.model
    assert (shape.layers, shape.width, shape.head_width) == (20, 1280, 64)
    assert 0 <= given.tokens - 20 * shape.block_parameters < given.batch_tokens
    assert given.tokens % given.batch_tokens == 0
    best = 0.58 * given.tokens**0.571
    assert best / 2**0.5 < given.batch_tokens < best * 2**0.5
    law = 1.79 * shape.block_parameters**-0.713 * given.tokens**0.307
    assert given.lr == pytest.approx(law * (given.batch_tokens / best) ** 0.5, rel=5e-3)
    assert config(depth=2).lr == presets.LARGEST_RATE


def test_what_is_set_stays_and_the_rest_follows_from_it() -> None:
    given = config(depth=20, model={"width": 512, "context": 768}, tokens=10**9, batch_tokens=768 * 1000)
    assert (given.model.layers, given.model.width, given.model.heads) == (20, 512, 8)
    assert (given.tokens, given.batch_tokens) == (10**9, 768_000)
    assert config(depth=20, batch_tokens=2**14).lr == pytest.approx(
        config(depth=20, batch_tokens=2**18).lr / 4, rel=0.01
    )
    assert config(depth=20, model={"context": 768}).batch_tokens % 768 == 0
    assert config(depth=20, lr=1e-5).lr == 1e-5


@pytest.mark.parametrize("tokens", [4_000_000, 4e6, "4e6", "4000000", "4_000_000", "4.0e+6"])
@pytest.mark.parametrize("depth", [2, 2.0, "2", "2e0"])
def test_rules_compute_on_numbers_however_they_are_written(tokens: Any, depth: Any) -> None:
    assert config(depth=depth, tokens=tokens) == config(depth=2, tokens=4_000_000)
    shape = {"width": "128.0", "context": 5.12e2}
    given = config(depth=depth, tokens=tokens, batch_tokens="1.024e3", model=shape)
    assert given == config(depth=2, tokens=4_000_000, batch_tokens=1024, model={"width": 128, "context": 512})


def test_depth_is_no_part_of_the_identity_but_what_follows_is() -> None:
    given = config(depth=6)
    model = {"layers": 6, "width": 384, "heads": 6}
    spelt = config(model=model, tokens=given.tokens, batch_tokens=given.batch_tokens, lr=given.lr)
    assert given.identity() == spelt.identity()
    assert given.identity() != config(depth=7).identity()


def test_a_filled_config_is_read_back_as_it_is() -> None:
    given = config(depth=12, lr=1e-3)
    assert PretrainConfig.model_validate_json(given.model_dump_json()) == given


@pytest.mark.parametrize(
    ("fields", "place", "message"),
    [
        ({"depth": 0}, ("depth",), "greater than or equal to 1"),
        ({"depth": "deep"}, ("depth",), "valid integer"),
        ({"depth": 4, "model": {"widht": 3}}, ("model", "widht"), "Extra inputs"),
        ({"depth": 4, "model": {"width": "wide"}}, ("model", "width"), "valid integer"),
        ({"depth": 4, "batch_tokens": "large"}, ("batch_tokens",), "valid integer"),
        ({"depth": True}, ("depth",), "valid integer"),
        ({"depth": 2.5}, ("depth",), "valid integer"),
        ({"depth": 4, "tokens": True}, ("tokens",), "valid integer"),
        ({"depth": 4, "tokens": 1.5}, ("tokens",), "valid integer"),
        ({"depth": 4, "model": {"width": True}}, ("model", "width"), "valid integer"),
        ({"depth": 4, "model": 7}, ("model",), "valid dictionary"),
        ({"depth": 4, "tokens": -1}, ("tokens",), "greater than or equal to 1"),
    ],
)
def test_a_mistake_is_refused_where_it_stands(
    fields: dict[str, Any], place: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValidationError) as refusal:
        config(**fields)
    mistakes = {mistake["loc"]: mistake["msg"] for mistake in refusal.value.errors()}
    assert message in mistakes[place]
    assert list(mistakes) == [place]


def test_the_plan_says_what_follows_and_what_the_recipe_sets_otherwise(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Once upon a time.\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: dial\ndownload: {{sources: [{{name: a, kind: local, path: {tmp_path / 'a.txt'}}}]}}\n"
        "pretrain: {depth: 6, precision: fp32, model: {heads: 12}}\n"
    )
    recipe = load_recipe(path, ["pretrain.lr=1e-3", "pretrain.model.context=512"])
    assert recipe.pretrain.model.layers == 6
    steps = {step.stage.name: step for step in make_plan(recipe, Store(tmp_path / "home"))}
    assert steps["pretrain"].predicted == [
        "depth 6: model.layers 6, model.width 384, tokens 212,336,640, batch_tokens 32,768",
        "set otherwise: model.heads 12 (6 by the rule), lr 0.001 (0.003 by the rule)",
    ]
