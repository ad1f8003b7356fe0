from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import forks
import pytest
import torch
from engine_steps import Experiment, batch, run
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llm.model.transformer import Transformer
from llm.pretrain.config import PretrainConfig
from llm.training.schedule import BatchWarmup, Schedule, batch_plan


def multiples(schedule: Schedule, steps: int) -> list[float]:
    return [schedule.lr_multiplier(step, steps) for step in range(steps)]


def test_the_rate_warms_up_to_its_peak_and_follows_a_cosine_to_its_floor() -> None:
    rates = multiples(Schedule(warmup_steps=4, min_lr_ratio=0.25), 11)
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[7] == pytest.approx((1.0 + 0.25) / 2)  # half of the way down the cosine
    assert rates[10] == pytest.approx(0.25)


def test_wsd_is_constant_until_its_decay_and_ends_at_its_floor() -> None:
    straight = Schedule(kind="wsd", warmup_steps=2, decay_share=0.4, decay_shape="linear", min_lr_ratio=0.2)
    assert multiples(straight, 10) == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    root = straight.model_copy(update={"decay_shape": "1-sqrt", "min_lr_ratio": 0.0})
    assert multiples(root, 10)[5:] == pytest.approx([1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0])
    assert multiples(straight.model_copy(update={"decay_share": 0.0}), 10)[2:] == [1.0] * 8


def test_warm_up_is_given_in_steps_or_as_a_share_and_steps_win() -> None:
    assert Schedule().warmup_of(1000) == 20
    assert Schedule(warmup_share=0.5, warmup_steps=3).warmup_of(1000) == 3
    assert multiples(Schedule(warmup_steps=0), 3)[0] == 1.0


@given(
    schedule=st.builds(
        Schedule,
        kind=st.sampled_from(["cosine", "wsd"]),
        warmup_share=st.floats(0, 0.5),
        min_lr_ratio=st.floats(0, 1),
        decay_share=st.floats(0, 0.5),
        decay_shape=st.sampled_from(["1-sqrt", "linear"]),
    ),
    steps=st.integers(1, 300),
)
def test_the_rate_never_leaves_its_bounds_nor_rises_after_warm_up(schedule: Schedule, steps: int) -> None:
    rates = multiples(schedule, steps)
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(earlier < later for earlier, later in pairwise(rates[: schedule.warmup_of(steps)]))
    assert all(later <= earlier for earlier, later in pairwise(rates[schedule.warmup_of(steps) :]))
    if steps > schedule.warmup_of(steps) + 1 and (schedule.kind == "cosine" or schedule.decay_of(steps)):
        assert rates[-1] == pytest.approx(schedule.min_lr_ratio)


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"schedule\.warmup_steps is 11, but the run has 10 steps"):
        config({"warmup_steps": 11})
    with pytest.raises(
        ValidationError, match=r"warmup_share 0\.5 and decay_share 0\.6 are more than the run"
    ):
        config({"kind": "wsd", "warmup_share": 0.5, "decay_share": 0.6})


def test_the_batch_doubles_until_it_is_whole_and_each_size_gets_its_part_of_the_tokens() -> None:
    plan = batch_plan(100_000, 800, 10, BatchWarmup(start_tokens=200, share=0.2))
    assert plan.stairs == ((50, 20), (25, 40), (100, 80))
    assert [plan.sequences_at(step) for step in (0, 49, 50, 74, 75, 174, 999)] == [20, 20, 40, 40, 80, 80, 80]
    assert [plan.sequences_before(step) for step in (0, 1, 50, 51, 75, 76)] == [0, 20, 1000, 1040, 2000, 2080]
    assert batch_plan(1700, 800, 10, None).stairs == ((2, 80),)
    assert batch_plan(1, 800, 10, None).stairs == ((1, 80),)


@given(
    tokens=st.integers(1, 100_000),
    doublings=st.integers(1, 5),
    start=st.integers(1, 9),
    share=st.floats(0.01, 0.99),
)
def test_a_batch_warm_up_changes_steps_but_not_tokens(
    tokens: int, doublings: int, start: int, share: float
) -> None:
    context, whole = 7, 7 * (start << doublings)
    plan = batch_plan(tokens, whole, context, BatchWarmup(start_tokens=7 * start, share=share))
    sizes = [plan.sequences_at(step) for step in range(plan.steps)]
    assert sizes == sorted(sizes)
    assert all(size % plan.smallest == 0 for size in sizes)
    before = [plan.sequences_before(step) for step in range(plan.steps + 1)]
    assert [later - earlier for earlier, later in pairwise(before)] == sizes
    assert plan.steps >= 1
    if tokens >= whole:
        assert tokens - whole < before[-1] * context <= tokens


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (1024, "must be batch_tokens 1024 divided by 2, 4, 8"),
        (341, "must be batch_tokens 1024 divided by"),
        (16, "start_tokens 16 is not a multiple of model.context 32"),
        (32, "a batch of 1 sequences does not divide among 2 ranks"),
    ],
)
def test_a_batch_warm_up_that_cannot_be_is_refused(start: int, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config({"batch_warmup": {"start_tokens": start}}, ranks=2)


def config(schedule: dict[str, object], **runtime: object) -> PretrainConfig:
    """Ten steps of 32 sequences of 32 tokens, or so."""
    model = {"layers": 1, "heads": 2, "width": 16, "context": 32}
    fields = {"model": model, "tokens": 10_240, "batch_tokens": 1024, "schedule": schedule}
    return PretrainConfig.model_validate({**fields, "precision": "fp32", "runtime": runtime})


@pytest.mark.parametrize(
    "runtime", [{"micro_batch": 2}, {"ranks": 2, "zero_stage": 2, "micro_batch": 4}], ids=str
)
def test_while_the_batch_grows_loss_and_gradient_stay_means_over_it(
    tmp_path: Path, runtime: dict[str, int]
) -> None:
    """At a rate of (almost) zero the weights stand still, so each step's loss and gradient can be computed anew."""
    given = config({"batch_warmup": {"start_tokens": 256, "share": 0.3}}, **runtime)
    given = given.model_copy(update={"lr": 1e-30})
    assert [given.plan.sequences_at(step) for step in range(given.steps)][:9] == [8] * 6 + [16] * 3
    experiment = Experiment(given.model_dump(mode="json"), steps=11)
    [outcome] = run([experiment], tmp_path, forks.launch)
    shape = experiment.shape
    for step, fact in enumerate(outcome.facts):
        model = Transformer(shape)
        loss = model(*batch(step, given.plan.sequences_at(step), shape))
        loss.backward()
        norm = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm().item()
        assert (fact["loss"], fact["norm"]) == pytest.approx((loss.item(), norm), rel=1e-4)
