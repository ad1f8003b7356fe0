from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.context import UserError
from llm import checkpoint
from llm.checkpoint import Checkpoint


def make(root: Path, step: int, text: str = "weights") -> Path:
    """A complete checkpoint of one file."""
    folder = checkpoint.begin(root, step)
    (folder / "rank0.pt").write_text(text)
    checkpoint.commit(folder, step=step, ranks=2, zero_stage=1, history={"step": [step]})
    return checkpoint.folder_of(root, step)


def test_the_newest_complete_checkpoint_is_found_and_its_history_read(tmp_path: Path) -> None:
    for step in (8, 90, 100_000_000):
        make(tmp_path, step)
    newest, passed_over = checkpoint.newest_whole(tmp_path)
    assert newest is not None
    assert (newest.step, passed_over) == (100_000_000, [])
    assert checkpoint.read_history(tmp_path, newest) == {"step": [100_000_000]}


def test_nothing_is_found_where_nothing_was_saved(tmp_path: Path) -> None:
    assert checkpoint.newest_whole(tmp_path / "missing") == (None, [])


def test_what_was_not_committed_does_not_count(tmp_path: Path) -> None:
    make(tmp_path, 4)
    (checkpoint.begin(tmp_path, 8) / "rank0.pt").write_text("half")
    assert [found.step for found in checkpoint.complete(tmp_path)] == [4]


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "record"])
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, harm: str) -> None:
    make(tmp_path, 4)
    torn = make(tmp_path, 8) / "rank0.pt"
    whole = torn.read_text()
    if harm == "truncate":
        torn.write_text(whole[:-1])
    elif harm == "flip":
        torn.write_text("x" + whole[1:])
    elif harm == "remove":
        torn.unlink()
    else:
        (torn.parent / "checkpoint.json").write_text('{"step": 8, "ra')
    newest, passed_over = checkpoint.newest_whole(tmp_path)
    assert newest is not None
    assert newest.step == 4
    assert len(passed_over) == (0 if harm == "record" else 1)
    assert all("step 8: rank0.pt is" in message for message in passed_over)


def test_a_torn_checkpoint_is_replaced_when_its_step_is_saved_again(tmp_path: Path) -> None:
    (make(tmp_path, 8, "old") / "rank0.pt").write_text("torn")
    make(tmp_path, 8, "new")
    newest, _ = checkpoint.newest_whole(tmp_path)
    assert newest is not None
    assert (checkpoint.folder_of(tmp_path, 8) / "rank0.pt").read_text() == "new"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        make(tmp_path, step)
    checkpoint.begin(tmp_path, 16)
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000008", "step-00000012"]


def test_a_disk_without_room_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"needs about 1000000\.0 TB, but the disk of .* has .* left:\nmake room"
    ):
        checkpoint.begin(tmp_path, 4, size=10**18)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 2), (4, 0)])
def test_other_ranks_or_another_stage_are_refused_with_what_to_set(ranks: int, stage: int) -> None:
    made = Checkpoint(step=8, ranks=2, zero_stage=1, files={})
    checkpoint.require_same_shape(made, ranks=2, zero_stage=1)
    with pytest.raises(
        UserError, match=r"(?s)step 8 was made with 2 rank\(s\) at ZeRO stage 1.*runtime\.ranks=2"
    ):
        checkpoint.require_same_shape(made, ranks=ranks, zero_stage=stage)
