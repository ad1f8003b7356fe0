"""Whole trainings under the launcher. Each costs seconds, so the module's fixture runs are shared by the tests."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, get_args

import forks
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from disturbed import Stage
from safetensors.torch import load_file

from data_pipeline.core.errors import UserError
from data_pipeline.stage import LocalContext
from data_pipeline.tokenize.shards import TokenShards
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer, token_bytes
from flows.engine import launch
from llm.data.mixture import Mixture
from llm.data.order import permute
from llm.export.config import ExportConfig
from llm.export.stage import export
from llm.kernels.names import BackEnd
from llm.model.generate import generate
from llm.model.transformer import Transformer, load_model
from llm.pretrain.config import PretrainConfig
from llm.pretrain.stage import pretrain
from llm.training import checkpoint
from llm.training.config import Samples
from llm.training.events import read_events

STEPS = 20
PAYLOAD = {
    "losses.parquet",
    "validation.parquet",
    "sources.json",
    "model.json",
    "model.safetensors",
    "report.md",
}


def recipe(**runtime: Any) -> PretrainConfig:
    """20 steps of 24 sequences; every 3 norms, every 4 a checkpoint, every 5 samples, every 10 a validation."""
    model = {"layers": 2, "heads": 4, "kv_heads": 2, "width": 32, "context": 64, "qk_norm": True}
    return PretrainConfig.model_validate(
        {
            "model": model,
            "tokens": STEPS * 24 * 64,
            "batch_tokens": 24 * 64,
            "lr": 3e-3,
            "optimizer": {"kind": "adamw"},  # Muon's steps at every stage are held to float64 by test_optim
            "precision": "fp32",
            "runtime": {
                "checkpoint_every": 4,
                "micro_batch": 6,
                "norms_every": 3,
                "samples": {"every": 5, "prompts": ["", "def ", "é 日本"], "tokens": 20},
                "validation": {"every": 10, "tokens": 12_000},
                **runtime,
            },
        }
    )


def tied(config: PretrainConfig) -> PretrainConfig:
    """The same with one matrix for embeddings and head."""
    return config.model_copy(update={"model": config.model.model_copy(update={"tie_embeddings": True})})


Runs = dict[str, Path]


CONFIGS = {
    "1 rank": recipe(),
    "2 ranks, ZeRO 1": recipe(ranks=2, zero_stage=1, micro_batch=12),
    "2 ranks, ZeRO 2": recipe(ranks=2, zero_stage=2, micro_batch=4),
    "1 rank, tied": tied(recipe()),
    "2 ranks, ZeRO 3, tied": tied(recipe(ranks=2, zero_stage=3, activation_checkpointing=True)),
    "2 ranks, bf16": recipe(ranks=2).model_copy(update={"precision": "bf16"}),
}


SPREAD = [
    ("1 rank", "2 ranks, ZeRO 1"),
    ("1 rank", "2 ranks, ZeRO 2"),
    ("1 rank, tied", "2 ranks, ZeRO 3, tied"),
]
"""A training on one rank, and the same one spread over two."""


@pytest.fixture(scope="module")
def runs(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Undisturbed trainings of one recipe."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(root / "extensions"))
        for name, config in CONFIGS.items():
            # One of them as users start it.
            launcher = launch.local if name == "2 ranks, ZeRO 1" else forks.launch
            pretrain(config, corpus, root / name, LocalContext(launcher=launcher))
    return {name: root / name for name in CONFIGS}


def losses(run: Path) -> list[float]:
    return pq.read_table(run / "losses.parquet")["loss"].to_pylist()


def checksums(run: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.iterdir() if path.is_file()
    }


@pytest.mark.parametrize(("one", "two"), SPREAD)
def test_ranks_zero_stages_and_accumulation_do_not_change_the_losses(runs: Runs, one: str, two: str) -> None:
    alone, spread = losses(runs[one]), losses(runs[two])
    assert len(alone) == len(spread) == STEPS
    assert spread == pytest.approx(alone, rel=1e-5)
    assert alone[-1] < alone[0] - 0.5  # else the losses would agree for not having learnt
    for column in ("grad_norm", "lr", "tokens"):
        tables = [pq.read_table(runs[name] / "losses.parquet")[column] for name in (one, two)]
        assert tables[1].to_pylist() == pytest.approx(tables[0].to_pylist(), rel=1e-3)
    bits = [pq.read_table(runs[name] / "validation.parquet")["bits_per_byte"] for name in (one, two)]
    assert bits[1].to_pylist() == pytest.approx(bits[0].to_pylist(), rel=1e-5)


@pytest.mark.parametrize(("one", "two"), SPREAD)
def test_ranks_zero_stages_and_accumulation_do_not_change_the_model(runs: Runs, one: str, two: str) -> None:
    alone, spread = (load_file(runs[name] / "model.safetensors") for name in (one, two))
    assert alone.keys() == spread.keys()
    assert ("lm_head.weight" in spread) == ("tied" not in two)
    for name, weight in alone.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(spread[name], weight, atol=2e-4, rtol=1e-3)


def test_bf16_gives_nearly_the_same_losses_and_fp32_weights(runs: Runs) -> None:
    exact, rounded = losses(runs["1 rank"]), losses(runs["2 ranks, bf16"])
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert rounded != exact
    weights = load_file(runs["2 ranks, bf16"] / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_the_artifact_is_complete_and_all_else_lies_in_logs_and_scratch(runs: Runs) -> None:
    for run in runs.values():
        assert {path.name for path in run.iterdir()} == PAYLOAD | {"logs", "scratch"}


def first_batch(corpus: dict[str, Path]) -> torch.Tensor:
    """The sequences of the first step, ``(24, 65)``."""
    text = TokenShards(corpus["tokens"], "train").read_all().astype(np.int64)
    total = (len(text) - 1) // 64
    sequences = permute(np.arange(24, dtype=np.uint64), total, seed=0).astype(int)
    return torch.from_numpy(np.stack([text[64 * sequence : 64 * sequence + 65] for sequence in sequences]))


def test_a_training_goes_on_from_an_exported_model(
    runs: Runs, corpus: dict[str, Path], tmp_path: Path
) -> None:
    export(ExportConfig(), {**corpus, "model": runs["1 rank"]}, tmp_path / "model", LocalContext())
    config = recipe().model_copy(update={"tokens": 24 * 64, "init_from": tmp_path / "model"})
    pretrain(config, corpus, tmp_path / "out", LocalContext(launcher=forks.launch))
    rows = first_batch(corpus)
    expected = load_model(runs["1 rank"])(rows[:, :-1], rows[:, 1:]).item()
    assert losses(tmp_path / "out") == pytest.approx([expected], rel=1e-6)


def test_the_first_loss_is_that_of_the_untrained_model_on_the_first_batch(
    runs: Runs, corpus: dict[str, Path]
) -> None:
    """By the parts: sequences from the permutation, text from the shards, weights from the seed."""
    rows = first_batch(corpus)
    model = Transformer(load_model(runs["1 rank"]).config, seed=0)
    assert losses(runs["1 rank"])[0] == pytest.approx(model(rows[:, :-1], rows[:, 1:]).item(), rel=1e-5)


def text_of(corpus: dict[str, Path], source: str) -> np.ndarray:
    """The training tokens of a source, end to end."""
    mine = [
        batch.tokens[start:end]
        for batch in TokenShards(corpus["tokens"], "train")
        for id, start, end in zip(batch.ids, batch.offsets, batch.offsets[1:], strict=False)
        if id.startswith(f"{source}/")
    ]
    return np.concatenate(mine).astype(np.int64)


def test_masked_documents_are_masked_wherever_the_positions_lie(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    """By the parts again, in a training whose two ranks have half of each sequence."""
    # Short documents, and a seed with which some of the sequences hold an end.
    changes = {"tokens": 24 * 64, "mask_documents": True, "mixture": {"email": 1.0}, "seed": 5}
    config = recipe(ranks=2, sequence_parallel=2).model_copy(update=changes)
    pretrain(config, corpus, tmp_path, LocalContext(launcher=forks.launch))
    assert not list(tmp_path.rglob("*.bin")), "tokens are read where they lie"
    text = text_of(corpus, "email")
    order = Mixture.of({"email": 1.0}, 24).order([(len(text) - 1) // 64], seed=5)
    rows = torch.from_numpy(
        np.stack([text[64 * sequence : 64 * sequence + 65] for sequence in order(0, 24).astype(int)])
    )
    end = end_of_text(load_tokenizer(corpus["tokenizer"]))
    documents = torch.nn.functional.pad((rows[:, :-2] == end).int(), (1, 0)).cumsum(1)
    assert documents.max() > 0, "some sequence should hold the end of a document"
    model = Transformer(load_model(tmp_path).config, seed=5)
    masked = model(rows[:, :-1], rows[:, 1:], documents_BT=documents).item()
    assert losses(tmp_path) == pytest.approx([masked], rel=1e-6)
    assert masked != pytest.approx(model(rows[:, :-1], rows[:, 1:]).item(), rel=1e-5)


def test_the_last_validation_is_that_of_the_saved_model(runs: Runs, corpus: dict[str, Path]) -> None:
    text = TokenShards(corpus["tokens"], "val").read_all().astype(np.int64)
    rows = torch.from_numpy(np.stack([text[start : start + 65] for start in range(0, 12_000 // 64 * 64, 64)]))
    with torch.inference_mode():
        nats = load_model(runs["1 rank"])(rows[:, :-1], rows[:, 1:], reduction="none").double().numpy()
    sizes = token_bytes(corpus["tokenizer"])[rows[:, 1:].numpy()]
    last = pq.read_table(runs["1 rank"] / "validation.parquet").to_pylist()[-1]
    assert (sizes == 0).any(), "the text should cross the end of a document"
    assert last["loss"] == pytest.approx(nats.mean(), rel=1e-6)
    assert last["bits_per_byte"] == pytest.approx(nats[sizes > 0].sum() / sizes.sum() / math.log(2), rel=1e-6)


def test_events_tell_every_step_once_with_the_losses_of_the_artifact(runs: Runs) -> None:
    for run in runs.values():
        events = read_events(run / "logs" / "events.jsonl")
        steps = [event for event in events if event["event"] == "step"]
        assert [event["step"] for event in steps] == list(range(1, STEPS + 1))
        assert [event["loss"] for event in steps] == losses(run)
        assert all(event["tokens_per_second"] > 0 and event["mfu"] > 0 for event in steps)
        assert all(1e-6 < event["update_ratio_matrices"] < 1 for event in steps)
        kinds = [event["event"] for event in events]
        assert (kinds[0], kinds[-1], kinds.count("validation")) == ("start", "end", 2)
        assert events[0]["attention"] in get_args(BackEnd)


@pytest.mark.parametrize("name", ["1 rank", "2 ranks, ZeRO 3, tied"])
def test_what_is_measured_moves_no_bit(
    runs: Runs, corpus: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Against a training that measures nothing before its last step."""
    quiet = {"norms_every": 0, "log_every": STEPS, "samples": Samples(every=0)}
    runtime = CONFIGS[name].runtime.model_copy(update=quiet)
    config = CONFIGS[name].model_copy(update={"runtime": runtime})
    pretrain(config, corpus, tmp_path, LocalContext(launcher=forks.launch))
    assert checksums(tmp_path) == checksums(runs[name])
    assert steps_of(tmp_path, "step") == [STEPS]
    assert steps_of(tmp_path, "norms") == steps_of(tmp_path, "samples") == []
    assert steps_of(runs[name], "norms") == [3, 6, 9, 12, 15, 18, 20]
    assert steps_of(runs[name], "samples") == [5, 10, 15, 20]


