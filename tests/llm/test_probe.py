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
    before = time.perf_counter()
    clock.start()
    with clock.apart("communication"):
        within = time.perf_counter()
        time.sleep(0.01)
        apart = time.perf_counter() - within
    clock.lap("backward")
    whole = time.perf_counter() - before
    assert apart <= clock.seconds["communication"]
    assert 0 < clock.seconds["backward"] <= whole - clock.seconds["communication"]


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
