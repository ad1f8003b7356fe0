"""A training that begins with the model of another: at its end or at a branch point, with its optimizer or without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pyarrow.parquet as pq
import pytest
from disturbed import Stage, events
from toy import CONTEXT, toy

from data_pipeline.core.errors import UserError
from data_pipeline.stage import LocalContext
from flows.recipe import build_recipe
from llm.pretrain.config import PretrainConfig
from llm.pretrain.stage import pretrain

BATCH = 8


def recipe(steps: int, warmup: int = 0, **fields: Any) -> PretrainConfig:
    """A rate that rises for some steps and is constant then."""
    runtime = {"checkpoint_every": 100, "micro_batch": 4, "validation": {"every": 100, "tokens": 1024}}
    schedule = {"kind": "wsd", "warmup_steps": warmup, "decay_share": 0.0}
    return toy(steps, BATCH, runtime | fields.pop("runtime", {}), schedule=schedule, **fields)


def run(config: PretrainConfig, inputs: dict[str, Path], out: Path) -> list[str]:
    """Train and seal, as the store does; return what was said."""
    context = LocalContext(launcher=forks.launch)
    metrics = pretrain(config, inputs, out, context)
    shutil.rmtree(out / "scratch")
    manifest = {
        "stage": "pretrain",
        "config": config.resolve().identity(),
        "runtime": config.runtime.model_dump(mode="json"),
        "inputs": {type_: {"fingerprint": folder.name} for type_, folder in inputs.items()},
        "metrics": metrics,
    }
    (out / "manifest.json").write_text(json.dumps(manifest))
    return context.notes


def losses(out: Path) -> list[float]:
    found: list[float] = pq.read_table(out / "losses.parquet")["loss"].to_pylist()
    return found


@pytest.fixture(scope="module")
def stem(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of 14 steps, kept after 10 and all."""
    out = tmp_path_factory.mktemp("store") / "pretrain" / "stem"
    run(recipe(14, warmup=2, keep=(10, 1.0)), corpus, out)
    return out


