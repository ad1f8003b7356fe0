"""Models that `transformers` itself makes, with random weights, read by us."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from data_pipeline.core.errors import UserError
from data_pipeline.stage import LocalContext
from data_pipeline.train_tokenizer.stage import TokenizerConfig
from data_pipeline.train_tokenizer.tokenizer import behaviour_sha256, special_tokens
from flows.engine.plan import make_plan
from flows.engine.store import Store
from flows.recipe import load_recipe
from llm.export.config import ExportConfig
from llm.export.stage import export
from llm.model.config import ModelConfig
from llm.model.layouts import content_sha256, load_folder, read_config, require_start
from llm.pretrain.config import PretrainConfig

Make = Callable[..., ModelConfig]
Save = Callable[..., Path]

COMMON = {"vocab_size": 90, "initializer_range": 0.2}
LLAMA = {
    **COMMON, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
ROPE = {"rope_type": "default", "rope_theta": 500.0}


def make(kind: str, **fields: Any) -> PreTrainedModel:
    """A small model of theirs in which no weight is 0 or 1."""
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**LLAMA, **fields})),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**{**LLAMA, **fields})),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**{**GPT2, **fields})),
    }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases
                parameter.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {"rope_parameters": ROPE, "rms_norm_eps": 1e-3}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("qwen3", {"head_dim": 12, "rope_parameters": ROPE}),
        ("qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
        ("gpt2", {"n_inner": 48, "layer_norm_epsilon": 1e-3}),
        ("gpt2", {"tie_word_embeddings": False}),
    ],
)
def test_a_checkpoint_of_theirs_gives_their_logits(
    tmp_path: Path, kind: str, fields: dict[str, Any], sharded: bool
) -> None:
    theirs = make(kind, **fields)
    theirs.save_pretrained(tmp_path, max_shard_size="10KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    ours = load_folder(tmp_path)
    assert ours.parameter_count() == theirs.num_parameters()
    tokens = torch.randint(90, (2, 32))
    with torch.inference_mode():
        logits = ours(tokens)[..., :90]
        torch.testing.assert_close(logits, theirs(tokens).logits, atol=1e-4, rtol=1e-5)
    assert logits.std() > 0.5


def test_names_and_buffers_of_old_checkpoints_are_understood(tmp_path: Path) -> None:
    """The first GPT-2 files have no prefix, hold the causal mask, and their config lacks most fields."""
    theirs = make("gpt2")
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **GPT2}))
    tokens = torch.randint(90, (2, 32))
    with torch.inference_mode():
        torch.testing.assert_close(
            load_folder(tmp_path)(tokens)[..., :90], theirs(tokens).logits, atol=1e-4, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}, "rope_parameters"),
        ("llama", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "rope_parameters"),
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"mlp_bias": True, "hidden_act": "gelu"}, "hidden_act = gelu, mlp_bias = True"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window = True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function = relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_what_our_model_does_not_compute_is_refused(
    tmp_path: Path, kind: str, fields: dict[str, Any], message: str
) -> None:
    kinds = {"llama": (LlamaConfig, LLAMA), "qwen3": (Qwen3Config, LLAMA), "gpt2": (GPT2Config, GPT2)}
    config, base = kinds[kind]
    config(**{**base, **fields}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"asks for what our model does not compute: .*{message}"):
        read_config(tmp_path)


def test_a_folder_that_does_not_hold_its_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model: it has no config\.json"):
        load_folder(tmp_path)
    make("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for change, message in (
        ({"model.norm.weight": None}, "lacks weights: norm.weight"),
        ({"model.norm.weight": torch.ones(31)}, r"norm\.weight has shape \[31\], not the config's \[32\]"),
        (
            {"model.norm.bias": torch.ones(32)},
            r"a weight that its config\.json does not describe: norm\.bias",
        ),
    ):
        save_file(
            {name: w for name, w in {**weights, **change}.items() if w is not None}, file, {"format": "pt"}
        )
        with pytest.raises(UserError, match=message):
            load_folder(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"lacks model\.safetensors: weights are read from safetensors"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UserError, match="of type 'mamba'; we have llama, qwen3, gpt2"):
        load_folder(tmp_path)


def start(folder: Path, **fields: Any) -> PretrainConfig:
    """A training whose model has the shape of `make("llama")`."""
    shape = {"layers": 2, "heads": 4, "kv_heads": 2, "width": 32, "hidden": 40, "context": 32, **fields}
    return PretrainConfig.model_validate(
        {"model": shape, "tokens": 640, "batch_tokens": 64, "precision": "fp32", "init_from": folder}
    )


def test_what_a_training_starts_from_is_identity_and_where_it_lies_is_not(tmp_path: Path) -> None:
    for name in ("here", "there"):
        make("llama").save_pretrained(tmp_path / name)
    here, there = (start(tmp_path / name).resolve() for name in ("here", "there"))
    assert here.identity() == there.identity()
    assert str(tmp_path) not in json.dumps(here.identity())
    make("llama", rms_norm_eps=1e-3).save_pretrained(tmp_path / "here")
    assert start(tmp_path / "here").resolve().identity() != there.identity()
    with pytest.raises(UserError, match="changed since the run was planned"):
        here.resolve()
    with pytest.raises(UserError, match="holds no model"):
        start(tmp_path / "nowhere").resolve()


def refused(tmp_path: Path, specials: list[str], tokenizer: Path | None, **fields: Any) -> str:
    model = ModelConfig(**start(tmp_path, **fields).model.model_dump(), vocab_size=500)
    with pytest.raises(UserError) as refusal:
        require_start(model, tmp_path, specials, tokenizer)
    return str(refusal.value)


def test_another_shape_or_tokenizer_is_no_start(tmp_path: Path, corpus: dict[str, Path]) -> None:
    tokenizer, specials = corpus["tokenizer"], TokenizerConfig(vocab_size=500).special_tokens
    make("llama", vocab_size=500).save_pretrained(tmp_path)
    said = refused(tmp_path, specials, tokenizer, heads=8, hidden=None, norm_eps=1e-6)
    assert "set pretrain.model.heads=4 (not 8), pretrain.model.hidden=40 (not null)" in said
    assert "tokenizer.json is missing" in refused(tmp_path, specials, None, norm_eps=1e-6)
    (tmp_path / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    assert "has other special tokens" in refused(tmp_path, [*specials, "<|user|>"], None, norm_eps=1e-6)
    model = ModelConfig(**start(tmp_path, norm_eps=1e-6, context=64).model.model_dump(), vocab_size=500)
    require_start(model, tmp_path, specials, tokenizer)
    require_start(model, tmp_path, specials, None)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_the_settings_that_a_refusal_names_make_the_shape(
    tmp_path: Path, corpus: dict[str, Path], kind: str
) -> None:
    make(kind, vocab_size=500).save_pretrained(tmp_path)
    specials = TokenizerConfig(vocab_size=500).special_tokens
    said = (
        refused(tmp_path, specials, None) if kind != "llama" else refused(tmp_path, specials, None, heads=8)
    )
    settings = dict(re.findall(r"pretrain\.model\.(\w+)=(\S+)", said))
    fields = {name: json.loads(value) for name, value in settings.items()}
    assert fields
    shape = start(tmp_path, **fields).model
    (tmp_path / "tokenizer.json").write_bytes((corpus["tokenizer"] / "tokenizer.json").read_bytes())
    require_start(ModelConfig(**shape.model_dump(), vocab_size=500), tmp_path, specials, None)


@pytest.mark.parametrize("shard", ["1GB", "10KB"], ids=["one-file", "sharded"])
def test_an_export_that_was_saved_again_is_the_same_start(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path, shard: str
) -> None:
    ours, again = tmp_path / "ours", tmp_path / "again"
    config, tokenizer = tiny(qk_norm=True, rope_theta=777.0), corpus["tokenizer"]
    export(ExportConfig(), {**corpus, "model": saved_model(config)}, ours, LocalContext())
    AutoModelForCausalLM.from_pretrained(ours).save_pretrained(again, max_shard_size=shard)
    AutoTokenizer.from_pretrained(ours).save_pretrained(again)
    assert (again / "config.json").read_bytes() != (ours / "config.json").read_bytes()
    assert content_sha256(again) == content_sha256(ours)
    require_start(config, again, special_tokens(tokenizer), tokenizer)
    for change in ("vocab", "merges", "special", "pattern"):
        written = json.loads((again / "tokenizer.json").read_text())
        if change == "vocab":
            vocab = written["model"]["vocab"]
            vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        elif change == "merges":
            written["model"]["merges"][:2] = written["model"]["merges"][1::-1]
        elif change == "special":
            written["added_tokens"][1]["content"] = "<|user|>"
        else:
            written["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\S+"
        other = tmp_path / change
        other.mkdir()
        (other / "tokenizer.json").write_text(json.dumps(written))
        assert behaviour_sha256(other) != behaviour_sha256(tokenizer), change


def test_a_start_that_does_not_fit_is_refused_by_the_plan_before_anything_runs(tmp_path: Path) -> None:
    make("llama", vocab_size=500).save_pretrained(tmp_path / "start")
    (tmp_path / "a.txt").write_text("Once upon a time.\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: start\ndownload: {{sources: [{{name: a, kind: local, path: {tmp_path / 'a.txt'}}}]}}\n"
        f"pretrain: {{tokens: 640, batch_tokens: 64, precision: fp32, init_from: {tmp_path / 'start'}, "
        "model: {layers: 2, heads: 4, kv_heads: 2, width: 32, hidden: 40, context: 32, norm_eps: 1e-6}}\n"
    )

    def said(*changes: str) -> str:
        with pytest.raises(UserError) as refusal:
            make_plan(load_recipe(path, changes), Store(tmp_path / "home"))
        return str(refusal.value)

    assert "set train_tokenizer.vocab_size=500 (not 4096)" in said()
    vocabulary = "train_tokenizer.vocab_size=500"
    assert "set pretrain.model.layers=2 (not 3)" in said(vocabulary, "pretrain.model.layers=3")
    assert "tokenizer.json is missing" in said(vocabulary)
    assert not (tmp_path / "home").exists()
