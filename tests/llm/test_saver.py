from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from operator_api import until

from llm.training import checkpoint
from llm.training.checkpoint import Setup
from llm.training.saver import Saved, Saver
from llm.training.state import SavedSlices

SETUP = Setup(ranks=2, zero_stage=1, micro_batch=4, precision="fp32", device="cpu")


def saver(root: Path, rank: int, patience: float = 20) -> Saver:
    return Saver(root, rank=rank, setup=SETUP, kept={"keep": 2}, patience=patience)


def shard(rank: int) -> dict[str, torch.Tensor]:
    return {f"weight:value:{2 * rank}": torch.arange(2.0) + 2 * rank, "weight:step:": torch.tensor(7.0)}


def poll_until_saved(one: Saver) -> Saved:
    """As the loop does, after each step."""
    deadline = time.monotonic() + 20
    while (saved := one.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return saved


def test_a_checkpoint_is_whole_when_the_last_rank_has_written_and_not_before(tmp_path: Path) -> None:
    savers = [saver(tmp_path, rank) for rank in range(2)]
    checkpoint.begin(tmp_path, 5)
    savers[0].start(5, shard(0), {"step": []}, since=time.perf_counter())
    until(lambda: list(tmp_path.glob("*.tmp/rank-00000*")), bool, 20)
    assert savers[0].poll() is None
    assert checkpoint.complete(tmp_path) == []
    savers[1].start(5, shard(1), {"step": []}, since=time.perf_counter())
    saved = savers[0].wait()
    assert isinstance(saved, Saved)
    assert (saved.step, savers[1].wait(), savers[0].poll()) == (5, None, None)
    assert [found.step for found in checkpoint.complete(tmp_path)] == [5]
    assert checkpoint.recover(tmp_path)[1] == []
    kept = SavedSlices(checkpoint.folder_of(tmp_path, 5))
    assert (kept.kinds("weight"), kept.numbers["weight"]["step"].item()) == (["value"], 7)


def test_a_write_that_fails_is_raised_at_the_next_look_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    failing = saver(tmp_path, 1)
    failing.start(5, shard(1), {}, since=0.0)  # nobody made the folder
    with pytest.raises(Exception, match="No such file"):
        poll_until_saved(failing)
    assert checkpoint.complete(tmp_path) == []


def test_a_rank_that_never_writes_is_an_error_in_bounded_time(tmp_path: Path) -> None:
    alone = saver(tmp_path, 0, patience=0.2)
    checkpoint.begin(tmp_path, 5)
    alone.start(5, shard(0), {}, since=0.0)
    with pytest.raises(
        TimeoutError, match="has the shards of 1 of 2 ranks after 0 seconds: is it a folder that all"
    ):
        alone.wait()


def test_the_loop_waits_for_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes its time is one whose sync does."""
    real, syncing, done = checkpoint.fsync, threading.Event(), threading.Event()

    def sync(path: Path) -> None:
        syncing.set()
        assert done.wait(60)
        real(path)

    monkeypatch.setattr(checkpoint, "fsync", sync)
    one = Saver(
        tmp_path,
        rank=0,
        setup=Setup(ranks=1, zero_stage=0, micro_batch=4, precision="fp32", device="cpu"),
        kept={"keep": 2},
        patience=20,
    )
    checkpoint.begin(tmp_path, 5)
    since = time.perf_counter()
    one.start(5, shard(0), {}, since=since)
    assert one.poll() is None
    assert syncing.wait(20)
    assert one.poll() is None
    held = time.perf_counter() - since
    done.set()
    saved = one.wait()
    assert saved is not None
    assert saved.seconds >= held
