"""What each rank of a small experiment runs (``python -m tests.engine_steps JOB`` under torchrun): steps of our engine
on random tokens, the same ones whatever the ranks, and what became of losses, norms and weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from flows import launch
from llm.engine import Engine, start_ranks
from llm.model import ModelConfig, Transformer
from llm.pretrain import PretrainConfig


def batch(step: int, windows: int, model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Random tokens and targets of a step's global batch, each ``(windows, context)``."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, model.vocab_size, (windows, model.context + 1), generator=generator)
    return rows[:, :-1], rows[:, 1:]


def take_steps(
    config: PretrainConfig, vocab_size: int, folder: Path, steps: int
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Let the config's ranks take ``steps`` optimizer steps; the facts of each, and the weights after the last."""
    from safetensors.torch import load_file

    folder.mkdir(parents=True, exist_ok=True)
    job = {"config": config.model_dump(mode="json"), "vocab_size": vocab_size, "steps": steps}
    (folder / "job.json").write_text(json.dumps(job))
    launch.local("tests.engine_steps", folder / "job.json", config.runtime.ranks, logs=folder / "logs")
    facts = json.loads((folder / "facts.json").read_text())
    return facts, load_file(folder / "weights.safetensors")


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    config = PretrainConfig.model_validate(job["config"])
    shape = ModelConfig(**config.model.model_dump(), vocab_size=job["vocab_size"])
    rank, ranks = start_ranks()
    engine = Engine(Transformer(shape, seed=config.seed), config)
    facts = []
    for step in range(job["steps"]):
        windows, count = config.plan.windows_at(step), config.accumulation(step)
        mine = [part.chunk(ranks)[rank].chunk(count) for part in batch(step, windows, shape)]
        rate = config.lr * config.schedule.multiple(step, config.steps)
        loss, norm = engine.step(zip(*mine, strict=True), count, rate)
        facts.append({"loss": loss, "norm": norm})
    weights = engine.weights()
    if rank == 0:
        (path.parent / "facts.json").write_text(json.dumps(facts))
        save_file(weights, path.parent / "weights.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
