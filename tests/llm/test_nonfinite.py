"""Trainings whose losses are not finite, and what is drawn and told of those that were so in part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import forks
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.stage import LocalContext
from flows.compare.curves import read_curves
from flows.engine.store import Artifact
from flows.listeners.plots import plots
from llm.pretrain.config import PretrainConfig
from llm.pretrain.stage import pretrain
from llm.training.events import EventLog


def train(corpus: dict[str, Path], out: Path, steps: int, lr: float, **model: Any) -> None:
    config = PretrainConfig.model_validate(
        {
            "model": {"layers": 1, "heads": 2, "width": 16, "context": 16, **model},
            "tokens": steps * 64,
            "batch_tokens": 64,
            "lr": lr,
            "precision": "fp32",
            "runtime": {"validation": {"every": 2, "tokens": 256}},
        }
    )
    pretrain(config, corpus, out, LocalContext(launcher=forks.launch))


@pytest.mark.parametrize("steps", [1, 5])
def test_a_training_of_which_no_step_was_finite_says_so(
    corpus: dict[str, Path], tmp_path: Path, steps: int
) -> None:
    with pytest.raises(UserError, match=f"not finite in any of the {steps} steps: nothing was trained"):
        train(corpus, tmp_path, steps, lr=1e-3, init_std=1e38)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_model_whose_held_out_loss_is_not_finite_is_not_sealed(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match="held-out loss is not finite after step 3: training diverged; lower pretrain"
    ):
        train(corpus, tmp_path, steps=3, lr=1e30)
    assert "NaN" not in (tmp_path / "logs" / "events.jsonl").read_text()


def test_a_validated_step_that_was_skipped_is_drawn_where_it_stands(tmp_path: Path) -> None:
    steps = [1, 2, 3, 5, 6]
    losses = {"step": steps, "tokens": [64 * step for step in steps], "loss": [5.0, 4.5, 4.0, 3.5, 3.0]}
    checks = {"step": [4, 7], "loss": [4.0, 3.1], "bits_per_byte": [2.0, 1.9]}
    for name, table in (("losses", losses), ("validation", checks)):
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    log = EventLog(tmp_path / "logs" / "events.jsonl")
    log.write("start", step=0)
    log.write("skip", step=7, loss="nan", grad_norm="nan")
    config = PretrainConfig(model={"context": 16}, tokens=448, batch_tokens=64, precision="fp32")
    made = {"config": config.identity(), "runtime": config.runtime.model_dump(mode="json")}
    artifact = Artifact(tmp_path, {"stage": "pretrain", "metrics": {}, **made})
    [figure] = plots(artifact).values()
    assert figure.axes[0].lines[1].get_xdata().tolist() == [256, 448]
    assert read_curves(artifact).held_out.tokens.tolist() == [256, 448]
