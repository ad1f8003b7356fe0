"""What the shell offers behind a half-typed ``llmill`` command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click import Command
from typer import Context

from flows.stages import DEFAULT

LLMILL = Path(sys.executable).parent / "llmill"
ROOT = Path(__file__).parents[2]


def offered(*words: str, folder: Path = ROOT) -> list[str]:
    """What bash is given to complete the last word."""
    environment = {
        **os.environ,
        "_LLMILL_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["llmill", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run([LLMILL], env=environment, capture_output=True, text=True, cwd=folder)
    return done.stdout.split()


@pytest.mark.parametrize("option", ["--from", "--to", "--only", "--force"])
def test_stages_are_offered_where_a_stage_is_wanted(option: str) -> None:
    assert offered("run", "a.yaml", option, "d") == [name for name in DEFAULT if name.startswith("d")]


def test_settings_and_their_few_values_are_offered_behind_set() -> None:
    assert "pretrain.optimizer.kind=" in offered("run", "a.yaml", "--set", "pretrain.opt")
    assert "download.sources.0.path=" in offered("plan", "a.yaml", "--set", "download.sources.0.p")
    assert "pretrain.optimizer" in offered("settings", "pretrain.o")


def test_recipes_are_offered_those_here_first(tmp_path: Path) -> None:
    assert "flows/recipes/quickstart.yaml" in offered("run", "flows/recipes/q", folder=tmp_path)
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mine.txt").touch()
    assert offered("run", "mi", folder=tmp_path) == ["mine.yaml"]
    assert offered("runs", "mi", folder=tmp_path) == ["mine.yaml"]


def test_values_of_a_setting_that_has_few_are_those_that_it_takes() -> None:
    from flows.cli.completion import overrides

    context = Context(Command("run"))
    assert overrides(context, "pretrain.optimizer.kind=") == [
        "pretrain.optimizer.kind=adamw",
        "pretrain.optimizer.kind=muon",
    ]
    assert overrides(context, "pretrain.mask_documents=f") == ["pretrain.mask_documents=false"]
    assert overrides(context, "pretrain.lr=") == []


def test_steps_and_settings_are_those_of_the_recipe_that_is_typed(tmp_path: Path) -> None:
    recipe = tmp_path / "two.yaml"
    recipe.write_text("name: two\nsmall: {stage: pretrain}\nevaluate_small: {stage: evaluate}\n")
    assert offered("run", "two.yaml", "--only", "evaluate", folder=tmp_path) == ["evaluate", "evaluate_small"]
    assert "small.optimizer.kind=" in offered("run", "two.yaml", "--set", "small.opt", folder=tmp_path)
    recipe.write_text("name: [torn")
    assert "export" in offered("run", "two.yaml", "--only", "", folder=tmp_path)
