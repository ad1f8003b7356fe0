"""Every tensor moves by its rule and no other: weights after steps on real ranks, against float64 arithmetic."""

from __future__ import annotations

import math
from typing import Any

import forks
import pytest
import torch
from engine_steps import SEQUENCES, VOCAB_SIZE, Experiment, Outcome, batch, run
from pydantic import ValidationError
from torch import Tensor

from llm.model.config import ModelConfig
from llm.model.transformer import Transformer
from llm.pretrain.config import PretrainConfig
from llm.training.muon import POLAR_EXPRESS, SAFETY, orthogonalise, orthogonalise_all
from llm.training.norms import layer_of
from llm.training.optimizer import Optimizer, grouped, parameter_groups

STEPS = 3
MUON = {"kind": "muon", "muon_lr": 2e-3, "embedding_lr": 5e-3, "head_lr": 1e-3, "momentum": 0.9}


def config(
    optimizer: dict[str, Any], *, tied: bool = False, heads: tuple[int, int] = (3, 1), **runtime: Any
) -> dict[str, Any]:
    """A training whose gradient is clipped, whose matrices have five shapes, and no shape in a number that two ranks
    divide evenly, so that pieces of matrices lie across ranks."""
    shape = {"heads": heads[0], "kv_heads": heads[1], "width": 6 * heads[0], "hidden": 26}
    model = {**shape, "layers": 1, "context": 8, "qk_norm": True}
    fields = {
        "model": {**model, "tie_embeddings": tied, "init_std": 0.1},
        "tokens": 8 * 8 * 20,
        "batch_tokens": 8 * 8,
        "lr": 3e-3,
        "grad_clip": 0.2,
        "weight_decay": 0.5,
        "precision": "fp32",
        "schedule": {"warmup_steps": 2},
        "optimizer": optimizer,
    }
    return {**fields, "runtime": {"micro_batch": 2, **runtime}}


SPREAD = {f"2 ranks, ZeRO {stage}": {"ranks": 2, "zero_stage": stage} for stage in range(4)}
EXPERIMENTS = {
    "1 rank": Experiment(config(MUON), STEPS, reload_after=2),
    **{name: Experiment(config(MUON, **runtime), STEPS, 2) for name, runtime in SPREAD.items()},
    "2 ranks, ZeRO 3, tied": Experiment(config(MUON, tied=True, **SPREAD["2 ranks, ZeRO 3"]), STEPS, 2),
    "2 ranks, ZeRO 1, cautious": Experiment(
        config({**MUON, "cautious_decay": True}, **SPREAD["2 ranks, ZeRO 1"]), STEPS
    ),
    **{
        f"2 ranks, ZeRO {stage}, offloaded": Experiment(
            config(MUON, ranks=2, zero_stage=stage, offload="cpu"), STEPS, reload_after=2
        )
        for stage in (1, 2, 3)
    },
    **{
        f"2 ranks, ZeRO {stage}, sharing windows": Experiment(
            config(MUON, heads=(4, 2), ranks=2, zero_stage=stage, sequence_parallel=2), STEPS
        )
        for stage in (0, 3)
    },
    "1 rank, AdamW": Experiment(config({"kind": "adamw"}), STEPS, reload_after=2),
    "2 ranks, ZeRO 2, AdamW": Experiment(config({"kind": "adamw"}, **SPREAD["2 ranks, ZeRO 2"]), STEPS, 2),
    "2 ranks, ZeRO 1, bf16": Experiment(
        {**config(MUON, **SPREAD["2 ranks, ZeRO 1"]), "precision": "bf16"}, STEPS
    ),
    # Last of all: DeepSpeed keeps its groups of ranks that split layers for the rest of a process.
    **{
        f"2 ranks, ZeRO {stage}, splitting layers": Experiment(
            config({"kind": "adamw"}, heads=(4, 2), ranks=2, zero_stage=stage, tensor_parallel=2),
            STEPS,
            reload_after=2,
        )
        for stage in (1, 2)
    },
}
EXACT = [name for name in EXPERIMENTS if "bf16" not in name]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    root = tmp_path_factory.mktemp("optim")
    done: dict[str, Outcome] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(root / "extensions"))
        for count in (1, 2):
            names = [name for name, each in EXPERIMENTS.items() if each.pretrain.runtime.ranks == count]
            found = run([EXPERIMENTS[name] for name in names], root / f"{count}", forks.launch)
            done |= zip(names, found, strict=True)
    assert not (root / "extensions").exists(), "something was compiled"
    return done


