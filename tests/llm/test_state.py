"""State of a training saved by some ranks and taken up by others, on engines of all ZeRO stages: no stage, no launcher,
so that two ranks can go through all of them in one start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

RANKS = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from llm.engine import Engine, start_ranks
from llm.model import ModelConfig, Transformer
from llm.pretrain import PretrainConfig
from llm.windows import Batch

folder = Path(sys.argv[1])
rank, ranks = start_ranks()
shape = {"layers": 1, "heads": 2, "width": 16, "context": 8, "vocab_size": 500, "qk_norm": True}


def engine(stage, seed):
    config = PretrainConfig.model_validate({
        "model": {name: value for name, value in shape.items() if name != "vocab_size"},
        "tokens": 1024, "batch_tokens": 16 * 8, "precision": "fp32", "seed": seed,
        "lr": 1e-2, "optimizer": {"kind": "muon"},
        "runtime": {"ranks": ranks, "zero_stage": stage, "micro_batch": 8 // ranks},
    })
    return Engine(Transformer(ModelConfig.model_validate(shape), seed=seed), config)


def step(engine, number, spoil=False):
    dice = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 500, (2, ranks, 8 // ranks, 9), generator=dice)[:, rank]
    if spoil and rank == ranks - 1:  # NaN comes into the loss as it would in a long run: through an activation
        hook = engine.module.register_forward_hook(lambda module, args, loss: loss * float("nan"))
    stepped = engine.step([Batch(micro[:, :-1], micro[:, 1:], None) for micro in tokens], len(tokens), 1.0)
    if spoil and rank == ranks - 1:
        hook.remove()
    return stepped


def hold(engine, name):
    (folder / name).mkdir(exist_ok=True)
    save_file(engine.snapshot(), folder / name / f"rank-{rank}.safetensors")
    dist.barrier()


said = {}
for stage in map(int, sys.argv[2].split(",")):
    first = engine(stage, seed=0)
    step(first, 0), step(first, 1)
    hold(first, f"{ranks}x{stage} two")
    on = [step(first, 2).loss, step(first, 3).loss]
    hold(first, f"{ranks}x{stage} four")
    spoilt = step(first, 4, spoil=True)
    hold(first, f"{ranks}x{stage} spoilt")
    said[f"{ranks}x{stage}"] = {"losses": on, "spoilt": spoilt.applied, "next": step(first, 5).loss}
    for source in sys.argv[3].split(",") + [f"{ranks}x{stage}"]:
        second = engine(stage, seed=1)
        second.restore(folder / f"{source} two")
        hold(second, f"{ranks}x{stage} from {source}")
        said[f"{ranks}x{stage} from {source}"] = {"losses": [step(second, 2).loss, step(second, 3).loss]}
        hold(second, f"{ranks}x{stage} from {source} four")
if rank == 0:
    (folder / f"said-{ranks}.json").write_text(json.dumps(said))
"""


def run_ranks(folder: Path, ranks: int, stages: str, sources: str) -> dict[str, Any]:
    script = folder / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    ended = subprocess.run(
        [*command, str(script), str(folder), stages, sources], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads((folder / f"said-{ranks}.json").read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One rank's state, then that of two ranks at each ZeRO stage, each taken up by others."""
    folder = tmp_path_factory.mktemp("state")
    one = run_ranks(folder, 1, "0", "1x0")
    two = run_ranks(folder, 2, "0,1,2,3", "1x0,2x0")
    back = run_ranks(folder, 1, "1", "2x3,2x2")
    return folder, one | two | back


def pieces(folder: Path) -> dict[str, Any]:
    """All that the ranks saved, put together: parameter and kind -> its elements."""
    runs: dict[str, dict[int, list[float]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for key, piece in load_file(path).items():
            name, start = key.rsplit(":", 1)
            runs.setdefault(name, {})[int(start or 0)] = piece.reshape(-1).tolist()
    return {
        name: [number for start in sorted(parts) for number in parts[start]] for name, parts in runs.items()
    }


STAGES = ["2x0", "2x1", "2x2", "2x3"]


@pytest.mark.parametrize("spread", ["1x0", *STAGES])
def test_the_same_ranks_and_stage_go_on_bit_for_bit(saved: tuple[Path, dict[str, Any]], spread: str) -> None:
    folder, said = saved
    assert said[f"{spread} from {spread}"]["losses"] == said[spread]["losses"]
    assert pieces(folder / f"{spread} from {spread} four") == pieces(folder / f"{spread} four")


@pytest.mark.parametrize(
    "spread", [*[f"{stage} from 1x0" for stage in STAGES], "1x1 from 2x3", "1x1 from 2x2"]
)
def test_other_ranks_and_stages_hold_the_same_state_and_go_on_to_about_the_same_losses(
    saved: tuple[Path, dict[str, Any]], spread: str
) -> None:
    folder, said = saved
    source = spread.split()[-1]
    kept = pieces(folder / f"{source} two")
    assert {key.split(":")[1] for key in kept} == {
        "value",
        "exp_avg",
        "exp_avg_sq",
        "momentum_buffer",
        "step",
    }
    assert pieces(folder / spread) == kept
    assert said[spread]["losses"] == pytest.approx(said[source]["losses"], rel=1e-6)


@pytest.mark.parametrize("spread", ["1x0", *STAGES])
def test_a_loss_that_is_not_finite_on_one_rank_moves_nothing_on_any(
    saved: tuple[Path, dict[str, Any]], spread: str
) -> None:
    folder, said = saved
    assert said[spread]["spoilt"] is False
    assert pieces(folder / f"{spread} spoilt") == pieces(folder / f"{spread} four")
    assert 0 < said[spread]["next"] < 10
    assert pieces(folder / f"{spread} four") != pieces(folder / f"{spread} two")
