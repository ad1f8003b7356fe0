"""``llmill gc``: what nobody needs goes, what anybody needs stays, whenever it is killed and whatever else runs."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from command_line import Llmill
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from data_pipeline.core.errors import UserError
from flows.engine import plan
from flows.engine.plan import Selection, plan_and_hold
from flows.engine.store import LINKED, Store
from flows.engine.uses import Uses
from flows.gc import Survey, held, remove, select, survey
from flows.lineage.graph import Graph, Key
from flows.recipe import load_recipe
from llm.model.layouts import content_sha256

CHAIN = ("download", "clean", "dedup", "tokenize", "pretrain", "export")


@cache
def model_files() -> dict[str, bytes]:
    """A model as an export holds it."""
    import torch
    from safetensors.torch import save

    from llm.model.config import ModelConfig
    from llm.model.layouts import exported_weights, transformers_config
    from llm.model.transformer import Transformer

    config = ModelConfig(layers=1, heads=2, width=16, context=32, vocab_size=300)
    weights = exported_weights(Transformer(config, seed=0), torch.float32)
    described = json.dumps(transformers_config(config, 0, "float32"), allow_nan=False)
    return {"config.json": described.encode(), "model.safetensors": save(weights, metadata={"format": "pt"})}


def seal(store: Store, stage: str, name: str, *inputs: Key, age: float = 100, **config: Any) -> Key:
    """Something sealed so many days ago."""
    out, _ = store.begin(stage, name, {"inputs": {}})
    (out / "name.txt").write_text(name)
    if stage == "export":
        for file, content in model_files().items():
            (out / file).write_bytes(content)
    (out / "deep").mkdir()
    (out / "deep" / "file.txt").write_text("text")
    recorded = {
        key[0]: {"stage": key[0], "fingerprint": key[1], "payload_sha256": store.get(*key).payload_sha256}
        for key in inputs
    }
    finished = (datetime.now(UTC) - timedelta(days=age)).isoformat(timespec="milliseconds")
    store.seal(stage, name, {"config": config, "inputs": recorded, "metrics": {}, "finished": finished})
    return stage, name


def chain(store: Store, number: int, **ages: float) -> list[Key]:
    """A line of artifacts, each made from the one before."""
    keys: list[Key] = []
    for place, stage in enumerate(CHAIN):
        keys.append(seal(store, stage, f"{number:08x}{place:08x}", *keys[-1:], age=ages.get(stage, 100)))
    return keys


def there(store: Store) -> set[Key]:
    return {(artifact.stage, artifact.fingerprint) for artifact in store.artifacts()}


def done(store: Store, found: Survey) -> dict[str, str]:
    """Remove it; name -> why it was left after all."""
    return {f"{one.path.parent.name}/{one.path.name}": left for one, left in remove(store, found)}


def assert_whole(store: Store, keys: Iterable[Key] | None = None) -> None:
    """Whatever carries a fingerprint verifies, and has all that it was made from."""
    for artifact in store.artifacts():
        assert store.verify(artifact) == []
        for one in artifact.inputs.values():
            assert store.get(*one.key), f"{artifact.stage} {artifact.fingerprint}"
    names = [path for path in store.root.glob("*/*") if "." not in path.name]
    assert len(names) == len(store.artifacts())
    if keys is not None:
        assert there(store) == set(keys)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_whatever_was_made_when_the_young_stay_with_all_they_came_from_and_nothing_else(
    data: st.DataObject,
) -> None:
    with tempfile.TemporaryDirectory() as home:
        store = Store(Path(home))
        ages: dict[Key, float] = {}
        made_from: dict[Key, list[Key]] = {}
        for number in range(data.draw(st.integers(1, 8))):
            stage = data.draw(st.sampled_from(CHAIN))
            sources = (
                data.draw(st.lists(st.sampled_from(list(ages)), unique_by=lambda key: key[0])) if ages else []
            )
            key = seal(store, stage, f"{number:016x}", *sources, age=data.draw(st.sampled_from([1, 100])))
            ages[key], made_from[key] = 1 if age_of(store, key) < 30 else 100, sources
        expected = {key for key, age in ages.items() if age == 1}
        while more := {source for key in expected for source in made_from[key]} - expected:
            expected |= more
        done(store, survey(store, 30))
        assert_whole(store, expected)


def age_of(store: Store, key: Key) -> float:
    finished = datetime.fromisoformat(store.get(*key).manifest["finished"])
    return (datetime.now(UTC) - finished) / timedelta(days=1)


def test_it_is_listed_before_it_goes_and_what_was_made_from_a_thing_goes_before_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, young = chain(store, 1), chain(store, 2, export=3)
    found = survey(store, 30)
    assert [one.key for one in found.candidates] == old[::-1]
    assert found.kept[young[-1]].startswith("it is of ")
    assert {found.kept[key] for key in young[:-1]} == {"what is kept was made from it"}
    assert_whole(store, [*old, *young])
    assert set(done(store, found).values()) == {""}
    assert_whole(store, young)
    assert not list(tmp_path.glob("store/*/.00000001*")), "their locks went with them"
    assert not survey(store, 30).candidates


def test_folders_that_a_killed_run_was_sending_go_when_they_are_old(tmp_path: Path) -> None:
    store = Store(tmp_path)
    chain(store, 1, export=3)
    old, young = (store.root / f"{LINKED}{name}" for name in ("old", "young"))
    for folder in (old, young):
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text("{}")
    for path in (old, *old.rglob("*")):
        os.utime(path, (0, 0))
    found = survey(store, 30)
    assert [(one.kind, one.path, one.size) for one in found.candidates] == [("left over", old, 2)]
    assert set(done(store, found).values()) == {""}
    assert young.exists()
    assert not old.exists()


class Killed(BaseException):
    """As kill -9: nothing handles it."""


def test_a_kill_at_any_moment_leaves_whole_artifacts_and_the_next_call_ends_what_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = {name: getattr(os, name) for name in ("rename", "unlink", "rmdir")}
    left = 0

    def dying(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return real[name](*args, **kwargs)

        return call

    kills = 0
    for moment in range(200):
        store = Store(tmp_path / str(moment))
        first = seal(store, "download", "0a")
        old, young = [first, seal(store, "clean", "0b", first)], chain(store, 2, export=3)
        found = survey(store, 30)
        left = moment
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, dying(name))
            try:
                done(store, found)
                break
            except Killed:
                kills += 1
        assert_whole(store)
        assert set(young) <= there(store) <= {*old, *young}
        done(store, survey(store, 30))
        assert_whole(store, young)
        assert not list(store.root.glob("*/*.removed"))
    assert kills > 15


def test_what_a_run_holds_stays_also_when_it_took_it_after_the_listing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    keys = chain(store, 1)
    found, uses = survey(store, 30), Uses(store)
    dedup = keys[2]
    uses.take(*dedup)
    assert survey(store, 30).kept[dedup] == "a run is using it"
    with pytest.raises(UserError, match=f"a run is using dedup {dedup[1]}"):
        select(store, [keys[1][1]])
    left = done(store, found)
    assert [left["/".join(key)] for key in reversed(keys)] == [
        *[""] * 3, "a run is using it", *["what was made from it stays"] * 2
    ]  # fmt: skip
    assert_whole(store, keys[:3])
    uses.release()
    assert done(store, found)[f"dedup/{dedup[1]}"] == "a run used it meanwhile", (
        "and may have made something from it"
    )
    os.utime(tmp_path / "store" / "dedup" / f".{dedup[1]}.use", (0, 0))
    done(store, survey(store, 30))
    assert_whole(store, [])


def test_an_unfinished_build_goes_only_when_it_is_old_and_nobody_is_at_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    source, other = seal(store, "download", "0a"), seal(store, "download", "0b")
    payload = store.get(*source).payload_sha256
    (store.path(*other) / "name.txt").chmod(0o644)
    out, _ = store.begin("clean", "0c", {"inputs": {"documents": ["download", payload]}})
    (out / "documents-00000.parquet").write_text("half")
    found = survey(store, 30)
    assert {one.key for one in found.candidates} <= {other}, "it is young, and keeps what it is made from"
    assert source in found.kept
    for path in [*out.rglob("*"), out]:
        os.utime(path, (0, 0))
    with store.lock("clean", "0c"):
        assert survey(store, 30).kept["clean", "0c"] == "a run is using it"
        assert done(store, replace(survey(store, 30))).get("clean/0c.partial") is None
    found = survey(store, 30)
    assert [one.kind for one in found.candidates][:1] == ["unfinished"]
    assert "left unfinished 1970-01-01" in found.candidates[0].why
    done(store, found)
    assert not out.exists()
    assert_whole(store, [])


def test_a_model_that_a_kept_training_began_from_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = chain(store, 1)
    start = content_sha256(store.path(*first[-1]))
    second = seal(store, "pretrain", "0f", age=2, init_sha256=start)
    assert Graph(store).descendants([first[0]])[-1].key == second
    assert not survey(store, 30).candidates
    assert [one.key for one in select(store, [first[-1][1]]).candidates] == [second, first[-1]]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'"GPT-2"'),
        ("config.json", b'{"model_type": "llama", "hidden_size": "wide"}'),
        ("config.json", None),
        ("model.safetensors", b"no weights"),
        ("model.safetensors", None),
        ("model.safetensors.index.json", b"["),
        ("model.safetensors.index.json", b'{"weight_map": 3}'),
    ],
)
def test_an_export_that_was_damaged_hides_nothing_of_the_others(
    tmp_path: Path, file: str, content: bytes | None
) -> None:
    store = Store(tmp_path)
    broken, whole = chain(store, 1)[-1], chain(store, 2)
    start = content_sha256(store.path(*whole[-1]))
    begun = seal(store, "pretrain", "0f", age=2, init_sha256=start)
    path = store.path(*broken) / file
    path.parent.chmod(0o755)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    assert {node.key for node in Graph(store).ancestors([begun])} == set(whole)
    assert {one.key for one in select(store, [broken[1]]).candidates} == {broken}


def test_old_state_and_locks_of_what_is_gone_go_too(tmp_path: Path) -> None:
    store = Store(tmp_path)
    key = seal(store, "clean", "0c", age=1)
    runs = tmp_path / "runs"
    runs.mkdir()
    kept = [runs / "clean-0c.json", runs / "young-0d.json", runs / "prefect"]
    gone = [runs / "old-0e.json", runs / ".old-0e.lock", runs / ".over-0f.lock"]
    gone += [store.root / "clean" / ".00.lock", store.root / "clean" / ".00.use"]
    held = runs / ".held-01.lock"
    kept += [held, store.root / "clean" / ".0c.lock"]
    for path in [*kept, *gone]:
        path.mkdir() if path.name == "prefect" else path.touch()
        if "young" not in path.name:
            os.utime(path, (0, 0))
    from filelock import FileLock

    with FileLock(held):
        done(store, survey(store, 30))
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)
    assert_whole(store, [key])


def test_an_artifact_that_is_asked_for_goes_with_all_that_was_made_from_it_and_nothing_else(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    one, other = chain(store, 1, export=0, dedup=0), chain(store, 2)
    left = done(store, select(store, [one[2][1]]))
    assert len(left) == 4
    assert_whole(store, [*one[:2], *other])
    with pytest.raises(UserError, match=f"there is none .*did you mean .*{one[0][1]}"):
        select(store, [one[0][1][:-1] + "9"])


@pytest.fixture
def copied(copy_finished: Callable[[Path], Llmill], tmp_path: Path) -> Llmill:
    """What the small recipe made, and no registered model."""
    copy = copy_finished(tmp_path / "home")
    MlflowClient(f"sqlite:///{copy.home}/mlflow.db").delete_registered_model("small")
    return copy


def test_what_runs_refer_to_and_registered_models_descend_from_stays_and_without_mlflow_everything(
    copied: Llmill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(copied.home)
    sealed = there(store)
    for path in store.root.glob("*/*/manifest.json"):  # of last year, but reused by a run of today
        path.chmod(0o644)
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"finished": "2025-01-01T00:00:00.000+00:00"})
        )
    for path in store.root.glob("*/.*.use"):
        os.utime(path, (0, 0))
    assert set(survey(store, 30).kept.values()) == {"a run in MLflow refers to it"}
    later = time.time() + 40 * 86400
    assert {one.key for one in survey(store, 30, later).candidates} >= sealed

    client = MlflowClient(f"sqlite:///{copied.home}/mlflow.db")
    export = store.artifacts("export")[0].fingerprint
    client.create_registered_model("small")
    tags = {"llmill.fingerprint": export, "llmill.weights": "here"}  # as a run registers what it exports
    client.create_model_version("small", "/somewhere", tags=tags)
    assert {one.key for one in survey(store, 30, later).candidates} >= sealed
    assert select(store, [export]).candidates[0].copies[-1] == "models:/small/1", "nobody relies on it"
    client.set_registered_model_alias("small", "champion", "1")
    found = survey(store, 30, later)
    assert found.kept["export", export] == "models:/small/1 (champion)"
    assert found.kept.keys() == sealed
    dedup = store.artifacts("dedup")[0].fingerprint
    with pytest.raises(UserError, match=r"models:/small/1 \(champion\) was exported from what would go"):
        select(store, [dedup[:6]])
    away = copied("gc", "--days", "0", "--yes", code=2, MLFLOW_TRACKING_URI="http://127.0.0.1:9").stderr
    assert "nothing is removed: MLflow at http" in away
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/another.db")
        found = survey(store, 0)
    assert "knows none of the runs that made what is sealed here" in found.refusal
    assert {one.key for one in found.candidates} >= sealed, "listed all the same"
    assert there(store) == sealed

    by_hand = client.create_model_version("small", "/somewhere", tags={"llmill.fingerprint": export})
    client.delete_model_version("small", "1")
    assert survey(store, 30, later).kept["export", export] == "models:/small/2"
    client.delete_model_version("small", by_hand.version)
    value = json.loads(copied("gc", "--artifact", dedup[:6], "--yes", "--json").stdout)
    left = there(store)
    assert {stage for stage, _ in left} == {"download", "clean"}
    removed = {tuple(Path(one["path"]).parts[-2:]) for one in value["removed"] if one["bytes"]}
    assert removed == sealed - left, (
        "what other tests made of it is known to MLflow alone: nothing is removed here"
    )


def test_a_run_plans_again_when_what_it_would_reuse_goes_before_it_holds_it(
    copied: Llmill, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plans = Store(copied.home), []
    export, real = store.artifacts("export")[0].fingerprint, plan.make_plan

    def planned_then_removed(*arguments: Any) -> Any:
        plans.append(real(*arguments))
        if len(plans) == 1:
            done(store, select(store, [export]))
        return plans[-1]

    monkeypatch.setattr(plan, "make_plan", planned_then_removed)
    uses = Uses(store)
    steps = plan_and_hold(load_recipe(copied.recipe), store, Selection(), uses)
    assert [step[-1].action for step in plans] == ["reuse", "run"]
    assert [step.action for step in steps] == ["reuse"] * 7 + ["run"]
    for step in steps:
        with pytest.raises(UserError, match=f"a run is using .*{step.stage.name}|there is none"):
            select(store, [str(step.fingerprint)])
    uses.release()


def test_a_run_ends_well_and_whole_while_gc_removes_all_that_it_may(copied: Llmill) -> None:
    store = Store(copied.home)
    (dedup,), before = store.artifacts("dedup"), there(store)
    process = copied.start("run", str(copied.recipe), "--set", "evaluate.seed=1")
    gone: set[str] = set()
    rounds = 0
    while process.poll() is None:
        if held(store, ("dedup", dedup.fingerprint)):
            left = done(store, survey(store, 0))
            if held(store, ("dedup", dedup.fingerprint)):  # else it let go meanwhile
                gone |= {name for name in left if not left[name] and ".lock" not in name}
                rounds += 1
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert rounds > 3
    unused = {key for key in before if key[0] in ("evaluate", "export")}
    assert gone == {"/".join(key) for key in unused}, "what the run neither reuses nor builds"
    assert "6 of 8 steps reused" in out
    assert_whole(store)