def polar(direction: Tensor) -> Tensor:
    """What Muon makes of a matrix, by its singular values."""
    left, values, right = torch.linalg.svd(direction, full_matrices=False)
    values = values / (values.norm() * SAFETY)
    for a, b, c in POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


def kind_of(name: str) -> str:
    if name in ("embed_tokens.weight", "lm_head.weight"):
        return {"embed_tokens.weight": "embeddings", "lm_head.weight": "head"}[name]
    return "vectors" if "norm" in name else "matrices"


def expected(experiment: Experiment) -> dict[str, Tensor]:
    """The weights after the steps, in float64, by the rules as they are written in papers."""
    given = experiment.pretrain
    model = Transformer(experiment.shape, seed=given.seed).double()
    optimizer = given.optimizer
    peaks = {
        "matrices": optimizer.muon_lr if optimizer.kind == "muon" else None,
        "embeddings": optimizer.embedding_lr,
        "head": optimizer.head_lr,
    }
    states: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(experiment.steps):
        model.zero_grad()
        model(*batch(step, given.plan.sequences_at(step), experiment.shape)).backward()
        norm = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm()
        for name, weight in model.named_parameters():
            gradient = weight.grad * min(1.0, given.grad_clip / norm.item())
            kind = kind_of(name)
            lr = (peaks.get(kind) or given.lr) * given.schedule.lr_multiplier(step, given.steps)
            decay = given.weight_decay * (kind in ("matrices", "head"))
            first, second = states.get(name, (torch.zeros_like(weight), torch.zeros_like(weight)))
            if kind == "matrices" and optimizer.kind == "muon":
                beta = optimizer.momentum
                first = beta * first + (1 - beta) * gradient
                update = polar(beta * first + (1 - beta) * gradient) * 0.2 * math.sqrt(max(weight.shape))
                mask = (update.sign() == weight.sign()) if optimizer.cautious_decay else 1.0
            else:
                beta, beta2 = given.betas
                first = beta * first + (1 - beta) * gradient
                second = beta2 * second + (1 - beta2) * gradient**2
                corrected = (second / (1 - beta2 ** (step + 1))).sqrt()
                update = first / (1 - beta ** (step + 1)) / (corrected + given.eps)
                mask = 1.0
            states[name] = first, second
            weight.data = weight.data * (1 - lr * decay * mask) - lr * update
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", EXACT)
def test_every_tensor_moves_by_its_rule_and_no_other(outcomes: dict[str, Outcome], name: str) -> None:
    """Through a checkpoint in between, where there is one: so the state is saved and loaded too."""
    experiment = EXPERIMENTS[name]
    initial = dict(Transformer(experiment.shape, seed=experiment.pretrain.seed).named_parameters())
    should, weights = expected(experiment), outcomes[name].weights
    assert weights.keys() == should.keys()
    for tensor, weight in weights.items():
        moved = (should[tensor] - initial[tensor]).abs().max().item()
        assert moved > 0
        difference = (weight.double() - should[tensor]).abs().max().item()
        assert difference < 2e-3 * moved, f"{tensor}: off by {difference:.1e} of {moved:.1e}"


@pytest.mark.parametrize("name", EXACT)
def test_losses_and_norms_are_those_of_the_weights(outcomes: dict[str, Outcome], name: str) -> None:
    """In the first step, of the initial ones; for each target after training, of the last."""
    experiment, outcome = EXPERIMENTS[name], outcomes[name]
    model = Transformer(experiment.shape, seed=experiment.pretrain.seed)
    first = model(*batch(0, experiment.pretrain.plan.sequences_at(0), experiment.shape))
    first.backward()
    norm = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm().item()
    fact = outcome.facts[0]
    assert (fact["loss"], fact["norm"]) == pytest.approx((first.item(), norm), rel=1e-5)
    model.load_state_dict(outcome.weights, strict=not experiment.shape.tie_embeddings)
    nats_BT = model.eval()(*batch(experiment.steps, 2, experiment.shape), reduction="none")
    torch.testing.assert_close(outcome.nats_BT, nats_BT, atol=1e-4, rtol=1e-4)
    logits = [
        model(torch.tensor([tokens[-experiment.shape.context :]]))[0, -1] for tokens in SEQUENCES.values()
    ]
    torch.testing.assert_close(outcome.logits_BV, torch.stack(logits), atol=1e-4, rtol=1e-4)


