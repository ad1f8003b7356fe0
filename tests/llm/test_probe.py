"""The clock's parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llm.training.probe import Clock, collectives_timed


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_is_apart_is_none_of_the_lap_around_it() -> None:
    clock = Clock(running=True)
    clock.start()
    time.sleep(0.02)
    with clock.apart("communication"):
        time.sleep(0.2)
    clock.lap("backward")
    assert clock.seconds["communication"] >= 0.2
    assert 0.02 <= clock.seconds["backward"] < 0.2


def test_a_clock_that_stands_counts_nothing() -> None:
    clock = Clock()
    with clock.apart("communication"):
        clock.lap("backward")
    assert clock.seconds == {}


def test_collectives_are_communication_only_inside(alone: None) -> None:
    value, parts = torch.ones(4), [torch.empty(4)]
    plain = vars(dist.ProcessGroup)["allreduce"]
    clock = Clock(running=True)
    with collectives_timed(clock):
        collectives = (
            lambda: dist.all_reduce(value, async_op=True),
            lambda: dist.all_gather(parts, value),
            lambda: dist.all_gather_single(parts[0], value),
            lambda: dist.reduce_scatter_single(parts[0], value),
            lambda: dist.broadcast(value, 0),
            lambda: dist.all_to_all_single(parts[0], value),
            dist.barrier,
        )
        for collective in collectives:
            clock.seconds.clear()
            work = collective()
            assert clock.seconds["communication"] > 0
            assert work is None or work.is_completed()
    assert vars(dist.ProcessGroup)["allreduce"] is plain
    clock.seconds.clear()
    dist.all_reduce(value)
    assert clock.seconds == {}
