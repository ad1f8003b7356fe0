from __future__ import annotations

import random
from typing import Any

import pytest

from data_pipeline.core.errors import UserError
from llm.training.recovery import History, Recovery, SpikeDetector, robust_z, skipped_sequences


def detector_of(config: Recovery, max_nonfinite: int = 5, max_rollbacks: int = 3) -> SpikeDetector:
    return SpikeDetector(config, max_nonfinite=max_nonfinite, max_rollbacks=max_rollbacks)


def history(losses: list[float], skipped: list[dict[str, Any]] | None = None) -> History:
    steps = [{"step": place, "loss": loss} for place, loss in enumerate(losses, start=1)]
    return {"step": steps, "validation": [], "skipped": skipped or []}


def nonfinite(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "reason": "nonfinite", "windows": 0} for step in steps]


def spike(step: int, sequences: int) -> dict[str, Any]:
    return {"step": step, "reason": "spike", "windows": sequences}


def test_robust_z_is_the_number_of_deviations_of_normal_losses() -> None:
    dice = random.Random(0)
    recent = [dice.gauss(3.0, 0.05) for _ in range(10_001)]
    assert robust_z(3.5, recent) == pytest.approx(10, rel=0.05)
    assert robust_z(2.5, recent) == pytest.approx(-10, rel=0.05)


def test_spikes_among_the_recent_losses_hardly_move_robust_z() -> None:
    dice = random.Random(0)
    recent = [dice.gauss(3.0, 0.05) for _ in range(100)]
    assert robust_z(3.5, [*recent[:95], *[50.0] * 5]) == pytest.approx(robust_z(3.5, recent), rel=0.2)


def test_equal_losses_make_no_division_by_zero() -> None:
    assert robust_z(3.0, [3.0] * 9) == 0


def test_a_leap_is_a_spike_only_where_asked_and_after_enough_losses() -> None:
    calm = [3.0 + 0.01 * (place % 5) for place in range(16)]
    watch = detector_of(Recovery(spike_z=10, spike_window=16))
    assert watch.spike(history([*calm, 3.05])) is None
    assert watch.spike(history([*calm, 5.0])) == pytest.approx(robust_z(5.0, calm))
    assert watch.spike(history([*calm, 1.0])) is None, "falling is no spike"
    assert watch.spike(history([*calm[1:], 5.0])) is None, "too few came before"
    assert detector_of(Recovery()).spike(history([*calm, 5.0])) is None, "off by default"


def test_a_spike_rolls_back_to_the_checkpoint_before_it() -> None:
    watch = detector_of(Recovery(spike_z=10, rollback_every=10))
    assert [watch.rollback_to(history([]), done) for done in (1, 10, 11, 20, 21)] == [0, 0, 10, 10, 20]
    assert [step for step in range(25) if watch.saves_at(step)] == [0, 10, 20]
    assert not any(detector_of(Recovery(rollback_every=10)).saves_at(step) for step in range(25))


def test_rollbacks_are_bounded() -> None:
    watch = detector_of(Recovery(spike_z=10), max_rollbacks=2)
    before = [spike(150, 800), *nonfinite(160)]
    watch.rollback_to(history([], before), 170)
    with pytest.raises(UserError, match=r"spiked again in step 170, after 2 rollbacks: lower pretrain\.lr"):
        watch.rollback_to(history([], [*before, spike(155, 80)]), 170)


def test_steps_that_are_not_finite_are_bounded_in_a_row_not_in_all() -> None:
    watch = detector_of(Recovery(), max_nonfinite=2)
    watch.require_finite(history([], nonfinite(1, 2, 4, 5, 7, 8)), 8)
    watch.require_finite(history([], nonfinite(1, 2, 3)), 4)
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row, up to step 9"):
        watch.require_finite(history([], nonfinite(7, 8, 9)), 9)


def test_what_is_skipped_adds_up() -> None:
    assert skipped_sequences(history([], [spike(20, 80), *nonfinite(22), spike(25, 16)])) == 96
