"""The benchmark of training runs, and tells what it ran."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm.bench.contestants import SHAPES


def test_the_shapes_have_about_the_parameters_of_their_names() -> None:
    for name, millions in (("7M", 7), ("124M", 124), ("350M", 350), ("1B", 1000)):
        shape = SHAPES[name].model
        layer = 4 * shape.width**2 + 3 * shape.width * shape.hidden_width
        embeddings = shape.vocab_size * shape.width * (1 if shape.tie_embeddings else 2)
        assert (shape.layers * layer + embeddings) / 1e6 == pytest.approx(millions, rel=0.1)


def test_all_contestants_train_and_are_compared(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llm.bench", "--shapes", "tiny", "--rounds", "1", "--steps", "4"]
    done = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (race,) = json.loads((tmp_path / "training.json").read_text())["races"].values()
    assert [one["contestant"]["kind"] for one in race] == ["llmill", "plain", "transformers", "transformers"]
    for one in race:
        assert one["failed"] is None, one["failed"]
        assert one["rates"][0] > 0
        assert one["peaks"][0] > 1e9
        assert {"forward", "backward", "optimizer"} <= one["parts"][0].keys()
    table = (tmp_path / "training.md").read_text()
    assert table in done.stdout
    assert all(one["contestant"]["name"] in table for one in race)
