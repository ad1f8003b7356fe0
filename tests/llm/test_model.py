from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llm.model.config import ModelConfig, ModelShape
from llm.model.layouts import exported_weights, transformers_config
from llm.model.transformer import Transformer

Make = Callable[..., ModelConfig]


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@pytest.mark.parametrize("kv_heads", [None, 2, 1], ids=["every-head", "grouped", "one"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_are_those_of_transformers(
    tiny: Make, qk_norm: bool, kv_heads: int | None, tied: bool
) -> None:
    config = tiny(qk_norm=qk_norm, kv_heads=kv_heads, tie_embeddings=tied, init_std=0.2, rope_theta=500.0)
    model = Transformer(config, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that is left out
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    fields = transformers_config(config, end=0, dtype="float32")
    theirs = Qwen3ForCausalLM(Qwen3Config(**fields)) if qk_norm else LlamaForCausalLM(LlamaConfig(**fields))
    missing = theirs.load_state_dict(exported_weights(model, torch.float32), strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == (["lm_head.weight"] if tied else [])
    theirs.tie_weights()
    tokens = torch.randint(config.vocab_size, (3, config.context))
    ours = model(tokens)[..., : config.vocab_size]
    torch.testing.assert_close(ours, theirs.eval()(tokens).logits, atol=1e-4, rtol=1e-5)


def test_a_logit_never_depends_on_later_tokens(tiny: Make) -> None:
    model = Transformer(tiny(init_std=0.2, kv_heads=2))
    tokens = torch.randint(500, (1, 24))
    changed = tokens.clone()
    changed[0, 15:] = (changed[0, 15:] + 1) % 500
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :15], after[:, :15], atol=0, rtol=0)
    assert (before[:, 15:, :500] - after[:, 15:, :500]).abs().max() > 1e-2


def test_a_document_is_read_as_if_it_stood_alone(tiny: Make) -> None:
    """Rotary positions are relative, so where it stands in the window does not show either."""
    model = Transformer(tiny(init_std=0.2, kv_heads=2))
    tokens = torch.randint(500, (2, 24))
    documents = torch.tensor([[0] * 5 + [1] * 19, [3] * 24], dtype=torch.int32)
    packed = model(tokens, documents_BT=documents)
    alone = model(tokens[:1, 5:])
    torch.testing.assert_close(packed[:1, 5:], alone, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(packed[1], model(tokens)[1], atol=1e-4, rtol=1e-5)
    assert (packed[0, 5:, :500] - model(tokens)[0, 5:, :500]).abs().max() > 1e-2


def test_the_loss_is_cross_entropy_over_the_real_vocabulary(tiny: Make) -> None:
    config = tiny(init_std=0.2)
    assert config.padded_vocab == 512
    model = Transformer(config)
    tokens, targets = torch.randint(500, (2, 2, 24))
    logits = model(tokens)
    assert torch.isinf(logits[..., 500:]).all()
    log_probability = logits[..., :500].double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(model(tokens, targets).double(), -log_probability.mean(), atol=1e-6, rtol=1e-6)
    each = model(tokens, targets, reduction="none")
    torch.testing.assert_close(each.double(), -log_probability, atol=1e-5, rtol=1e-5)


def test_rows_that_pad_the_vocabulary_get_no_gradient(tiny: Make) -> None:
    model = Transformer(tiny())
    tokens, targets = torch.randint(500, (2, 2, 24))
    model(tokens, targets).backward()
    gradient = model.lm_head.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert not gradient[500:].any()
    assert gradient[:500].any(dim=1).all()


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_activation_checkpointing_changes_memory_and_nothing_else(tiny: Make, positions: str) -> None:
    config = tiny(init_std=0.2, positions=positions, layers=4)
    tokens, targets = torch.randint(500, (2, 2, 24))
    documents = torch.tensor([[0] * 9 + [1] * 15] * 2, dtype=torch.int32)
    kept, gradients = [], []
    for checkpointing in (False, True):
        model = Transformer(config, checkpointing=checkpointing)
        size = 0

        def weigh(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor):
            loss = model(tokens, targets, documents_BT=documents)
        kept.append(size)
        loss.backward()
        gradients.append([loss, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    assert kept[1] < kept[0] / 4


def test_initial_weights_follow_from_the_seed_and_start_near_uniform(tiny: Make) -> None:
    one, same, other = (Transformer(tiny(), seed=seed) for seed in (3, 3, 4))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    tokens, targets = torch.randint(500, (2, 8, 24))
    assert one(tokens, targets).item() == pytest.approx(torch.tensor(500.0).log().item(), abs=0.1)
    std = one.get_parameter("layers.0.mlp.down_proj.weight").std().item()
    assert std == pytest.approx(0.02 / 2, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 100, "heads": 3}, "width 100 does not divide into 3 heads"),
        ({"width": 64, "heads": 4, "kv_heads": 3}, "kv_heads 3 does not divide heads 4"),
        ({"width": 12, "heads": 4}, "rotary positions need an even number"),
        ({"positions": "learned", "qk_norm": True}, "have no qk_norm, grouped kv_heads or head_dim"),
        (
            {"positions": "learned", "heads": 4, "kv_heads": 2},
            "have no qk_norm, grouped kv_heads or head_dim",
        ),
    ],
)
def test_a_shape_that_cannot_be_built_says_what_to_change(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelShape.model_validate(fields)


def test_counts_are_those_of_the_matrices(tiny: Make) -> None:
    config = tiny(kv_heads=2, hidden=48)
    model = Transformer(config)
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    assert model.parameter_count() == 2 * layer + 2 * 500 * 32 + 32
    assert config.flops_per_token() == 6 * (2 * (layer - 64) + 512 * 32) + 6 * 2 * 32 * 24


def test_gpt2_starts_with_no_bias_and_is_counted_with_all_of_them(tiny: Make) -> None:
    config = tiny(positions="learned", tie_embeddings=True)
    model = Transformer(config)
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 2 * 8 + 1
    assert not any(bias.any() for bias in biases)
    matrices = 4 * 32 * 32 + 2 * 32 * 128
    layer = matrices + 4 * 32 + 128 + 32 + 4 * 32
    assert model.parameter_count() == 2 * layer + 500 * 32 + 24 * 32 + 2 * 32
    assert config.flops_per_token() == 6 * (2 * matrices + 512 * 32) + 6 * 2 * 32 * 24