def test_the_rules_differ_by_far_more_than_the_tolerance(outcomes: dict[str, Outcome]) -> None:
    """Else the test above could not tell Muon from what a broken one becomes: AdamW, or descent along the momentum."""
    muon, adamw = outcomes["1 rank"].weights, outcomes["1 rank, AdamW"].weights
    name = "layers.0.mlp.up_proj.weight"
    initial = dict(Transformer(EXPERIMENTS["1 rank"].shape, seed=0).named_parameters())[name]
    steps = [(weights[name] - initial).flatten() for weights in (muon, adamw)]
    assert torch.cosine_similarity(*steps, dim=0) < 0.95


def test_muon_in_bf16_takes_nearly_the_same_steps(outcomes: dict[str, Outcome]) -> None:
    exact, rounded = outcomes["2 ranks, ZeRO 1"], outcomes["2 ranks, ZeRO 1, bf16"]
    for ours, theirs in zip(rounded.facts, exact.facts, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
    name = "layers.0.mlp.up_proj.weight"
    initial = dict(Transformer(EXPERIMENTS["1 rank"].shape, seed=0).named_parameters())[name]
    steps = [(outcome.weights[name] - initial).flatten() for outcome in (exact, rounded)]
    assert torch.cosine_similarity(*steps, dim=0) > 0.95


@pytest.mark.parametrize("name", EXACT)
def test_rates_and_update_to_weight_ratios_are_told_by_kind(outcomes: dict[str, Outcome], name: str) -> None:
    """After one step all follows from the first weights: AdamW's first update is the sign, Muon's near orthogonal."""
    experiment = EXPERIMENTS[name]
    first = outcomes[name].facts[0]
    initial = dict(Transformer(experiment.shape, seed=0).named_parameters())
    kinds = {kind_of(tensor) for tensor in initial}
    assert {key for key in first if key.startswith("lr_")} == {f"lr_{kind}" for kind in kinds}
    given = experiment.pretrain
    assert first["lr_vectors"] == pytest.approx(given.lr * given.schedule.lr_multiplier(0, given.steps))
    if given.optimizer.kind == "muon":
        assert first["lr_matrices"] == pytest.approx(MUON["muon_lr"] / 2)
        assert first["lr_embeddings"] == pytest.approx(MUON["embedding_lr"] / 2)
    after = expected(Experiment(experiment.config, steps=1))
    for kind in kinds:
        names = [tensor for tensor in initial if kind_of(tensor) == kind]
        moved = sum((after[tensor] - initial[tensor]).square().sum().item() for tensor in names)
        size = sum(after[tensor].square().sum().item() for tensor in names)
        assert first[f"update_ratio_{kind}"] == pytest.approx(math.sqrt(moved / size), rel=1e-3)


LAYERS = {"embed_tokens": "embedding", "layers": "block_00", "norm": "final_norm", "lm_head": "head"}
"""First part of a parameter's name -> the layer."""


@pytest.mark.parametrize("name", EXACT)
def test_norms_are_told_by_layer_before_clipping(outcomes: dict[str, Outcome], name: str) -> None:
    """By brute force, from the first weights, whole on one rank: also where ranks have slices that cross layers."""
    experiment = EXPERIMENTS[name]
    first = outcomes[name].facts[0]
    initial = Transformer(experiment.shape, seed=0).double()
    initial(*batch(0, experiment.pretrain.plan.sequences_at(0), experiment.shape)).backward()
    assert first["norm"] > experiment.pretrain.grad_clip
    after = expected(Experiment(experiment.config, steps=1))
    names: dict[str, list[str]] = {}
    for tensor in after:
        names.setdefault(LAYERS[tensor.split(".")[0]], []).append(tensor)
    weights = dict(initial.named_parameters())
    assert {key for key in first if "/" in key} == {
        f"{norm}/{layer}" for norm in ("grad", "update", "update_ratio") for layer in names
    }
    for layer, tensors in names.items():
        grad, update, weight = (
            torch.cat([one.detach().flatten() for one in some]).norm().item()
            for some in (
                [weights[tensor].grad for tensor in tensors],
                [after[tensor] - weights[tensor] for tensor in tensors],
                [after[tensor] for tensor in tensors],
            )
        )
        told = [first[f"{norm}/{layer}"] for norm in ("grad", "update", "update_ratio")]
        assert told == pytest.approx([grad, update, update / weight], rel=1e-3), layer
    assert math.hypot(*(first[f"grad/{layer}"] for layer in names)) == pytest.approx(first["norm"], rel=1e-5)


def test_layers_have_names_that_sort() -> None:
    shape = ModelConfig(layers=11, heads=1, width=8, context=4, positions="learned", vocab_size=VOCAB_SIZE)
    names = [layer_of(name) for name, _ in Transformer(shape).named_parameters()]
    blocks = [f"block_{number:02d}" for number in range(11)]
    assert list(dict.fromkeys(names)) == ["embedding", *blocks, "final_norm", "head"]
    assert sorted(blocks) == blocks


def test_muons_steps_have_the_size_of_adamws_whatever_the_shape() -> None:
    for shape in [(64, 64), (48, 192), (192, 48)]:
        factor = orthogonalise_all([torch.randn(shape)], torch.float32)[0] * 0.2 * math.sqrt(max(shape))
        assert factor.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.12)


