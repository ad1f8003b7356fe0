from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.model import ModelConfig, Transformer
from llm.optim import parameter_groups
from llm.schedule import learning_rate


def test_the_rate_warms_up_to_its_peak_and_ends_at_its_floor() -> None:
    rates = [learning_rate(step, steps=11, warmup=4, peak=8.0, floor_ratio=0.25) for step in range(11)]
    assert rates[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert rates[7] == pytest.approx((8.0 + 2.0) / 2)  # half of the way down the cosine
    assert rates[10] == pytest.approx(2.0)


@given(steps=st.integers(1, 500), warmup=st.integers(0, 499), floor=st.floats(0, 1))
def test_the_rate_never_leaves_its_bounds_nor_rises_after_warm_up(
    steps: int, warmup: int, floor: float
) -> None:
    rates = [
        learning_rate(step, steps=steps, warmup=min(warmup, steps - 1), peak=1.0, floor_ratio=floor)
        for step in range(steps)
    ]
    assert all(0 < rate <= 1 or (rate == 0 and floor == 0) for rate in rates)
    falling = rates[min(warmup, steps - 1) :]
    assert all(later <= earlier for earlier, later in pairwise(falling))


@pytest.mark.parametrize("tied", [False, True])
def test_weight_decay_is_on_the_matrices_alone(tied: bool) -> None:
    model = Transformer(
        ModelConfig(layers=1, heads=2, width=16, vocab_size=64, qk_norm=True, tie_embeddings=tied)
    )
    decayed, kept = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    decays = {names[id(parameter)] for parameter in decayed["params"]}
    keeps = {names[id(parameter)] for parameter in kept["params"]}
    assert decays | keeps == set(names.values())
    assert not decays & keeps
    assert all("norm" in name or name == "embed_tokens.weight" for name in keeps)
    assert ("lm_head.weight" in decays) != tied
