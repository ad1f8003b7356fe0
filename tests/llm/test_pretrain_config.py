"""What can be known before a rank starts: derived values, precision, and mistakes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from data_pipeline.core.errors import UserError
from data_pipeline.stage import LocalContext
from llm.machine import hardware as module
from llm.machine.hardware import hardware_precision
from llm.model.config import ModelConfig
from llm.pretrain.config import PretrainConfig, read_sealed
from llm.pretrain.stage import pretrain
from llm.training import checkpoint
from llm.training.job import Job, as_begun


def config(**fields: Any) -> PretrainConfig:
    model = {"layers": 1, "heads": 2, "width": 16, "context": 32}
    return PretrainConfig.model_validate({"model": model, "tokens": 10_000, "batch_tokens": 1024, **fields})


def must_not_start(*_: object, **__: object) -> None:
    raise AssertionError("ranks were started")


def refused(given: PretrainConfig, corpus: dict[str, Path], out: Path) -> str:
    with pytest.raises(UserError) as failure:
        pretrain(given, corpus, out, LocalContext(launcher=must_not_start))
    return str(failure.value)


def test_derived_values_follow_their_rules() -> None:
    derived = config(schedule={"warmup_share": 0.3}, runtime={"ranks": 4})
    assert (derived.steps, derived.schedule.warmup_of(derived.steps)) == (9, 3)
    assert (derived.plan.smallest, derived.plan.sequences_before(9)) == (32, 9 * 32)
    here = derived.wanted.resolve()
    assert (here.steps, here.micro_batch, here.accumulation(0)) == (9, 8, 1)
    assert config(runtime={"micro_batch": 4}).wanted.resolve().accumulation(8) == 8
    assert config(tokens=1).steps == 1
    sharing = config(runtime={"ranks": 4, "sequence_parallel": 2, "micro_batch": 4})
    assert (sharing.runtime.data_parallel_size, sharing.wanted.resolve().accumulation(0)) == (2, 4)


def test_the_automatic_micro_batch_is_the_largest_divisor_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Of 200 sequences, at most 4096 / 32 = 128; and 131 is prime.
    for sequences, micro_batch in ((200, 100), (131, 1)):
        assert config(batch_tokens=32 * sequences).wanted.resolve().micro_batch == micro_batch


def test_how_it_is_executed_is_no_part_of_the_identity() -> None:
    other = config(
        runtime={
            "ranks": 2,
            "zero_stage": 2,
            "micro_batch": 1,
            "checkpoint_every": 7,
            "log_every": 9,
            "norms_every": 0,
            "samples": {"every": 0, "prompts": ["x"], "tokens": 3, "temperature": 0},
            "validate_on": {"tasks": [{"name": "x", "path": "x.jsonl", "kind": "pairs"}]},
            "attention": "formula",
            "compile": True,
            "validation": {"every": 3, "tokens": 96},
            "max_nonfinite": 9,
            "max_rollbacks": 9,
        }
    )
    assert other.identity() == config().identity()
    assert config(seed=1).identity() != config().identity()


@pytest.mark.parametrize(
    ("common", "idle"),
    [
        ({}, {"schedule": {"decay_share": 0.5, "decay_shape": "linear"}}),
        ({"schedule": {"warmup_steps": 2}}, {"schedule": {"warmup_steps": 2, "warmup_share": 0.5}}),
        ({"optimizer": {"kind": "adamw"}}, {"optimizer": {"kind": "adamw", "muon_lr": 1, "momentum": 0.5}}),
        ({}, {"recovery": {"rollback_every": 7, "spike_window": 9}}),
    ],
)
def test_what_does_not_count_beside_other_settings_is_no_part_of_the_identity(
    common: dict[str, Any], idle: dict[str, Any]
) -> None:
    assert config(**idle).identity() == config(**common).identity()
    counts = {"schedule": {"kind": "wsd"}, "recovery": {"spike_z": 9.0}, "optimizer": {"kind": "muon"}}
    [(part, settings)] = idle.items()
    if part != "schedule" or "warmup_share" not in settings:
        changed, other = ({part: {**fields, **counts[part]}} for fields in (settings, {}))
        assert config(**changed).identity() != config(**other).identity()


@pytest.mark.parametrize(
    ("steps", "settings", "wanted"),
    [
        (100, {"validation": {"every": 50}}, 50),
        (1000, {"validation": {"every": 50}}, 50),
        (1001, {"validation": {"every": 50}}, 100),
        (100_000, {"validation": {"every": 250}}, 5000),
        (10, {"validation": {"every": 250}}, 250),
        (1000, {"samples": {"every": 7}}, 7),
        (1000, {"samples": {"every": 0}}, 0),
    ],
)
def test_samples_come_with_validations_and_about_twenty_times_at_most(
    steps: int, settings: dict[str, Any], wanted: int
) -> None:
    few = config(runtime=settings)
    assert few.model_copy(update={"tokens": steps * few.batch_tokens}).samples_every == wanted


def test_half_of_a_surrogate_pair_is_no_prompt() -> None:
    with pytest.raises(ValidationError, match="half of a surrogate pair"):
        config(runtime={"samples": {"prompts": ["\ud800"]}})


def test_a_sealed_training_of_before_is_read_with_what_moved_since() -> None:
    now = config(runtime={"validation": {"every": 7, "tokens": 99}, "max_nonfinite": 1, "max_rollbacks": 8})
    runtime = {**now.runtime.model_dump(mode="json")}
    assert read_sealed(now.identity(), runtime) == now.model_copy(update={"depth": None})
    for name in ("validation", "max_nonfinite", "max_rollbacks"):
        del runtime[name]
    recovery = {**now.identity()["recovery"], "max_nonfinite": 1, "max_rollbacks": 8}
    before = {**now.identity(), "validation": {"every": 7, "tokens": 99}, "recovery": recovery}
    assert read_sealed({**before, "init_sha256": "0"}, runtime) == now


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_tokens": 1000}, "batch_tokens 1000 is not a multiple of model.context 32"),
        ({"runtime": {"ranks": 5}}, "32 sequences does not divide among 5 ranks"),
        ({"runtime": {"micro_batch": 5}}, "micro_batch 5 does not divide a rank's 32 sequences"),
        ({"runtime": {"ranks": 2, "sequence_parallel": 3}}, "sequence_parallel 3 does not divide ranks 2"),
        (
            {"runtime": {"ranks": 4, "sequence_parallel": 4}},
            r"sequence_parallel 4 does not divide model\.heads 2",
        ),
        ({"runtime": {"ranks": 2, "tensor_parallel": 2}}, "tensor_parallel needs zero_stage 1 or 2, not 0"),
        (
            {"runtime": {"ranks": 4, "tensor_parallel": 4, "zero_stage": 1}},
            r"tensor_parallel 4 does not divide model\.heads 2",
        ),
        (
            {"runtime": {"ranks": 4, "tensor_parallel": 2, "sequence_parallel": 2, "zero_stage": 1}},
            "goes with neither sequence_parallel nor offload",
        ),
        (
            {"runtime": {"ranks": 2, "tensor_parallel": 2, "zero_stage": 1}, "optimizer": {"kind": "muon"}},
            "Muon needs whole matrices",
        ),
        ({"runtime": {"offload": "cpu"}}, "zero_stage is 0: set zero_stage to 1, 2 or 3"),
        (
            {"runtime": {"compile": True, "zero_stage": 3}},
            "set zero_stage to 0, 1 or 2, and tensor_parallel to 1",
        ),
        ({"runtime": {"zero_stage": 4}}, "less than or equal to 3"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\)"),
        ({"precision": "fp16"}, "'auto', 'fp32' or 'bf16'"),
        ({"learning_rate": 1e-3}, "Extra inputs are not permitted"),
    ],
)
def test_a_config_that_cannot_work_says_what_to_change(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**fields)


def test_what_cannot_run_here_is_refused_when_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"runtime\.attention is flash3, but it needs a GPU"):
        config(runtime={"attention": "flash3"}).resolve()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError, match="there is no compiler no-such-compiler:\ninstall it, or set it to false"
    ):
        config(runtime={"compile": True}).resolve()
    here = config().resolve().wanted.resolve()
    assert (here.attention, here.attention_reason) == ("sdpa", "torch's choice of kernels")


@pytest.mark.parametrize(
    ("flags", "precision", "reason"),
    [
        ("fpu avx2 avx512f avx512_bf16", "bf16", "avx512_bf16"),
        ("fpu amx_tile amx_bf16 avx512_bf16", "bf16", "amx_bf16"),
        ("fpu avx2 avx512f", "fp32", "neither"),
    ],
)
def test_auto_is_bf16_only_where_the_processor_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, precision: str, reason: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\n")
    found = module.cpu_flags(cpuinfo)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "cpu_flags", lambda: found)
    assert hardware_precision()[0] == precision
    assert reason in hardware_precision()[1]
    assert config().resolve().precision == precision
    assert config(precision="fp32").resolve().precision == "fp32"


def test_a_machine_that_lists_no_flags_computes_in_fp32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert module.cpu_flags(tmp_path / "none") == frozenset()


def test_more_ranks_than_the_machine_has_places_are_refused_when_planned() -> None:
    config().resolve()
    many = config(batch_tokens=32 * 4096, precision="fp32", runtime={"ranks": 4096})
    with pytest.raises(UserError) as refusal:
        many.resolve()
    message = str(refusal.value)
    assert "pretrain.runtime.ranks is 4096, but this machine has" in message
    assert "set pretrain.runtime.ranks to at most" in message


def test_a_corpus_smaller_than_one_batch_is_refused(corpus: dict[str, Path], tmp_path: Path) -> None:
    message = refused(config(batch_tokens=32 * 100_000), corpus, tmp_path)
    assert "one batch needs 3,200,000:\nlower pretrain.batch_tokens" in message


def test_a_held_out_split_smaller_than_a_window_is_refused(corpus: dict[str, Path], tmp_path: Path) -> None:
    from data_pipeline.tokenize.shards import TokenShards

    held_out = TokenShards(corpus["tokens"], "val").tokens
    train = TokenShards(corpus["tokens"], "train").tokens
    assert held_out < train - 1
    model = {"layers": 1, "heads": 2, "width": 16, "context": held_out}
    message = refused(config(model=model, batch_tokens=held_out), corpus, tmp_path)
    assert f"the held-out split has {held_out:,} tokens, less than one sequence" in message


def job(given: PretrainConfig, corpus: dict[str, Path], out: Path, **setup: Any) -> Job:
    """What ``given`` is to do in ``out``, where a checkpoint of another setup may lie."""
    model = ModelConfig(**given.model.model_dump(), vocab_size=500)
    made = Job(config=given, model=model, tokens=corpus["tokens"], tokenizer=corpus["tokenizer"], out=out)
    if setup:
        folder = checkpoint.begin(made.checkpoints, 4)
        checkpoint.commit(folder, step=4, setup=replace(made.resolve().setup, **setup), history={})
    return made


def test_a_checkpoint_of_another_precision_is_refused_before_anything_starts(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    given = config(precision="fp32")
    job(given, corpus, tmp_path, precision="bf16")
    assert "step 4 was made in bf16, but pretrain would resume in fp32" in refused(given, corpus, tmp_path)


def test_an_automatic_micro_batch_is_that_of_the_checkpoint_and_a_given_one_stays(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    automatic = job(config(precision="fp32"), corpus, tmp_path, micro_batch=2)
    assert micro_batch(automatic.resolve()) != 2
    assert micro_batch(as_begun(automatic)) == 2
    given = job(config(precision="fp32", runtime={"micro_batch": 4}), corpus, tmp_path)
    assert as_begun(given) == given.resolve()


def micro_batch(job: Job) -> int:
    """What its ranks work on at once."""
    assert job.resolved
    return job.resolved.micro_batch


def test_an_automatic_micro_batch_is_not_that_of_other_ranks(corpus: dict[str, Path], tmp_path: Path) -> None:
    automatic = job(config(precision="fp32"), corpus, tmp_path, ranks=2, micro_batch=2)
    assert as_begun(automatic) == automatic.resolve()


def test_a_training_without_checkpoints_is_begun_as_the_recipe_says(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    given = job(config(), corpus, tmp_path)
    assert as_begun(given) == given.resolve()


def test_what_ranks_compute_with_is_left_to_them_where_they_start_elsewhere(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    elsewhere = job(config(precision="fp32", runtime={"launcher": "slurm"}), corpus, tmp_path)
    assert as_begun(elsewhere).resolved is None
    elsewhere.scratch.mkdir()
    written = Job.model_validate_json(elsewhere.resolve().write().read_text())
    assert written == elsewhere.resolve(), "it comes back from the file that the ranks read"
