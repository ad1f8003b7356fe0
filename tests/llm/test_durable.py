"""What long trainings meet: signals, hung ranks, kills while a checkpoint is written, leaps of the loss, and resumes on
other ranks. Whole trainings, so each test costs some starts of ranks."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import forks
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from disturbed import Stage, events
from toy import CONTEXT, toy

from data_pipeline.stage import LocalContext
from llm.data.order import batch_sequences
from llm.pretrain.config import PretrainConfig
from llm.pretrain.stage import pretrain
from llm.pretrain.summary import summarise
from llm.training import checkpoint

STEPS, BATCH = 100, 16
PAYLOAD = ("losses.parquet", "validation.parquet", "model.safetensors", "skipped.parquet")


def recipe(recovery: dict[str, Any] | None = None, steps: int = STEPS, **runtime: Any) -> PretrainConfig:
    """100 steps of 16 windows; every 10 a checkpoint."""
    common = {"checkpoint_every": 10, "micro_batch": 8, "validation": {"every": 50, "tokens": 2048}}
    return toy(steps, BATCH, {**common, **runtime}, recovery=recovery or {})


def run(config: PretrainConfig, corpus: dict[str, Path], out: Path) -> Path:
    pretrain(config, corpus, out, LocalContext(launcher=forks.launch))
    return out


def payload(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in PAYLOAD if (out / name).exists()}


@pytest.fixture(scope="module")
def calm(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed training on one rank."""
    return run(recipe(keep_checkpoints=1, keep_every=40), corpus, tmp_path_factory.mktemp("calm"))


