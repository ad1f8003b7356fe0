"""What each rank of small experiments runs (``python -m tests.engine_steps JOB`` under torchrun): steps of our engine
on random tokens, the same ones whatever the ranks, and what became of losses, norms and weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm.data.sequences import Batch
from llm.model.config import ModelConfig
from llm.model.transformer import Transformer
from llm.pretrain.config import PretrainConfig
from llm.training import checkpoint
from llm.training.engine import Engine, start_ranks

VOCAB_SIZE = 61
SEQUENCES = {4: [1], 7: [2, 3, 5, 7], 9: list(range(12))}
"""Some of other lengths than the context, which has 8 tokens."""


@dataclass
class Experiment:
    """Some optimizer steps, with the engine saved and built anew after `reload_after` of them."""

    config: dict[str, Any]
    steps: int
    reload_after: int = 0

    @property
    def pretrain(self) -> PretrainConfig:
        return PretrainConfig.model_validate(self.config)

    @property
    def shape(self) -> ModelConfig:
        return ModelConfig(**self.pretrain.model.model_dump(), vocab_size=VOCAB_SIZE)


@dataclass
class Outcome:
    """The steps' losses, norms and what an event tells of each; then weights, losses of the targets of a batch, and
    logits of what follows `SEQUENCES`."""

    facts: list[dict[str, Any]]
    weights: dict[str, Tensor]
    nats_BT: Tensor
    logits_BV: Tensor


def batch(step: int, sequences: int, model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Random tokens and targets of a step's global batch, each ``(sequences, context)``."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, model.vocab_size, (sequences, model.context + 1), generator=generator)
    return rows[:, :-1], rows[:, 1:]


def run(experiments: list[Experiment], folder: Path, launcher: Callable[..., None]) -> list[Outcome]:
    """Let ranks do experiments, all of the same number of ranks, one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps([asdict(experiment) for experiment in experiments]))
    count = experiments[0].pretrain.runtime.ranks
    launcher("tests.engine_steps", folder / "job.json", count, logs=folder / "logs")
    facts = json.loads((folder / "facts.json").read_text())
    tensors = [load_file(folder / f"tensors-{number}.safetensors") for number in range(len(experiments))]
    nats = [each.pop("nats") for each in tensors]
    logits = [each.pop("logits") for each in tensors]
    return [Outcome(*outcome) for outcome in zip(facts, tensors, nats, logits, strict=True)]


def perform(experiment: Experiment, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """One experiment, on every rank: facts, and tensors."""
    config, shape = experiment.pretrain, experiment.shape
    resolved = config.wanted.resolve()
    rank = dist.get_rank() * config.runtime.data_parallel_size // dist.get_world_size()
    engine = Engine(Transformer(shape, seed=config.seed), resolved)
    facts = []
    for step in range(experiment.steps):
        engine.next_logits(SEQUENCES)  # what is read between steps changes none
        if step and step == experiment.reload_after:
            folder.mkdir(exist_ok=True)
            checkpoint.write_shard(folder, dist.get_rank(), engine.snapshot())
            dist.barrier()
            engine = Engine(Transformer(shape, seed=config.seed + 1), resolved)
            engine.restore(folder)
        sequences, count = config.plan.sequences_at(step), resolved.accumulation(step)
        mine = [part.chunk(config.runtime.data_parallel_size)[rank] for part in batch(step, sequences, shape)]
        micro_batches = map(Batch, *(part.chunk(count) for part in mine))
        taken = engine.step(
            micro_batches, count, config.schedule.lr_multiplier(step, config.steps), measure=True
        )
        told = {**engine.group_facts(taken), **engine.layer_facts(taken)}
        facts.append({"loss": taken.loss, "norm": taken.grad_norm, **told})
    nats_BT = engine.measure(Batch(*batch(experiment.steps, 2, shape)))
    logits = engine.next_logits(SEQUENCES)
    assert [*logits] == [*SEQUENCES]
    return facts, engine.weights() | {"nats": nats_BT, "logits": torch.stack([*logits.values()])}


def main(path: Path) -> None:
    start_ranks()
    facts = []
    for number, job in enumerate(json.loads(path.read_text())):
        told, tensors = perform(Experiment(**job), path.parent / f"checkpoint-{number}")
        facts.append(told)
        if dist.get_rank() == 0:
            save_file(tensors, path.parent / f"tensors-{number}.safetensors")
    if dist.get_rank() == 0:
        (path.parent / "facts.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
