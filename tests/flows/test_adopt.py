"""Recipes that begin with what was made elsewhere, and the command that seals it outside of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import Llmill

from data_pipeline.core.errors import UserError
from flows.engine.adoption import adopt, config_of, recipe_lines
from flows.engine.plan import make_plan
from flows.engine.store import Store
from flows.recipe import Recipe, load_recipe
from llm.adopt.config import AdoptConfig

BOOKS = "download: {sources: [{name: a, kind: local, path: a.txt}]}\n"
MODEL = "adopt: {type: model, path: there}\n"


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def read(steps: str) -> Recipe:
        path = tmp_path / "small.yaml"
        path.write_text(f"name: small\n{steps}")
        return load_recipe(path)

    return read


def wiring(recipe: Recipe) -> dict[str, dict[str, str]]:
    return {step.name: step.sources for step in recipe.steps}


def test_a_recipe_that_adopts_a_model_learns_no_tokenizer_and_trains_none(load: Any) -> None:
    steps = f"{MODEL}{BOOKS}tokenize: {{inputs: {{documents: download}}}}\nevaluate:\nexport:\n"
    assert wiring(load(steps)) == {
        "adopt": {},
        "download": {},
        "tokenize": {"documents": "download", "tokenizer": "adopt"},
        "evaluate": {"model": "adopt", "tokenizer": "adopt", "tokens": "tokenize"},
        "export": {"model": "adopt", "tokenizer": "adopt", "scores": "evaluate"},
    }


def test_a_model_that_is_only_exported_is_not_evaluated_first(load: Any) -> None:
    assert wiring(load(f"{MODEL}export:\n")) == {
        "adopt": {},
        "export": {"model": "adopt", "tokenizer": "adopt"},
    }


def test_an_adopted_tokenizer_is_the_one_that_a_model_is_trained_with(load: Any) -> None:
    steps = f"adopt: {{type: tokenizer, path: t}}\n{BOOKS}pretrain: {{tokens: 1024, batch_tokens: 1024}}\n"
    found = wiring(load(steps))
    assert list(found) == ["adopt", "download", "clean", "dedup", "tokenize", "pretrain"]
    assert found["pretrain"] == {"tokens": "tokenize", "tokenizer": "adopt"}


def test_a_model_may_be_compared_with_one_that_was_adopted(load: Any) -> None:
    theirs = "theirs: {stage: adopt, type: model, path: there}\n"
    steps = f"{BOOKS}pretrain: {{tokens: 1024, batch_tokens: 1024}}\n"
    steps += "train_tokenizer:\nevaluate: {inputs: {model: pretrain}}\n"
    steps += "their_tokens: {stage: tokenize, inputs: {tokenizer: theirs}}\n"
    steps += "evaluate_theirs: {stage: evaluate, inputs: {model: theirs}}\n"
    found = wiring(load(theirs + steps))
    assert found["evaluate"]["tokenizer"] == found["pretrain"]["tokenizer"] == "train_tokenizer"
    assert found["evaluate_theirs"] == {"model": "theirs", "tokenizer": "theirs", "tokens": "their_tokens"}


def test_adopted_documents_and_tokens_stand_in_place_of_ours(load: Any) -> None:
    steps = "adopt: {type: documents, path: d}\npretrain: {tokens: 1024, batch_tokens: 1024}\n"
    assert wiring(load(steps))["clean"] == {"documents": "adopt"}
    steps = f"{MODEL}tokens_: {{stage: adopt, type: tokens, path: t}}\nevaluate:\n"
    assert wiring(load(steps))["evaluate"] == {"model": "adopt", "tokenizer": "adopt", "tokens": "tokens_"}


def test_a_mistake_is_named_with_its_line(load: Any) -> None:
    with pytest.raises(UserError, match=r"small.yaml:2: adopt: say where it is"):
        load("adopt: {type: model}\nevaluate:\n")
    with pytest.raises(UserError, match=r"small.yaml:2: adopt.type"):
        load("adopt: {type: scores, path: x}\nevaluate:\n")


@pytest.mark.long
def test_the_command_seals_what_a_recipe_then_finds_and_its_lines_are_one(
    copy_finished: Callable[[Path], Llmill], tmp_path: Path
) -> None:
    finished = copy_finished(tmp_path / "home")
    export = finished.made("export").absolute()
    arguments = [
        "adopt",
        "model",
        str(export),
        "--origin",
        "a test: 'ours' [x]",
        "--license",
        "MIT",
        "--json",
    ]
    first, again = (json.loads(finished(*arguments).stdout) for _ in range(2))
    assert (first["reused"], again["reused"]) == (False, True)
    assert first["fingerprint"] == again["fingerprint"]
    assert set(yaml.safe_load(first["recipe"])["adopt"]) == {"type", "path", "origin", "license"}
    recipe = tmp_path / "begins.yaml"
    tokens = finished.made("tokenize").absolute()
    more = f"tokens_: {{stage: adopt, type: tokens, path: '{tokens}'}}\nevaluate: {{max_documents: 3}}\nexport:\n"
    recipe.write_text(f"name: begins\n{first['recipe']}{more}")
    planned = json.loads(finished("plan", str(recipe), "--json").stdout)
    actions = {step["step"]: step["action"] for step in planned}
    assert actions == {"adopt": "reuse", "tokens_": "run", "evaluate": "run", "export": "run"}
    ran = finished("run", str(recipe))
    assert "✓ export" in ran.stdout
    card = next(
        path.read_text()
        for path in finished.home.glob("store/export/*/README.md")
        if "made elsewhere" in path.read_text()
    )
    assert "| model | a test: 'ours' [x] | MIT |" in card
    traced = finished("trace", first["fingerprint"]).stdout
    assert "nothing: it is a beginning" in traced
    assert "export" in traced
    assert finished("verify", first["fingerprint"]).returncode == 0
    assert "A  begins · " in finished("compare", "latest", "latest").stdout
    assert first["fingerprint"] not in finished("gc").stdout


def test_the_name_of_the_step_stands_in_the_lines_and_no_place_is_hashed(tmp_path: Path) -> None:
    config = AdoptConfig(type="documents", path=tmp_path)
    assert yaml.safe_load(recipe_lines("theirs", config)) == {
        "theirs": {"stage": "adopt", "type": "documents", "path": str(tmp_path)}
    }
    for name, kind, said in (
        ("a b", "model", "name: String should match"),
        ("x", "mdoel", "there is no kind mdoel: there are tokenizer, model, documents, tokens"),
    ):
        with pytest.raises(UserError, match=said):
            config_of(name, {"type": kind, "path": tmp_path})
    with pytest.raises(UserError, match="can't be asked for the revision"):
        adopt(AdoptConfig(type="model", hub="nobody/nothing"), "adopt", Store(tmp_path))


def test_a_plan_says_what_it_can_t_look_up(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "a.txt").write_text("Once upon a time.\n")
    books = BOOKS.replace("a.txt", str(tmp_path / "a.txt"))
    recipe = load(f"adopt: {{type: model, hub: a/b}}\n{books}evaluate:\n")
    plan = {step.name: step for step in make_plan(recipe, Store(tmp_path / "home"))}
    assert plan["adopt"].action == "unknown"
    assert "can't be asked for the revision of a/b" in plan["adopt"].why[0]
    assert plan["evaluate"].action == "unknown"
