"""The benchmark of training runs, and tells what it ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from benchmarks.training.__main__ import main, parse
from benchmarks.training.attention import flops
from benchmarks.training.contestants import SHAPES
from llm.kernels.attention import Documents
from llm.kernels.names import BackEnd


def test_the_shapes_have_about_the_parameters_of_their_names() -> None:
    for name, millions in (("7M", 7), ("124M", 124), ("350M", 350), ("1B", 1000)):
        shape = SHAPES[name].model
        layer = 4 * shape.width**2 + 3 * shape.width * shape.hidden_width
        embeddings = shape.vocab_size * shape.width * (1 if shape.tie_embeddings else 2)
        assert (shape.layers * layer + embeddings) / 1e6 == pytest.approx(millions, rel=0.1)


def test_a_gpu_runs_all_races_and_a_cpu_the_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (parse([]).races, parse([]).shapes) == (["trainer"], ["7M"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    on_gpu = parse([])
    assert (on_gpu.races, on_gpu.shapes, on_gpu.ranks) == (["all"], ["124M", "350M", "1B"], 8)


def test_attention_costs_what_the_models_formula_says() -> None:
    shape = SHAPES["124M"].model
    size = (3, shape.context, shape.heads, shape.head_width)
    per_layer = (shape.flops_per_token() - shape.flops_per_token(1)) / shape.layers
    told = flops(size, None)
    tokens = 3 * shape.context
    assert told["forward"] + told["backward"] == pytest.approx(per_layer * tokens, rel=2e-3)
    halves = Documents(torch.arange(shape.context).div(shape.context // 2).long().expand(3, -1))
    assert flops(size, halves)["forward"] == told["forward"] / 2


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What all races without peers write, at toy size. Nothing is really compiled, which takes half a minute."""
    folder = tmp_path_factory.mktemp("results")
    toy = "--shapes tiny --rounds 1 --steps 4 --stages 1 --contexts 32 64 --repeats 3"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        main(["--races", "all", "--no-peers", *toy.split(), "--results", str(folder)])
    written = json.loads((folder / "training.json").read_text())
    return written["races"], (folder / "training.md").read_text()


@pytest.mark.long
@pytest.mark.parametrize("race", ["trainer", "compile", "zero"])
def test_all_contestants_train_and_are_compared(told: tuple[dict[str, Any], str], race: str) -> None:
    races, text = told
    for one in races[f"tiny: {race}"]:
        assert one["failed"] is None, one["failed"]
        assert one["rates"][0] > 0
        assert min(one["peaks"][0].values()) > 1e9
        assert one["memory"][0] > 1e7
        assert one["contestant"]["settings"]["optimizer"] == {"kind": "adamw"}  # as the peers have it
        assert {"data", "forward", "backward", "optimizer"} <= one["parts"][0].keys()
        assert one["contestant"]["name"] in text


def test_communication_is_told_apart(told: tuple[dict[str, Any], str]) -> None:
    races, text = told
    (stage,) = races["tiny: zero"]
    assert stage["contestant"]["settings"]["runtime"] == {"ranks": 2, "zero_stage": 1}
    parts = stage["parts"][0]
    assert parts["communication"] > 0
    assert "optimizer % | communication % |" in text


def test_each_back_end_is_timed_or_says_why_not(told: tuple[dict[str, Any], str]) -> None:
    races, text = told
    (race,) = (entries for name, entries in races.items() if name.startswith("attention"))
    assert [one["contestant"]["name"] for one in race] == list(get_args(BackEnd))
    for one in race:
        name = one["contestant"]["name"]
        if name in ("formula", "sdpa"):
            assert not one["failed"]
        if one["failed"]:
            assert f"- {name}: {one['failed']}" in text
            continue
        (cases,) = one["rounds"]
        assert [(case["context"], case["masked"]) for case in cases] == [
            (32, False),
            (64, False),
            (32, True),
            (64, True),
        ]
        for case in cases:
            assert case["forward"] > 0
            assert case["backward"] > 0
            assert 0 <= case["deviation"] < 1e-4
            assert f"| {case['context']} |" in text


@pytest.mark.long
def test_peers_train_too(tmp_path: Path) -> None:
    main(["--shapes", "tiny", "--rounds", "1", "--steps", "4", "--results", str(tmp_path)])
    (race,) = json.loads((tmp_path / "training.json").read_text())["races"].values()
    assert {one["contestant"]["kind"] for one in race} == {"llmill", "plain", "transformers"}
    assert [one["failed"] for one in race] == [None] * len(race)
