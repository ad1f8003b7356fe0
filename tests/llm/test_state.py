"""State of a training saved by some ranks and resumed by others, on engines of all ZeRO stages: no stage, no launcher,
so that two ranks can go through all of them in one start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forks
import pytest
from safetensors.torch import load_file


def run_ranks(folder: Path, count: int, stages: list[int], sources: list[str]) -> dict[str, Any]:
    job = folder / f"job-{count}-{stages}.json"
    job.write_text(json.dumps({"stages": stages, "sources": sources}))
    forks.launch("tests.state_steps", job, count, logs=folder)
    return json.loads((folder / f"said-{count}.json").read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One rank's state, then that of two ranks at each ZeRO stage, each resumed by others."""
    folder = tmp_path_factory.mktemp("state")
    one = run_ranks(folder, 1, [0], ["1x0"])
    two = run_ranks(folder, 2, [0, 1, 2, 3], ["1x0", "2x0"])
    back = run_ranks(folder, 1, [1], ["2x3", "2x2"])
    return folder, one | two | back


def joined(folder: Path) -> dict[str, Any]:
    """All that the ranks saved, put together: parameter and kind -> its elements."""
    slices: dict[str, dict[int, list[float]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for key, values in load_file(path).items():
            name, start = key.rsplit(":", 1)
            slices.setdefault(name, {})[int(start or 0)] = values.reshape(-1).tolist()
    return {
        name: [number for start in sorted(held) for number in held[start]] for name, held in slices.items()
    }


STAGES = ["2x0", "2x1", "2x2", "2x3"]


@pytest.mark.parametrize("spread", ["1x0", *STAGES])
def test_the_same_ranks_and_stage_go_on_bit_for_bit(saved: tuple[Path, dict[str, Any]], spread: str) -> None:
    folder, said = saved
    assert said[f"{spread} from {spread}"]["losses"] == said[spread]["losses"]
    assert joined(folder / f"{spread} from {spread} four") == joined(folder / f"{spread} four")


@pytest.mark.parametrize(
    "spread", [*[f"{stage} from 1x0" for stage in STAGES], "1x1 from 2x3", "1x1 from 2x2"]
)
def test_other_ranks_and_stages_hold_the_same_state_and_go_on_to_about_the_same_losses(
    saved: tuple[Path, dict[str, Any]], spread: str
) -> None:
    folder, said = saved
    source = spread.split()[-1]
    kept = joined(folder / f"{source} two")
    assert {key.split(":")[1] for key in kept} == {
        "value",
        "exp_avg",
        "exp_avg_sq",
        "momentum_buffer",
        "step",
    }
    assert joined(folder / spread) == kept
    assert said[spread]["losses"] == pytest.approx(said[source]["losses"], rel=1e-6)


@pytest.mark.parametrize("spread", ["1x0", *STAGES])
def test_a_loss_that_is_not_finite_on_one_rank_moves_nothing_on_any(
    saved: tuple[Path, dict[str, Any]], spread: str
) -> None:
    folder, said = saved
    assert said[spread]["spoilt"] is False
    assert joined(folder / f"{spread} spoilt") == joined(folder / f"{spread} four")
    assert 0 < said[spread]["next"] < 10
    assert joined(folder / f"{spread} four") != joined(folder / f"{spread} two")
