"""The law of loss by parameters and tokens: what is fitted, how sure it is, and which models are trained for it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data_pipeline.core.errors import UserError
from llm.model.config import ModelConfig
from llm.scaling.law import Interval, Ladder, Law, Rung, fit
from llm.scaling.shapes import SPAN, matrices, shapes

TRUE = Law(E=0.9, A=40.0, alpha=0.35, B=60.0, beta=0.33)
BUDGETS = (3e10, 1e11, 3e11)


def rung(size: float, budget: float, noise: float = 0.0) -> Rung:
    """A run of a model ``size`` times as large as twenty tokens a parameter make it."""
    parameters = round(math.sqrt(budget / 120) * size)
    tokens = round(budget / 6 / parameters)
    loss = TRUE.loss(parameters, tokens) * math.exp(noise)
    return Rung(
        parameters=parameters, tokens=tokens, flops=6.0 * parameters * tokens, loss=loss, budget=budget
    )


def made(noise: float, seed: int, law_at: float = 1.0) -> Ladder:
    """A ladder of four sizes and two seeds."""
    draw = np.random.default_rng(seed)
    rungs = [
        rung(size, budget, float(draw.normal()) * noise)
        for budget in BUDGETS
        for size in np.geomspace(SPAN**-0.5, SPAN**0.5, 4).tolist()
        for _ in range(2)
    ]
    return Ladder(tuple(rungs), seed)


def test_the_law_behind_runs_without_noise_is_found() -> None:
    ladder = made(0.0, 0)
    for parameters, tokens in ((20_000, 10**6), (300_000, 10**7)):
        assert ladder.law.loss(parameters, tokens) == pytest.approx(TRUE.loss(parameters, tokens), rel=2e-3)
    assert ladder.exponent().middle == pytest.approx(TRUE.beta / (TRUE.alpha + TRUE.beta), abs=0.02)
    for budget in BUDGETS:
        assert ladder.law.optimum(budget) == pytest.approx(TRUE.optimum(budget), rel=0.05)
        valley = ladder.valley(budget)
        assert valley
        assert valley == pytest.approx(TRUE.optimum(budget), rel=0.1)


def test_the_optimum_of_a_law_has_the_least_loss_of_its_flops() -> None:
    for flops in (1e12, 1e18):
        best = TRUE.optimum(flops)
        least = TRUE.loss(best, flops / 6 / best)
        assert all(TRUE.loss(best * x, flops / 6 / best / x) > least for x in (0.5, 0.9, 1.1, 2.0))


def test_a_weight_counts_as_so_many_runs() -> None:
    """Of which the bootstrap is made."""
    rungs = list(made(0.01, 1).rungs)
    weights = np.ones(len(rungs))
    weights[[0, 5]] = 3, 0
    twice = fit([*rungs[:1] * 3, *rungs[1:5], *rungs[6:]])
    weighed = fit(rungs, weights)
    assert weighed.loss(50_000, 10**6) == pytest.approx(twice.loss(50_000, 10**6), rel=1e-3)


def test_one_run_far_off_moves_the_law_little() -> None:
    rungs = list(made(0.002, 2).rungs)
    before = fit(rungs).loss(50_000, 10**6)
    broken = rungs[3]
    rungs[3] = Rung(
        parameters=broken.parameters,
        tokens=broken.tokens,
        flops=broken.flops,
        loss=broken.loss * 2,
        budget=broken.budget,
    )
    assert fit(rungs).loss(50_000, 10**6) == pytest.approx(before, rel=0.02)


def test_of_forecasts_to_ten_times_the_flops_nine_in_ten_lie_within_their_bounds() -> None:
    """Twelve ladders, of which each foresees three runs; the draws are seeded, and the least number is far below what a
    right interval gives (binomial, 0.9 of 36: fewer than 27 come once in two thousand times)."""
    draw, inside = np.random.default_rng(7), 0
    for seed in range(12):
        ladder = made(0.004, seed)
        for size in (0.5, 1.0, 2.0):
            one = rung(size, 3e12, float(draw.normal()) * 0.004)
            inside += one.loss in ladder.forecast(
                parameters=one.parameters, tokens=one.tokens, flops=one.flops
            )
    assert inside >= 27


def test_bounds_grow_with_noise_and_with_the_distance() -> None:
    def width(ladder: Ladder, flops: float) -> float:
        one = rung(1.0, flops)
        found = ladder.forecast(parameters=one.parameters, tokens=one.tokens, flops=flops)
        assert found.low < found.middle < found.high
        return math.log(found.high / found.low)

    assert width(made(0.02, 3), 3e12) > 2 * width(made(0.002, 3), 3e12)
    assert width(made(0.004, 3), 3e13) > width(made(0.004, 3), 3e12) > width(made(0.004, 3), 3e11)


def test_a_forecast_is_the_same_each_time() -> None:
    one = rung(1.0, 3e12)
    found = {
        (forecast.low, forecast.high)
        for forecast in (
            made(0.004, 3).forecast(parameters=one.parameters, tokens=one.tokens, flops=one.flops)
            for _ in range(2)
        )
    }
    assert len(found) == 1


def test_no_parabola_lies_where_runs_only_fall() -> None:
    ladder = Ladder(tuple(rung(size, 3e11) for size in (0.02, 0.04, 0.08)))
    assert ladder.valley(3e11) is None
    assert 1.0 in Interval(1.0, 0.9, 1.1)
    assert 1.2 not in Interval(1.0, 0.9, 1.1)


@pytest.mark.parametrize(
    "model",
    [
        {"layers": 12, "heads": 12, "width": 768},
        {"layers": 12, "heads": 12, "width": 768, "kv_heads": 4, "hidden": 2048},
        {"layers": 4, "heads": 4, "width": 128, "positions": "learned"},
    ],
)
def test_shapes_lie_evenly_and_keep_proportions(model: dict[str, int]) -> None:
    whole = ModelConfig(**model, vocab_size=2048)
    found = shapes(whole, 1e17, 5)
    middle = math.sqrt(1e17 / 120)
    for place, one in enumerate(found):
        assert one.parameters == pytest.approx(middle * SPAN ** (place / 4 - 0.5), rel=0.12)
        built = ModelConfig.model_validate(
            {
                **whole.model_dump(),
                **{setting.split(".")[2].split("=")[0]: setting.split("=")[1] for setting in one.settings},
            }
        )
        assert matrices(built) == one.parameters
        assert built.head_width == whole.head_width
        assert built.heads // built.kv_head_count == whole.heads // whole.kv_head_count
        assert 1 / 4 < (built.width / built.layers) / (whole.width / whole.layers) < 4


def test_models_that_would_be_one_are_refused() -> None:
    with pytest.raises(UserError, match="too small to differ"):
        shapes(ModelConfig(layers=2, heads=2, width=128, vocab_size=50_000), 1e10, 4)
