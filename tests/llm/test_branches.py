"""Branch points: a training that would take the steps of another goes on from there, and makes the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import forks
import pytest
from disturbed import Stage, events
from toy import CONTEXT, toy
from tuned import payload

from data_pipeline.stage import LocalContext
from llm.pretrain import branches
from llm.pretrain.config import PretrainConfig
from llm.pretrain.stage import fingerprints, pretrain

BATCH = 8


def recipe(steps: int, keep: tuple[float, ...] = (), decay: int = 4, **fields: Any) -> PretrainConfig:
    """A rate that rises for two steps, is constant, and falls over the last ``decay``."""
    runtime = {"checkpoint_every": 100, "micro_batch": 4, "validation": {"every": 4, "tokens": 1024}}
    runtime |= fields.pop("runtime", {})
    schedule = {"kind": "wsd", "warmup_steps": 2, "decay_share": decay / steps}
    return toy(steps, BATCH, runtime, **{"keep": keep, "schedule": schedule, **fields})


def run(config: PretrainConfig, corpus: dict[str, Path], out: Path) -> list[str]:
    """Train; return what it says of another training."""
    context = LocalContext(launcher=forks.launch)
    pretrain(config, corpus, out, context)
    shutil.rmtree(out / "scratch")  # as the store does
    return [note for note in context.notes if "goes on from" in note or "gone on from" in note]


@pytest.fixture(scope="module")
def stem(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of 14 steps that falls from step 10 on, kept after 5, 10 and all."""
    out = tmp_path_factory.mktemp("store") / "stem"
    assert run(recipe(14, (5, 10, 1.0)), corpus, out) == []
    return out


