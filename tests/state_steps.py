"""What each rank of `test_state` runs (``python -m tests.state_steps JOB``): engines at some ZeRO stages step, save,
resume from what they or others saved, and step again; rank 0 leaves the losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from llm.data.sequences import Batch
from llm.model.config import ModelConfig
from llm.model.transformer import Transformer
from llm.pretrain.config import PretrainConfig
from llm.training.engine import Engine, Step, start_ranks

SHAPE = {"layers": 1, "heads": 2, "width": 16, "context": 8, "qk_norm": True}


def make_engine(stage: int, seed: int) -> Engine:
    ranks = dist.get_world_size()
    config = PretrainConfig.model_validate(
        {
            "model": SHAPE,
            "tokens": 1024,
            "batch_tokens": 16 * 8,
            "precision": "fp32",
            "seed": seed,
            "lr": 1e-2,
            "optimizer": {"kind": "muon"},
            "runtime": {"ranks": ranks, "zero_stage": stage, "micro_batch": 8 // ranks},
        }
    )
    shape = ModelConfig.model_validate({**SHAPE, "vocab_size": 500})
    return Engine(Transformer(shape, seed=seed), config.wanted.resolve())


def step(engine: Engine, number: int, spoil: bool = False) -> Step:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dice = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 500, (2, ranks, 8 // ranks, 9), generator=dice)[:, rank]
    if spoil and rank == ranks - 1:
        # NaN comes into the loss as it would in a long run: through an activation.
        hook = engine.module.register_forward_hook(lambda module, args, loss: loss * float("nan"))
    stepped = engine.step([Batch(micro[:, :-1], micro[:, 1:], None) for micro in tokens], len(tokens), 1.0)
    if spoil and rank == ranks - 1:
        hook.remove()
    return stepped


def hold(engine: Engine, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    save_file(engine.snapshot(), folder / f"rank-{dist.get_rank()}.safetensors")
    dist.barrier()


def main(path: Path) -> None:
    job, folder = json.loads(path.read_text()), path.parent
    rank, ranks = start_ranks()
    said = {}
    for stage in job["stages"]:
        own = f"{ranks}x{stage}"
        first = make_engine(stage, seed=0)
        step(first, 0), step(first, 1)
        hold(first, folder / f"{own} two")
        on = [step(first, 2).loss, step(first, 3).loss]
        hold(first, folder / f"{own} four")
        spoilt = step(first, 4, spoil=True)
        hold(first, folder / f"{own} spoilt")
        said[own] = {"losses": on, "spoilt": spoilt.applied, "next": step(first, 5).loss}
        for source in [*job["sources"], own]:
            second = make_engine(stage, seed=1)
            second.restore(folder / f"{source} two")
            hold(second, folder / f"{own} from {source}")
            said[f"{own} from {source}"] = {"losses": [step(second, 2).loss, step(second, 3).loss]}
            hold(second, folder / f"{own} from {source} four")
    if rank == 0:
        (folder / f"said-{ranks}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
