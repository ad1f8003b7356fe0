"""What a plan says when something can't be known from here."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.clean.stage import CleanConfig
from data_pipeline.core.errors import UserError
from flows.engine.plan import Selection, Step, differences, make_plan
from flows.engine.store import Store
from flows.recipe import build_recipe, load_recipe
from flows.stages import BY_NAME, DEFAULT
from llm.pretrain import branches
from llm.pretrain.config import PretrainConfig

ROOT = Path(__file__).parents[2]
ORDER = DEFAULT
GOLDEN = {
    "download": "c7bae66c7e00ee2a",
    "clean": "96ae08154f7d5a16",
    "dedup": "d14bb4fbbe28ff03",
    "train_tokenizer": "5e3957bb1a6d6494",
    "tokenize": "47ae3941112cbd26",
    "pretrain": "b5a86e2f81761cd1",
    "evaluate": "fd2b31e8af257ec5",
    "export": "f83b9af86cb403e3",
}


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
        (Selection(stop="tokenize"), ["clean", "tokenize"], "tokenize"),
    ],
)
def test_a_selection_says_what_may_run_and_how_far(selection, runs, goes_as_far_as):
    chosen = selection.chosen(ORDER)
    for step in ("clean", "tokenize", "export"):
        assert (step in chosen) == (step in runs)
    assert chosen[-1] == goes_as_far_as


def test_a_selection_that_makes_no_sense_is_refused():
    with pytest.raises(UserError, match="--only excludes --from and --to"):
        Selection(start="clean", only="dedup")
    with pytest.raises(UserError, match="nothing would run"):
        Selection(start="tokenize", stop="clean").check(ORDER)
    with pytest.raises(UserError, match="not among those"):
        Selection(stop="clean", force="tokenize").check(ORDER)
    with pytest.raises(UserError, match="no such step"):
        Selection(force="cleam").check(ORDER)


def test_a_stage_that_will_run_says_what_it_needs_given_what_is_sealed(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("Once upon a time.\n")
    recipe = build_recipe(
        {
            "name": "small",
            "download": {"sources": [{"name": "a", "kind": "local", "path": str(tmp_path / "a.txt")}]},
            "runtime": {"workers": 3},
            "pretrain": {"tokens": 1024, "batch_tokens": 1024},
        }
    )

    def predict(config: CleanConfig, metrics: Mapping[str, float], workers: int) -> list[str]:
        return [f"{metrics.get('bytes', 'unknown')} bytes, {workers} workers"]

    monkeypatch.setattr(CleanConfig, "predict", predict)
    store = Store(tmp_path / "home")
    download, clean, *_ = make_plan(recipe, store)
    assert download.predicted == []
    assert clean.predicted == ["unknown bytes, 3 workers"]

    manifest = {"config": {}, "metrics": {"bytes": 18}, "inputs": {}, "finished": "2026-01-01"}
    store.begin("download", str(download.fingerprint), {})
    store.seal("download", str(download.fingerprint), manifest)
    _, clean, *_ = make_plan(recipe, store)
    assert clean.as_json()["predicted"] == ["18 bytes, 3 workers"]


def test_what_differs_is_told_of_the_nearest_artifact_not_of_the_newest(tmp_path: Path) -> None:
    store, stage = Store(tmp_path), BY_NAME["clean"]
    for number, chosen in enumerate(({"min_chars": 10}, {"min_chars": 99, "gopher": None, "unicode": None})):
        manifest = {
            "version": stage.version,
            "config": stage.config(**chosen).identity(),
            "inputs": {"documents": {"stage": "download", "fingerprint": "d0", "payload_sha256": ""}},
            "metrics": {},
            "finished": f"2026-01-0{number + 1}",
        }
        store.begin("clean", f"f{number}", {})
        store.seal("clean", f"f{number}", manifest)
    asked = stage.config(min_chars=11)
    step = Step(name="clean", stage=stage, action="run", why=[], config=asked, inputs={"documents": "d0"})
    assert differences(step, store) == ["min_chars: 10 -> 11"]


def test_the_artifacts_of_an_unchanged_recipe_keep_their_names(tmp_path):
    """A change here orphans what people have sealed: if the output differs too, bump the stage's version."""
    (tmp_path / "a.txt").write_text("Once upon a time.\n")
    path = tmp_path / "golden.yaml"
    path.write_text(f"""
name: golden
download: {{sources: [{{name: a, kind: local, path: {tmp_path / "a.txt"}}}]}}
pretrain: {{tokens: 1024, batch_tokens: 1024, precision: fp32}}
""")
    steps = make_plan(load_recipe(path), Store(tmp_path / "home"))
    assert {step.stage.name: step.fingerprint for step in steps} == GOLDEN


def test_a_plan_names_what_is_scored_and_not_kept_out_of_training(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"Once upon a time {name}."}))
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())

    def foreseen(**steps: Any) -> list[str]:
        source = {"name": "a", "kind": "local", "path": str(tmp_path / "b.jsonl")}
        sets = [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in ("a", "b", "c")]
        recipe = {
            "name": "small",
            "download": {"sources": [source]},
            "clean": {"decontamination": {"sets": {"one": {"path": str(tmp_path / "copy.jsonl")}}}},
            "pretrain": {"tokens": 1024, "batch_tokens": 1024, "precision": "fp32"},
            "evaluate": {"sets": sets},
            **steps,
        }
        plan = make_plan(build_recipe(recipe), Store(tmp_path / "home"))
        assert not [
            step.name for step in plan if step.name != "evaluate" and "not among" in str(step.predicted)
        ]
        return [line for step in plan if step.name == "evaluate" for line in step.predicted]

    warning = "not among clean.decontamination.sets, so training documents may hold"
    assert foreseen() == [f"b, c: {warning} them"]
    every = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("a", "b")}
    assert foreseen(clean={"decontamination": {"sets": every}}) == [f"c: {warning} it"]
    assert foreseen(clean={}) == [f"a, b, c: {warning} them"]
    assert foreseen(evaluate={}) == []
    shipped = {"name": "order", "path": "llmill://python_order.jsonl", "kind": "pairs"}
    assert foreseen(evaluate={"tasks": [shipped]}) == []


def test_a_plan_says_from_which_branch_point_a_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Once upon a time.\n")
    schedule = {"kind": "wsd", "warmup_steps": 2, "decay_share": 0.25}

    def pretrain_of(steps: int, **fields: Any) -> Step:
        recipe = {
            "name": "small",
            "download": {"sources": [{"name": "a", "kind": "local", "path": str(tmp_path / "a.txt")}]},
            "pretrain": {
                "tokens": steps * 1024, "batch_tokens": 1024, "precision": "fp32", "schedule": schedule, **fields
            },
        }  # fmt: skip
        steps_of_plan = make_plan(build_recipe(recipe), Store(tmp_path / "home"))
        return next(step for step in steps_of_plan if step.name == "pretrain")

    stem = pretrain_of(20, keep=[0.5])
    folder = tmp_path / "home" / "store" / "pretrain" / "0123456789abcdef"
    assert isinstance(stem.config, PretrainConfig)
    branches.write_index(stem.config.course, stem.inputs, folder)
    expected = (
        "goes on from step 10 of pretrain 0123456789abcdef, which is the same up to there: 10,240 of 40,960 tokens are "
        "not trained on again"
    )
    assert expected in pretrain_of(40).predicted
    assert not [line for line in pretrain_of(40, seed=1).predicted if "goes on from" in line]
    assert BY_NAME["pretrain"].version == branches.VERSION