def test_a_longer_training_goes_on_from_the_last_step_that_is_the_same_and_makes_the_same_bytes(
    stem: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    longer = recipe(30, (5, 0.5))
    predicted = [
        "goes on from step 10 of pretrain stem, which is the same up to there: 2,560 of 7,680 tokens are not trained "
        "on again"
    ]
    assert longer.continued(stem.parent, fingerprints(corpus)) == predicted
    assert run(longer, corpus, stem.parent / "longer") == predicted
    assert run(longer, corpus, tmp_path / "from nothing") == []
    assert payload(stem.parent / "longer") == payload(tmp_path / "from nothing")
    assert {name.split("/")[1] for name in payload(stem.parent / "longer") if name.startswith("branches")} == {
        "step-00000005", "step-00000015", "index.json"
    }  # fmt: skip
    for kind in ("step", "validation", "norms"):
        logged = [
            [
                {**event, "time": 0, "tokens_per_second": 0, "mfu": 0, "memory": 0, "eta_seconds": 0}
                for event in found
            ]
            for found in (events(stem.parent / "longer", kind), events(tmp_path / "from nothing", kind))
        ]
        assert logged[0] == logged[1], kind
    assert [event["step"] for event in events(stem.parent / "longer", "resume")] == [10]


def test_one_that_is_kept_where_the_other_was_not_goes_on_from_before(
    stem: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(stem, store / "stem")
    wanted = recipe(30, (5, 8))
    assert "from step 5 of pretrain stem" in wanted.continued(store, fingerprints(corpus))[0]
    assert len(run(wanted, corpus, store / "kept")) == 1
    run(wanted, corpus, tmp_path / "from nothing")
    assert payload(store / "kept") == payload(tmp_path / "from nothing")


@pytest.mark.parametrize(
    ("steps", "fields"),
    [
        (30, {"seed": 1}),
        (30, {"lr": 2e-2}),
        (30, {"batch_tokens": BATCH * CONTEXT * 2, "tokens": 60 * BATCH * CONTEXT}),
        (30, {"schedule": {"kind": "cosine", "warmup_steps": 2}}),
        (30, {"schedule": {"kind": "wsd", "warmup_steps": 3, "decay_share": 0.1}}),
        (30, {"schedule": {"kind": "wsd", "warmup_steps": 2, "decay_share": 0.9}}),
        (30, {"model": {"layers": 1, "heads": 2, "width": 32, "context": CONTEXT, "norm_eps": 1e-6}}),
        (30, {"mask_documents": True}),
        (4, {}),
    ],
)
def test_one_whose_steps_are_others_begins_from_nothing(
    steps: int, fields: dict[str, Any], stem: Path, corpus: dict[str, Path]
) -> None:
    assert recipe(steps, decay=2, **fields).continued(stem.parent, fingerprints(corpus)) == []
    others = {**fingerprints(corpus), "tokens": "another"}
    assert recipe(30).continued(stem.parent, others) == []
    assert recipe(30).continued(stem.parent, fingerprints(corpus)), "and this one does not"


def test_what_falls_in_the_stem_is_gone_on_from_by_one_that_falls_alike(
    stem: Path, corpus: dict[str, Path]
) -> None:
    """The rate of its last step is the stem's too: whole trainings are passed, not only constant rates."""
    found = branches.find(stem.parent, recipe(14).course, fingerprints(corpus))
    assert sorted(found) == [5, 10], "the 14th is its own end"
    index = json.loads((stem / "branches" / "index.json").read_text())
    assert list(index) == ["step-00000005", "step-00000010", "step-00000014"]


def test_computed_otherwise_or_damaged_it_is_not_gone_on_from(
    stem: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(stem, store / "stem")
    shutil.copytree(store / "stem", store / "unfinished.partial")
    path = store / "stem" / "branches" / "step-00000010" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    context = LocalContext(launcher=forks.launch)
    pretrain(recipe(20), corpus, store / "other", context)
    assert "step 10 of stem: rank-00000.safetensors is not what was written" in context.notes
    assert [event["step"] for event in events(store / "other", "resume")] == [5]
    said = run(recipe(20, runtime={"micro_batch": 8}), corpus, store / "micro-batch")
    assert said == [f"step {step} of stem was computed otherwise: not gone on from it" for step in (5, 10)]
    assert events(store / "micro-batch", "resume") == []


@pytest.mark.long
def test_killed_behind_a_branch_point_it_ends_with_the_same_bytes(
    stem: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(stem, store / "stem")
    wanted = recipe(400, (5, 1.0), runtime={"checkpoint_every": 20})
    stage = Stage(wanted, corpus, store / "killed")
    stage.wait_for("checkpoint", 40)
    stage.kill()
    assert events(store / "killed", "resume")[0]["step"] == 10
    run(wanted, corpus, store / "killed")
    run(wanted, corpus, tmp_path / "from nothing")
    assert payload(store / "killed") == payload(tmp_path / "from nothing")


def test_a_last_step_that_is_kept_is_a_branch_point_for_what_goes_on_at_a_constant_rate(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    """Its check after the last step is none of the longer training's."""
    short, longer = recipe(10, (1.0,), decay=0), recipe(22, decay=6)
    run(short, corpus, tmp_path / "store" / "short")
    assert len(run(longer, corpus, tmp_path / "store" / "longer")) == 1
    run(longer, corpus, tmp_path / "from nothing")
    assert payload(tmp_path / "store" / "longer") == payload(tmp_path / "from nothing")


def decaying(at: int, **fields: Any) -> PretrainConfig:
    """A training whose rate falls after ``at`` steps, over a third of them all."""
    schedule = {"kind": "wsd", "warmup_steps": 2, "decay_share": 1 / 3, **fields}
    return PretrainConfig.model_validate(
        {**recipe(10).model_dump(), "decay_at": at * BATCH * CONTEXT, "schedule": schedule}
    )


@pytest.mark.long
def test_many_decays_take_the_steps_of_their_stem_once(corpus: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    taken = {}
    for at in (4, 8, 12):
        run(decaying(at), corpus, store / str(at))
        taken[at] = [event["step"] for event in events(store / str(at), "resume")]
    assert taken == {4: [], 8: [4], 12: [8]}
    assert [decaying(at).steps for at in (4, 8, 12)] == [6, 12, 18]
    run(decaying(12), corpus, tmp_path / "from nothing")
    assert payload(store / "12") == payload(tmp_path / "from nothing")


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 1 / 3, 0.5, 0.77, 0.9])
def test_the_rate_falls_at_the_very_step_that_is_asked_for(share: float) -> None:
    for at in range(2, 60):
        config = decaying(at, decay_share=share)
        multipliers = [config.schedule.lr_multiplier(step, config.steps) for step in range(config.steps)]
        assert multipliers[1:at] == [1.0] * (at - 1)
        assert all(one < 1 for one in multipliers[at:])
        assert config.decays_after == at
        assert config.kept_steps == [at]
        assert abs(len(multipliers[at:]) - share * config.steps) <= 1
    assert "decay_at" not in config.identity()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "cosine"}, "needs schedule.kind: wsd"),
        ({"warmup_steps": None}, "needs schedule.warmup_steps"),
        ({"decay_share": 1.0}, "at most 0.9"),
        ({"batch_warmup": {"start_tokens": BATCH * CONTEXT // 2}}, "no schedule.batch_warmup"),
    ],
)
def test_decays_that_share_no_stem_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decaying(8, **fields)


def test_what_can_not_be_kept_is_refused() -> None:
    with pytest.raises(ValueError, match="keep names step 11, but the run has 10 steps"):
        recipe(10, (11,))
    assert recipe(10, (0.01, 3, 0.3, 1.0)).kept_steps == [1, 3, 10]
    assert "keep" not in recipe(10).identity()