def steps_of(run: Path, kind: str) -> list[int]:
    return [event["step"] for event in read_events(run / "logs" / "events.jsonl") if event["event"] == kind]


@pytest.mark.parametrize(
    ("name", "whole_tree"),
    [("1 rank", True), pytest.param("2 ranks, ZeRO 3, tied", False, marks=pytest.mark.long)],
    ids=["whole-tree", "orphaned-ranks"],
)
def test_a_killed_training_goes_on_bit_for_bit(
    runs: Runs, corpus: dict[str, Path], tmp_path: Path, name: str, whole_tree: bool
) -> None:
    config = CONFIGS[name]
    stage = Stage(config, corpus, tmp_path)
    stage.wait_for("step", 13)
    stage.kill(whole_tree)
    assert not (tmp_path / "model.safetensors").exists()
    root = tmp_path / "scratch" / "checkpoints"
    newest = checkpoint.complete(root)[0]
    events = tmp_path / "logs" / "events.jsonl"
    if whole_tree:  # and the accident tore the newest checkpoint and the line being written
        largest = max(newest.files, key=lambda file: newest.files[file][0])
        with open(checkpoint.folder_of(root, newest.step) / largest, "r+b") as file:
            file.truncate(newest.files[largest][0] // 2)
        events.write_bytes(events.read_bytes() + b'{"event": "st')
    pretrain(config, corpus, tmp_path, LocalContext(launcher=forks.launch))
    assert checksums(tmp_path) == checksums(runs[name])
    told = read_events(events)
    resumed = [event["step"] for event in told if event["event"] == "resume"]
    assert len(resumed) == 1
    assert 0 < resumed[0] < newest.step if whole_tree else resumed[0] >= newest.step
    assert [event["step"] for event in told if event["event"] == "step"] == list(range(1, STEPS + 1))
    assert [event["loss"] for event in told if event["event"] == "step"] == losses(runs[name])
    assert measured(tmp_path) == measured(runs[name])


def measured(run: Path) -> list[dict[str, Any]]:
    """The events of norms and samples, but for their times."""
    found = read_events(run / "logs" / "events.jsonl")
    return [event | {"time": 0} for event in found if event["event"] in ("norms", "samples")]


@pytest.mark.parametrize("name", [name for name in CONFIGS if "bf16" not in name])
def test_the_last_samples_are_what_the_saved_model_writes(
    runs: Runs, corpus: dict[str, Path], name: str
) -> None:
    """On any ranks, at any ZeRO stage; and those before it are others."""
    found = [one for one in read_events(runs[name] / "logs" / "events.jsonl") if one["event"] == "samples"]
    prompts = CONFIGS[name].runtime.samples.prompts
    model, tokenizer = load_model(runs[name]), load_tokenizer(corpus["tokenizer"])
    texts = generate(model, tokenizer, prompts, max_new_tokens=20, temperature=0.8, seeds=range(3))
    assert [(one["prompt"], one["text"]) for one in found[-1]["samples"]] == [
        *zip(prompts, texts, strict=True)
    ]
    assert found[-1]["tokens"] == STEPS * 24 * 64
    assert len({one["samples"][0]["text"] for one in found}) > 1


def test_a_finished_training_is_not_started_again(
    runs: Runs, corpus: dict[str, Path], tmp_path: Path
) -> None:
    for path in runs["1 rank"].iterdir():
        if path.is_file() and path.name != "report.md":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    pretrain(recipe(), corpus, tmp_path, LocalContext(launcher=must_not_start))
    assert checksums(tmp_path) == checksums(runs["1 rank"])


def must_not_start(*_: object, **__: object) -> None:
    raise AssertionError("ranks were started")


def test_nothing_was_compiled(runs: Runs) -> None:
    """A start that compiles costs minutes, and one killed while it compiles leaves a lock that later ones wait on."""
    assert not (runs["1 rank"].parent / "extensions").exists()


def test_losses_that_stay_not_finite_end_with_one_clear_line(corpus: dict[str, Path], tmp_path: Path) -> None:
    config = recipe().model_copy(update={"lr": 1e30})
    with pytest.raises(
        UserError, match=r"not finite in 6 steps in a row, up to step \d+: .*diverged; lower pretrain"
    ):
        pretrain(config, corpus, tmp_path, LocalContext(launcher=launch.local))
    told = [event for event in read_events(tmp_path / "logs" / "events.jsonl") if event["event"] == "skip"]
    assert [event["step"] - told[0]["step"] for event in told] == list(range(6))


def test_a_checkpoint_holds_value_and_two_moments_of_each_parameter_once(runs: Runs) -> None:
    for name, run in runs.items():
        events = read_events(run / "logs" / "events.jsonl")
        made = [(event["step"], event["bytes"]) for event in events if event["event"] == "checkpoint"]
        assert [step for step, _ in made] == [4, 8, 12, 16], name
        weights = 12 * load_model(run).parameter_count()
        assert [size for _, size in made] == pytest.approx([weights] * 4, rel=0.15), name