@pytest.fixture(scope="module")
def whole(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training, of 20 steps."""
    out = tmp_path_factory.mktemp("store") / "whole"
    run(recipe(20, warmup=2), corpus, out)
    return out


@pytest.mark.parametrize(
    ("at", "ranks", "zero_stage"), [(10, 1, 0), (None, 1, 0), (0.7, 1, 1), pytest.param(10, 2, 3)]
)
def test_with_the_optimizer_kept_it_is_the_training_that_was_not_parted(
    at: float | None,
    ranks: int,
    zero_stage: int,
    stem: Path,
    whole: Path,
    corpus: dict[str, Path],
    tmp_path: Path,
) -> None:
    done = 14 if at is None else 10
    runtime = {"ranks": ranks, "zero_stage": zero_stage}
    config = recipe(20 - done, start={"at": at, "optimizer": "keep"}, runtime=runtime)
    said = run(config, {**corpus, "model": stem}, tmp_path / "out")
    assert f"begins with the model of pretrain stem after step {done}" in said
    assert f"reads on behind the {done * BATCH} sequences that it had read" in said
    assert not [line for line in said if "again" in line]
    if ranks == 1:
        assert losses(tmp_path / "out") == losses(whole)[done:]
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
            whole / "model.safetensors"
        ).read_bytes()
    else:
        np.testing.assert_allclose(losses(tmp_path / "out"), losses(whole)[done:], rtol=1e-5)
    assert json.loads((tmp_path / "out" / "start.json").read_text()) == {
        "model": "stem", "step": done, "samples": done * BATCH,
    }  # fmt: skip
    read = json.loads((tmp_path / "out" / "sources.json").read_text())
    assert [one["read"] for one in read] == [(20 - done) * BATCH]


@pytest.mark.long
def test_a_third_reads_on_behind_the_second(
    stem: Path, whole: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    keep = {"optimizer": "keep"}
    run(recipe(3, start=keep, keep=(1.0,)), {**corpus, "model": stem}, tmp_path / "second")
    run(recipe(3, start=keep), {**corpus, "model": tmp_path / "second"}, tmp_path / "third")
    assert losses(tmp_path / "second") + losses(tmp_path / "third") == losses(whole)[14:]


def test_without_the_optimizer_only_the_weights_are_the_same(
    stem: Path, whole: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    for name, start in {"branch": {"at": 10}, "end": {}}.items():
        run(recipe(6, start=start), {**corpus, "model": stem}, tmp_path / name)
    assert losses(tmp_path / "branch")[0] == losses(whole)[10]
    assert losses(tmp_path / "branch")[2] != losses(whole)[12]
    assert losses(tmp_path / "end")[0] == losses(whole)[14]
    before = [event["bits_per_byte"] for event in events(stem, "validation")][-1]
    after = [event for event in events(tmp_path / "end", "validation") if event["step"] == 0]
    assert [event["bits_per_byte"] for event in after] == [pytest.approx(before, rel=1e-6)]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"seed": 1}, ["with another seed, the text has another order"]),
        (
            {"model": {"layers": 1, "heads": 2, "width": 32, "context": 2 * CONTEXT, "rope_theta": 5e4}},
            ["with another model.context, the text has another order"],
        ),
    ],
)
def test_text_in_another_order_may_come_again_and_that_is_said(
    fields: dict[str, Any], why: list[str], stem: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    said = run(recipe(6, start={"optimizer": "keep"}, **fields), {**corpus, "model": stem}, tmp_path / "out")
    assert [line.partition(": ")[2] for line in said if line.startswith("may read again")] == why
    assert json.loads((tmp_path / "out" / "start.json").read_text())["samples"] == 0


def test_another_text_is_read_from_its_first_sequence(
    stem: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    tokens = shutil.copytree(corpus["tokens"], tmp_path / "other")
    said = run(recipe(6), {**corpus, "tokens": tokens, "model": stem}, tmp_path / "out")
    assert not [line for line in said if "again" in line or "reads on" in line]


@pytest.mark.long
def test_a_kill_does_not_begin_again(
    stem: Path, whole: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    inputs = {**corpus, "model": stem}
    config = recipe(200, start={"optimizer": "keep"}, runtime={"checkpoint_every": 20})
    stage = Stage(config, inputs, tmp_path / "killed")
    stage.wait_for("checkpoint", 40)
    stage.kill()
    run(config, inputs, tmp_path / "killed")
    run(config, inputs, tmp_path / "undisturbed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")
    assert losses(tmp_path / "killed")[:6] == losses(whole)[14:]


def test_what_can_not_be_begun_with_is_refused(stem: Path, corpus: dict[str, Path], tmp_path: Path) -> None:
    of = recipe(14, keep=(10, 1.0))
    recipe(6, start={"at": 10}).require_branch(of)
    for fields, message in (
        ({"start": {"at": 11}}, "step 11 of the other training is no branch point, it keeps steps 10, 14"),
        ({"start": {"optimizer": "keep"}, "optimizer": {"kind": "adamw"}}, "takes what muon kept"),
    ):
        with pytest.raises(UserError, match=message):
            recipe(6, **fields).require_branch(of)
    with pytest.raises(UserError, match="it keeps none"):
        recipe(6, start={"at": 10}).require_branch(recipe(14))
    wider = {"layers": 1, "heads": 2, "width": 64, "context": CONTEXT}
    with pytest.raises(
        UserError, match=r"has another shape than pretrain.model: set pretrain.model.width=32"
    ):
        pretrain(recipe(6, model=wider), {**corpus, "model": stem}, tmp_path / "out", LocalContext())
    with pytest.raises(UserError, match=r"another shape: of this step, set pretrain.model.width=32"):
        recipe(6, model=wider).require_shape(of)
    recipe(6, model={**wider, "width": 32, "context": 2 * CONTEXT}).require_shape(of)
    split = {"ranks": 2, "zero_stage": 1, "tensor_parallel": 2}
    with pytest.raises(UserError, match="which tensor_parallel can't be begun from"):
        recipe(6, start={"at": 10}, runtime=split, optimizer={"kind": "adamw"}).check_wired({"model"})
    other = shutil.copytree(stem, tmp_path / "other")
    shutil.copy(corpus["tokenizer"] / "tokenizer.json", other / "tokenizer.json")
    recut = json.loads((other / "tokenizer.json").read_text())
    recut["model"]["merges"] = recut["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(recut))
    with pytest.raises(UserError, match="cuts text otherwise"):
        pretrain(recipe(6), {**corpus, "model": other}, tmp_path / "out", LocalContext())
    torn = shutil.copytree(stem, tmp_path / "torn")
    (torn / "branches" / "step-00000010" / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"step 10 .*can't be used: rank-00000.safetensors is not what was written"
    ):
        pretrain(recipe(6, start={"at": 10}), {**corpus, "model": torn}, tmp_path / "out", LocalContext())


def phases(**anneal: Any) -> dict[str, Any]:
    """A recipe of two trainings."""
    return {
        "name": "phases",
        "download": {"sources": [{"name": "books", "kind": "local", "path": "."}]},
        "pretrain": {"tokens": 1_048_576, "keep": [1.0]},
        "anneal": {"stage": "pretrain", "tokens": 1_048_576, **anneal},
        "evaluate": {},
    }


def test_a_model_is_taken_where_it_is_named_only() -> None:
    alone = build_recipe(phases())
    assert alone.step("anneal").sources == {"tokens": "tokenize", "tokenizer": "train_tokenizer"}
    named = build_recipe(phases(inputs={"model": "pretrain"}, start={"optimizer": "keep"}))
    assert named.step("anneal").sources["model"] == "pretrain"
    assert named.step("evaluate").sources["model"] == "anneal"
    assert named.step("pretrain").sources == {"tokens": "tokenize", "tokenizer": "train_tokenizer"}
    with pytest.raises(UserError, match=r"anneal: start says where .*name its step with inputs"):
        build_recipe(phases(start={"at": 0.5}))
    with pytest.raises(UserError, match=r"anneal: inputs.model and init_from both name a model"):
        build_recipe(phases(inputs={"model": "pretrain"}, init_from="folder"))