def test_orthogonalising_keeps_directions_and_brings_singular_values_to_one() -> None:
    left = torch.linalg.qr(torch.randn(2, 24, 24, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(2, 40, 24, dtype=torch.float64))[0]
    values = torch.logspace(-2.6, 0, 24, dtype=torch.float64)
    found = torch.linalg.svdvals(orthogonalise(left @ torch.diag(values / values.norm()) @ right.mT))
    assert (found - 1).abs().max() < 0.17
    assert orthogonalise(torch.zeros(1, 3, 5)).eq(0).all()
    lively = torch.randn(3, 24, 40, dtype=torch.float64)
    kept = torch.linalg.svdvals(orthogonalise(lively))
    assert kept.min() > 0.83
    assert kept.max() < 1.17
    torch.testing.assert_close(orthogonalise(lively)[1], polar(lively[1]), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_each_parameter_is_in_one_group_of_its_kind_and_only_matrices_decay(tied: bool, rule: str) -> None:
    given = PretrainConfig.model_validate(config({"kind": rule}, tied=tied))
    model = Transformer(ModelConfig(**given.model.model_dump(), vocab_size=VOCAB_SIZE))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, given.optimizer_settings)
    assert sorted(id(each) for group in groups for each in group["params"]) == sorted(names)
    for group in groups:
        assert {kind_of(names[id(each)]) for each in group["params"]} == {group["kind"]}
        assert group["weight_decay"] == (0.5 if group["kind"] in ("matrices", "head") else 0.0)
        assert group["rule"] == (rule if group["kind"] == "matrices" else "adamw")
    assert ("head" in {group["kind"] for group in groups}) != tied


def test_large_groups_are_parted_so_that_little_is_gathered_at_once() -> None:
    sizes = [3, 4, 9, 1, 1]
    made = list(grouped([torch.nn.Parameter(torch.zeros(size)) for size in sizes], 7))
    assert [[each.numel() for each in part] for part in made] == [[3, 4], [9], [1, 1]]


def test_muon_refuses_what_is_no_matrix() -> None:
    """A flat piece of a matrix that nobody has told it how to put together must not become plain descent."""
    given = PretrainConfig.model_validate(config(MUON))
    flat = torch.nn.Parameter(torch.ones(6))
    flat.grad = torch.ones(6)
    group = {"params": [flat], "kind": "matrices", "rule": "muon", "lr": 1.0, "momentum": 0.9}
    optimizer = Optimizer([{**group, "weight_decay": 0.0}], given.optimizer_settings)
    with pytest.raises(AssertionError, match="no matrix"):
        optimizer.step()


@pytest.mark.parametrize("fields", [{"kind": "lion"}, {"momentum": 1.0}, {"muon_lr": 0.0}])
def test_an_optimizer_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="optimizer"):
        PretrainConfig.model_validate(config(fields))
