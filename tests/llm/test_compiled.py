"""Compiled layers compute what the others do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_steps import Experiment, run
from torch import Tensor

from flows.engine import launch
from llm.model.config import ModelConfig
from llm.model.transformer import Transformer
from llm.training import compiled
from llm.training.compiled import compile_layers

STEPS = 6


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """What a test compiles, no other one runs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def train(model: Transformer) -> list[Tensor]:
    """Losses of some steps on random tokens, and of each target in the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(STEPS):
        rows_BT = torch.randint(
            0, model.config.vocab_size, (4, model.config.context + 1), generator=generator
        )
        documents_BT = (torch.rand(rows_BT[:, 1:].shape, generator=generator) < 0.1).cumsum(1)
        loss = model(rows_BT[:, :-1], rows_BT[:, 1:], documents_BT=documents_BT)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    with torch.no_grad():
        nats_BT = model.eval()(rows_BT[:, :-1], rows_BT[:, 1:], reduction="none", documents_BT=documents_BT)
    return [*losses, nats_BT]


@pytest.mark.parametrize(
    ("fields", "checkpointing"),
    [({"qk_norm": True, "kv_heads": 2}, False), ({"positions": "learned"}, True)],
)
def test_traced_layers_train_as_eager_ones_and_share_their_code(
    tiny: Callable[..., ModelConfig], fields: dict[str, Any], checkpointing: bool
) -> None:
    eager, traced = (
        Transformer(tiny(**fields), matmul="onednn", checkpointing=checkpointing) for _ in range(2)
    )
    compile_layers(traced, backend="aot_eager")
    for ours, theirs in zip(train(traced), train(eager), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert traced.state_dict().keys() == eager.state_dict().keys()
    pieces = 4  # up to the projections, to attention, to its output's, and the rest
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * pieces  # in training, and after it


@pytest.mark.long
def test_the_engine_trains_with_compiled_layers_at_each_stage_that_allows_it(tmp_path: Path) -> None:
    shape = {"layers": 2, "heads": 2, "width": 64, "context": 32}
    common = {"model": shape, "tokens": STEPS * 256, "batch_tokens": 256, "lr": 1e-2, "precision": "fp32"}

    def experiment(**runtime: Any) -> Experiment:
        return Experiment({**common, "runtime": {"ranks": 2, "micro_batch": 2, **runtime}}, steps=STEPS)

    stages = [experiment(zero_stage=stage, compile=True) for stage in range(3)]
    experiments = [experiment(), *stages, experiment(sequence_parallel=2, compile=True)]
    eager, *others = run(experiments, tmp_path, launch.local)
    for other in others:
        for key in ("loss", "norm"):
            ours, theirs = ([fact[key] for fact in one.facts] for one in (other, eager))
            assert ours == pytest.approx(theirs, rel=1e-4)
        torch.testing.assert_close(other.nats_BT, eager.nats_BT, rtol=1e-3, atol=1e-3)
        assert other.weights.keys() == eager.weights.keys()


def test_what_compiling_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiled.missing("cpu") == "there is no compiler no-such-compiler"
    monkeypatch.setenv("CXX", "sh")  # a program that is there
    assert compiled.missing("cpu") is None
    monkeypatch.setattr(compiled, "installed", lambda _: False)
    assert compiled.missing("cuda") == "the package triton is not installed"
