"""The steps of a recipe: where each input comes from, which steps there are, and stages that others install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.core.errors import UserError
from flows.engine.plan import Selection, make_plan
from flows.engine.store import Store
from flows.recipe import Recipe, load_recipe
from flows.stages import BY_NAME, DEFAULT
from flows.steps import arrange

ROOT = Path(__file__).parents[2]
TWO_MODELS = """
pretrain: {tokens: 1024, batch_tokens: 1024}
pretrain_small: {stage: pretrain, tokens: 1024, batch_tokens: 1024, model: {layers: 1}}
evaluate_small: {stage: evaluate}
export_small: {stage: export}
evaluate_again: {stage: evaluate, inputs: {model: pretrain}}
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Read a recipe of one text that has what a test writes of steps."""
    (tmp_path / "a.txt").write_text("Once upon a time.\n")
    head = f"name: small\ndownload: {{sources: [{{name: a, kind: local, path: {tmp_path / 'a.txt'}}}]}}\n"

    def read(steps: str = "pretrain: {tokens: 1024, batch_tokens: 1024}", *overrides: str) -> Recipe:
        path = tmp_path / "small.yaml"
        path.write_text(head + steps)
        return load_recipe(path, overrides)

    return read


def wiring(recipe: Recipe) -> dict[str, dict[str, str]]:
    return {step.name: step.sources for step in recipe.steps}


def test_the_default_steps_are_there_in_the_order_of_the_table_and_each_reads_the_nearest(load: Any) -> None:
    assert wiring(load()) == {
        "download": {},
        "clean": {"documents": "download"},
        "dedup": {"documents": "clean"},
        "train_tokenizer": {"documents": "dedup"},
        "tokenize": {"documents": "dedup", "tokenizer": "train_tokenizer"},
        "pretrain": {"tokens": "tokenize", "tokenizer": "train_tokenizer"},
        "evaluate": {"model": "pretrain", "tokenizer": "train_tokenizer", "tokens": "tokenize"},
        "export": {"model": "pretrain", "tokenizer": "train_tokenizer", "scores": "evaluate"},
    }


def test_the_order_in_which_default_steps_are_written_does_not_matter() -> None:
    backwards = {name: BY_NAME[name] for name in reversed(DEFAULT)}
    assert arrange(backwards) == list(DEFAULT)
    some = {name: BY_NAME[name] for name in ("export", "clean")}
    assert arrange(some) == list(DEFAULT)


def test_a_second_model_of_one_corpus_is_evaluated_and_exported_for_itself(load: Any) -> None:
    found = wiring(load(TWO_MODELS))
    assert found["pretrain_small"] == found["pretrain"]
    assert found["evaluate_small"]["model"] == "pretrain_small"
    assert found["export_small"] == {
        "model": "pretrain_small",
        "tokenizer": "train_tokenizer",
        "scores": "evaluate_small",
    }
    assert found["evaluate_again"]["model"] == found["export"]["model"] == "pretrain"
    assert found["export"]["scores"] == "evaluate"


def test_an_export_takes_no_scores_of_another_model(load: Any) -> None:
    without = TWO_MODELS.replace("evaluate_small: {stage: evaluate}\n", "")
    assert wiring(load(without))["export_small"] == {
        "model": "pretrain_small",
        "tokenizer": "train_tokenizer",
    }


def test_all_inputs_of_a_step_have_one_tokenizer(load: Any) -> None:
    two = """
pretrain: {tokens: 1024, batch_tokens: 1024}
other: {stage: train_tokenizer, vocab_size: 999}
other_tokens: {stage: tokenize}
other_model: {stage: pretrain, tokens: 1024, batch_tokens: 1024}
evaluate_other: {stage: evaluate}
evaluate_first: {stage: evaluate, inputs: {model: pretrain}}
"""
    found = wiring(load(two))
    assert found["other_model"] == {"tokens": "other_tokens", "tokenizer": "other"}
    assert found["evaluate_other"] == {"model": "other_model", "tokenizer": "other", "tokens": "other_tokens"}
    assert found["evaluate_first"] == {
        "model": "pretrain",
        "tokenizer": "train_tokenizer",
        "tokens": "tokenize",
    }
    with pytest.raises(UserError, match="other inputs have that of train_tokenizer"):
        load(two.replace("inputs: {model: pretrain}", "inputs: {model: pretrain, tokens: other_tokens}"))


def test_of_an_adopted_model_only_the_tokenizer_is_taken_beside_one_that_was_trained_further(
    tmp_path: Path,
) -> None:
    (tmp_path / "small.yaml").write_text("""