@pytest.fixture(scope="module")
def calm_pair(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two ranks."""
    return run(recipe(ranks=2, zero_stage=1), corpus, tmp_path_factory.mktemp("calm-pair"))


def test_the_newest_checkpoints_and_those_of_each_so_many_steps_are_kept(calm: Path) -> None:
    kept = checkpoint.complete(calm / "scratch" / "checkpoints")
    assert [found.step for found in kept] == [90, 80, 40]
    made = [event["step"] for event in events(calm, "checkpoint")]
    assert made == list(range(10, STEPS, 10))


@pytest.mark.long
def test_usr1_saves_and_goes_on_and_ctrl_c_saves_and_ends(corpus: dict[str, Path], tmp_path: Path) -> None:
    steps = 300  # so many that a signal is heard before the last, though torchrun hands it on in its own time
    calm, tmp_path = run(recipe(steps=steps), corpus, tmp_path / "calm"), tmp_path / "disturbed"
    stage = Stage(recipe(steps=steps, checkpoint_every=1000), corpus, tmp_path)
    stage.wait_for("step", 3)
    stage.process.send_signal(signal.SIGUSR1)
    stage.wait_for("checkpoint")
    stage.process.send_signal(signal.SIGINT)
    assert stage.end()[0] == 3
    [saved, last] = [event["step"] for event in events(tmp_path, "checkpoint")]
    assert 3 <= saved < last < steps
    assert [event["step"] for event in events(tmp_path, "interrupted")] == [last]
    assert events(tmp_path, "step")[-1]["step"] == last
    run(recipe(steps=steps), corpus, tmp_path)
    assert [event["step"] for event in events(tmp_path, "resume")] == [last]
    assert payload(tmp_path) == payload(calm)


@pytest.mark.long
def test_a_rank_that_hangs_ends_the_run_in_bounded_time_and_it_can_be_run_again(
    calm_pair: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    config = recipe(ranks=2, zero_stage=1, collective_timeout_seconds=15, grace_seconds=2)
    stage = Stage(config, corpus, tmp_path)
    stage.wait_for("step", 25)
    hung, since = stage.ranks(), time.monotonic()
    hung[1].suspend()
    code, said = stage.end()
    assert code == 3
    assert "another rank did not answer within pretrain.runtime.collective_timeout_seconds" in said
    assert time.monotonic() - since < 300
    assert not psutil.wait_procs(hung, timeout=5)[1]
    run(recipe(ranks=2, zero_stage=1), corpus, tmp_path)
    assert payload(tmp_path) == payload(calm_pair)


def test_a_rank_that_was_killed_is_named_with_its_signal_and_not_what_the_others_say_of_it(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    stage = Stage(recipe(ranks=2, zero_stage=1), corpus, tmp_path)
    stage.wait_for("step", 3)
    [victim] = [rank for rank in stage.ranks() if rank.environ()["RANK"] == "1"]
    victim.kill()
    code, said = stage.end()
    assert code == 3
    assert "rank 1 was ended by SIGKILL" in said
    assert "memory" in said
    assert "loo" not in said.partition("(full log")[0]
    assert (tmp_path / "logs" / "ranks.log").exists()


def killed_while_saving(config: PretrainConfig, corpus: dict[str, Path], out: Path, kills: int) -> None:
    """Kill the training ``kills`` times as a checkpoint is being written."""
    dice = random.Random(20261125)
    for _ in range(kills):
        stage = Stage(config, corpus, out)
        started = len(events(out, "start"))
        stage.wait_until(lambda: len(events(out, "start")) > started)  # noqa: B023
        stage.wait_until(lambda: any((out / "scratch" / "checkpoints").glob("*.tmp")))
        time.sleep(dice.uniform(0, 0.02))
        stage.kill()


def test_a_kill_while_a_checkpoint_is_written_changes_no_byte(
    calm: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    killed_while_saving(recipe(), corpus, tmp_path, kills=1)
    run(recipe(), corpus, tmp_path)
    assert payload(tmp_path) == payload(calm)


@pytest.mark.long
def test_many_kills_while_checkpoints_are_written_change_no_byte(
    calm_pair: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    config = recipe(ranks=2, zero_stage=1, checkpoint_every=1)
    killed_while_saving(config, corpus, tmp_path, kills=10)
    run(config, corpus, tmp_path)
    assert payload(tmp_path) == payload(calm_pair)


SPIKY = {"spike_z": 8, "spike_window": 8, "rollback_every": 5}


def plant_spike(corpus: dict[str, Path], folder: Path, step: int) -> dict[str, Path]:
    """The corpus with other training tokens: the windows of one step are noise."""
    shutil.copytree(corpus["tokens"], folder)
    flat = folder / "flat" / "train-00000.bin"
    tokens = np.fromfile(flat, "<u2")
    dice = np.random.default_rng(0)
    for window in batch_sequences(step * BATCH, BATCH, 0, (len(tokens) - 1) // CONTEXT).astype(int):
        tokens[window * CONTEXT + 1 : (window + 1) * CONTEXT + 1] = dice.integers(0, 500, CONTEXT)
    tokens.tofile(flat)
    return {**corpus, "tokens": folder}


@pytest.mark.long
def test_a_leap_of_the_loss_rolls_back_and_passes_over_the_batches_and_a_kill_changes_no_byte_of_it(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    """Step 19 (from 0) reads noise: back to step 15, and on with the batches of steps 20 on."""
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    corpus = plant_spike(corpus, tmp_path / "tokens", step=19)
    config = recipe(SPIKY)
    run(config, corpus, calm)
    [told] = events(calm, "rollback")
    assert (told["step"], told["to"], told["windows"]) == (20, 15, 5 * BATCH)
    assert pq.read_table(calm / "skipped.parquet")["step"].to_pylist() == [20]
    assert summarise(config.resolve(), calm)["skipped/spike"] == 1
    losses = pq.read_table(calm / "losses.parquet")
    assert losses["step"].to_pylist() == list(range(1, STEPS + 1))
    assert max(losses["loss"].to_pylist()[15:]) < told["loss"] - 0.5
    steps = [event["step"] for event in events(calm, "step")]
    assert steps == [*range(1, 21), *range(16, STEPS + 1)]

    stage = Stage(config, corpus, disturbed)
    stage.wait_for("rollback")
    stage.kill()
    run(config, corpus, disturbed)
    assert payload(disturbed) == payload(calm)


ELASTIC = [
    (recipe(), 20),
    (recipe(ranks=2, zero_stage=3, micro_batch=4), 50),
    (recipe(), None),
]


def test_a_training_goes_on_with_other_ranks_zero_stages_and_micro_batches(
    calm: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    for config, stop_after in ELASTIC:
        if stop_after is None:
            run(config, corpus, tmp_path)
            break
        stage = Stage(config, corpus, tmp_path)
        stage.wait_for("step", stop_after)
        stage.ranks()[-1].send_signal(signal.SIGTERM)
        code, said = stage.end()
        last = events(tmp_path, "interrupted")[-1]["step"]
        assert (code, said) == (
            3,
            f"Interrupted: interrupted after step {last}, which is saved: run it again to resume\n",
        )
    one, other = (pq.read_table(out / "losses.parquet")["loss"].to_pylist() for out in (calm, tmp_path))
    assert other == pytest.approx(one, rel=1e-5)
    assert other != one
    warned = [event["message"] for event in events(tmp_path, "warning")]
    assert len(warned) == 2
    assert all("the last bits may differ from here on" in message for message in warned)
