from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.core.errors import UserError
from llm.training import checkpoint
from llm.training.checkpoint import Checkpoint, Setup

PART = "rank-00001.safetensors"
SETUP = Setup(ranks=2, zero_stage=1, micro_batch=4, precision="bf16", device="cpu")


def make(root: Path, step: int) -> Path:
    """A complete checkpoint of two ranks."""
    folder = checkpoint.begin(root, step)
    for rank in range(2):
        checkpoint.write_shard(folder, rank, {f"weight:value:{4 * rank}": torch.full((4,), float(step))})
    checkpoint.await_shards(folder, ranks=2, seconds=1)
    checkpoint.commit(folder, step=step, setup=SETUP, history={"step": [step]})
    return checkpoint.folder_of(root, step)


def test_the_newest_complete_checkpoint_is_found_and_its_history_read(tmp_path: Path) -> None:
    for step in (8, 90, 100_000_000):
        make(tmp_path, step)
    newest, problems = checkpoint.recover(tmp_path)
    assert newest is not None
    assert (newest.step, newest.setup, problems) == (100_000_000, SETUP, [])
    assert checkpoint.read_history(tmp_path, newest) == {"step": [100_000_000]}


def test_nothing_is_found_where_nothing_was_saved(tmp_path: Path) -> None:
    assert checkpoint.recover(tmp_path / "missing") == (None, [])


def test_what_was_not_committed_does_not_count(tmp_path: Path) -> None:
    make(tmp_path, 4)
    checkpoint.write_shard(checkpoint.begin(tmp_path, 8), 0, {})
    with pytest.raises(TimeoutError, match="the shards of 1 of 2 ranks"):
        checkpoint.await_shards(checkpoint.unfinished(tmp_path, 8), ranks=2, seconds=0.1)
    assert [found.step for found in checkpoint.complete(tmp_path)] == [4]


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "record", "version"])
def test_a_torn_checkpoint_is_removed_and_the_one_before_taken(tmp_path: Path, harm: str) -> None:
    make(tmp_path, 4)
    torn = make(tmp_path, 8) / PART
    whole = torn.read_bytes()
    record = torn.parent / "checkpoint.json"
    if harm == "truncate":
        torn.write_bytes(whole[:-1])
    elif harm == "flip":
        torn.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif harm == "remove":
        torn.unlink()
    elif harm == "record":
        record.write_text(record.read_text()[:40])
    else:
        record.write_text(record.read_text().replace('"format": 2', '"format": 1'))
    newest, problems = checkpoint.recover(tmp_path)
    assert newest is not None
    assert newest.step == 4
    file = "checkpoint.json" if harm in ("record", "version") else PART
    assert [problem.startswith(f"removed step-00000008: {file} is") for problem in problems] == [True]
    make(tmp_path, 8)
    assert (checkpoint.folder_of(tmp_path, 8) / PART).read_bytes() == whole


@pytest.mark.parametrize("name", [PART, "checkpoint.json"])
def test_a_torn_checkpoint_is_not_kept_in_place_of_a_whole_one(tmp_path: Path, name: str) -> None:
    make(tmp_path, 4)
    (make(tmp_path, 8) / name).write_text("torn")
    checkpoint.recover(tmp_path)
    make(tmp_path, 6)
    checkpoint.prune(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]
    newest, _ = checkpoint.recover(tmp_path)
    assert newest is not None
    assert newest.step == 6


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        make(tmp_path, step)
    checkpoint.begin(tmp_path, 16)
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000008", "step-00000012"]


def test_those_of_each_so_many_steps_are_kept_as_well(tmp_path: Path) -> None:
    for step in (4, 8, 12, 16, 20):
        make(tmp_path, step)
        checkpoint.prune(tmp_path, keep=1, every=8)
    assert [found.step for found in checkpoint.complete(tmp_path)] == [20, 16, 8]


def test_a_disk_without_room_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"needs about 1000000\.0 TB, but the disk of .* has .* left:\nmake room"
    ):
        checkpoint.begin(tmp_path, 4, size=10**18)


@pytest.mark.parametrize(
    ("changed", "was", "is_now"),
    [
        ({"ranks": 1}, "ranks=2", "ranks=1"),
        ({"ranks": 4, "zero_stage": 0}, "ranks=2, zero_stage=1", "ranks=4, zero_stage=0"),
        ({"micro_batch": 8}, "micro_batch=4", "micro_batch=8"),
        ({"device": "cuda"}, "device=cpu", "device=cuda"),
        ({"compile": True}, "compile=False", "compile=True"),
    ],
)
def test_another_setup_is_resumed_with_and_reported(changed: dict[str, Any], was: str, is_now: str) -> None:
    made = Checkpoint(step=8, setup=SETUP, files={})
    assert checkpoint.changes(made, SETUP) is None
    checkpoint.require_same_training(made, replace(SETUP, **changed))
    message = checkpoint.changes(made, replace(SETUP, **changed))
    assert message is not None
    assert f"step 8 was made with {was}, and training resumes with {is_now}:" in message


def test_another_precision_is_refused_with_what_it_was() -> None:
    made = Checkpoint(step=8, setup=SETUP, files={})
    with pytest.raises(UserError, match="step 8 was made in bf16, but pretrain would resume in fp32"):
        checkpoint.require_same_training(made, replace(SETUP, precision="fp32"))


def test_layers_split_otherwise_are_refused() -> None:
    """Shards of matrices are saved as they are, so other ranks cannot resume from them."""
    made = Checkpoint(step=8, setup=replace(SETUP, tensor_parallel=2), files={})
    with pytest.raises(UserError, match="made with tensor_parallel=2, but pretrain would resume with 1"):
        checkpoint.require_same_training(made, SETUP)
    checkpoint.require_same_training(made, made.setup)