name: small
adopt: {type: model, path: model}
finetune: {data: {path: rows.jsonl}}
export:
align: {data: {path: pairs.jsonl}}
export_aligned: {stage: export}
export_adopted: {stage: export, inputs: {model: adopt}}
""")
    found = wiring(load_recipe(tmp_path / "small.yaml", ()))
    assert found["export"] == {"model": "finetune", "tokenizer": "adopt"}
    assert found["align"] == {"model": "finetune", "tokenizer": "adopt"}
    assert found["export_aligned"] == {"model": "align", "tokenizer": "adopt"}
    assert found["export_adopted"] == {"model": "adopt", "tokenizer": "adopt"}


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("twice: {stage: evaluat}", "twice.stage: there is no stage evaluat; there are"),
        ("twice: {stage: [evaluate]}", "twice.stage: there is no stage"),
        ("clean: {stage: dedup}", "a step called clean is that stage"),
        ("model: {stage: evaluate}", "model: it is the name of a type"),
        ("steps: {stage: evaluate}", "steps: no step can be called so"),
        ("model_dump: {stage: evaluate}", "model_dump: no step can be called so"),
        ("a b: {stage: evaluate}", "a b: a step's name has letters, digits"),
        ("評価: {stage: evaluate}", "評価: a step's name has letters, digits"),
        ("a.b: {stage: evaluate}", "a.b: a step's name has letters, digits"),
        ("twice: {prompts: []}", "small.yaml:4: twice: no such key"),
        ("evaluate: {inputs: [model]}", "evaluate.inputs: write it as {TYPE: STEP}"),
        ("evaluate: {inputs: {documents: clean}}", "evaluate has no such input; it takes model"),
        ("evaluate: {inputs: {model: pretrian}}", "no step is called pretrian; there are download"),
        ("evaluate: {inputs: {model: tokenize}}", "tokenize makes tokens, not model"),
        ("clean: {inputs: {documents: dedup}}", "dedup must stand before clean"),
    ],
)
def test_steps_that_make_no_sense_are_refused_by_name(load: Any, steps: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        load(f"pretrain: {{tokens: 1024, batch_tokens: 1024}}\n{steps}\n")
    assert said in str(refused.value)


def test_an_override_may_add_a_step_and_change_one(load: Any) -> None:
    recipe = load(TWO_MODELS, "third.stage=evaluate", "third.inputs.model=pretrain", "evaluate_small.seed=7")
    assert recipe.step("third").sources["model"] == "pretrain"
    assert recipe.evaluate_small.seed == 7


def test_a_key_with_nothing_behind_it_is_a_step_with_defaults(load: Any) -> None:
    assert load("pretrain: {tokens: 1024, batch_tokens: 1024}\nevaluate:\nmore:\n  stage: evaluate\n").more


def test_only_a_step_and_what_it_needs_is_planned(load: Any, tmp_path: Path) -> None:
    recipe, store = load(TWO_MODELS), Store(tmp_path / "home")
    order = [step.name for step in recipe.steps]
    assert order[-5:] == ["export", "pretrain_small", "evaluate_small", "export_small", "evaluate_again"]
    names = [step.name for step in make_plan(recipe, store, Selection(stop="pretrain_small"))]
    assert names == order[: order.index("pretrain_small") + 1]
    with pytest.raises(UserError, match="--only evaluate_small needs download, which is not sealed"):
        make_plan(recipe, store, Selection(only="evaluate_small"))


def test_equal_steps_have_one_artifact_and_others_have_their_own(load: Any, tmp_path: Path) -> None:
    plan = {step.name: step for step in make_plan(load(TWO_MODELS), Store(tmp_path / "home"))}
    assert plan["evaluate_again"].fingerprint == plan["evaluate"].fingerprint
    assert plan["evaluate_small"].fingerprint != plan["evaluate"].fingerprint


def installed(folder: Path) -> dict[str, str]:
    """An environment in which the example of docs/stages.md is installed, as pip installs a package."""
    source = shutil.copytree(ROOT / "docs" / "example_stage", folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--target", str(folder / "site"), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return {**os.environ, "PYTHONPATH": str(folder / "site"), "LLMILL_HOME": str(folder / "home")}


def test_an_installed_stage_is_a_key_of_recipes_and_runs(tmp_path: Path) -> None:
    environment = installed(tmp_path)
    (tmp_path / "a.txt").write_text("to be or not to be that is the question\nसत्य ही ईश्वर है\n")
    recipe: dict[str, Any] = {
        "name": "counted",
        "download": {"sources": [{"name": "a", "kind": "local", "path": str(tmp_path / "a.txt")}]},
        "count_words": {"least": 2, "inputs": {"documents": "download"}},
        "pretrain": {"tokens": 1024, "batch_tokens": 1024},
    }
    path = tmp_path / "counted.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))

    def llmill(*words: str) -> str:
        command = [str(Path(sys.executable).parent / "llmill"), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "count_words.least" in llmill("settings", "count_words")
    assert "count_words" in llmill("plan", str(path))
    llmill("run", str(path), "--to", "download")
    assert "2 words" in llmill("run", str(path), "--only", "count_words")
    (table,) = (tmp_path / "home" / "store" / "count_words").glob("*/words.json")
    assert '"be": 2' in table.read_text()
