"""The layouts that `transformers` has for our models, in both directions: Llama's; Qwen3's, where queries and keys are
normed; GPT-2's, where positions are learned. A config is read by `transformers`' own config classes, so that what a
file leaves out means here what it means there; and what our model cannot compute is refused, never dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.train_tokenizer.tokenizer import behaviour_sha256, special_tokens
from llm.model.config import ModelConfig, ModelShape
from llm.model.files import ARCHITECTURES, CLASSIFIERS, Layout, Unsupported, read_type, weight_files
from llm.model.transformer import Transformer

HEAD, SCORE = "lm_head.weight", "score.weight"
"""Names of the head's matrix: ours, and `transformers`' of a model that gives labels."""
GPT2_NAMES = {
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "norm": "ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
"""GPT-2's names of our modules, the layer's prefix apart. It stores projections turned, and q, k and v as one."""

BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Endings of the names of what old checkpoints hold that follows from the config."""


def layout_of(config: ModelShape) -> Layout:
    """Find which layout a model of ours has.

    Raises:
        UserError: none of them has a soft-cap on the logits.
    """
    if config.logit_softcap is not None:
        raise UserError(
            "model.logit_softcap is set, but neither Llama, Qwen3 nor GPT-2 in `transformers` has a soft-cap:\n"
            "such a model can be trained and evaluated, not exported"
        )
    if config.positions == "learned":
        return "gpt2"
    return "qwen3" if config.qk_norm else "llama"


def transformers_config(config: ModelConfig, end: int, dtype: str) -> dict[str, Any]:
    """Return ``config.json`` as `LlamaConfig`, `Qwen3Config` or `GPT2Config` reads it; ``end`` is the end of text's id.

    Keys that version 5 of `transformers` reads elsewhere than version 4 stand in both places, for a reader takes its
    default in silence where it finds nothing.
    """
    layout = layout_of(config)
    common = {
        "architectures": [(CLASSIFIERS if config.labels else ARCHITECTURES)[layout]],
        "model_type": layout,
        "vocab_size": config.vocab_size,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before 4.56
    }
    if layout == "gpt2":
        return common | {
            "n_embd": config.width,
            "n_inner": config.hidden_width,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_positions": config.context,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    return common | {
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_head_count,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # where it stood before version 5
        "attention_bias": False,
    }


def exported_weights(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return our parameters under `transformers`' names, without the rows that only pad the vocabulary."""
    weights = {}
    for name, parameter in model.named_parameters():  # a tied head is named once, as the embedding
        padded = name == "embed_tokens.weight" or (name == HEAD and not model.config.labels)
        weight = parameter.detach()[: model.config.vocab_size] if padded else parameter.detach()
        weights[name] = weight.to(dtype).contiguous()
    head = {SCORE if model.config.labels else HEAD: weights.pop(HEAD)} if HEAD in weights else {}
    if layout_of(model.config) == "gpt2":
        return to_gpt2(weights, model.config.layers) | head
    return {f"model.{name}": weight for name, weight in weights.items()} | head


def to_gpt2(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Return our weights of GPT-2's blocks, as GPT-2 names and turns them."""
    theirs = {}
    for layer in range(layers):
        for kind in ("weight", "bias"):
            qkv = [weights.pop(f"layers.{layer}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            theirs[f"transformer.h.{layer}.attn.c_attn.{kind}"] = torch.cat(qkv)
    for name, weight in weights.items():
        module, kind = name.rsplit(".", 1)
        if module.startswith("layers."):
            _, layer_number, inner = module.split(".", 2)
            theirs[f"transformer.h.{layer_number}.{GPT2_NAMES[inner]}.{kind}"] = weight
        else:
            theirs[f"transformer.{GPT2_NAMES[module]}.{kind}"] = weight
    return {name: turned(name, weight).contiguous() for name, weight in theirs.items()}


def from_gpt2(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One of GPT-2's weights as the one or three of ours that it is."""
    weight = turned(name, weight)
    name = name.removeprefix("transformer.")
    module, kind = name.rsplit(".", 1)
    prefix = ""
    if module.startswith("h."):
        _, layer, module = module.split(".", 2)
        prefix = f"layers.{layer}."
    if module == "attn.c_attn":
        for part, its in zip("qkv", weight.chunk(3), strict=True):
            yield f"{prefix}self_attn.{part}_proj.{kind}", its
    else:
        ours = {theirs: our for our, theirs in GPT2_NAMES.items()}
        yield f"{prefix}{ours.get(module, module)}.{kind}", weight


def turned(name: str, weight: Tensor) -> Tensor:
    """GPT-2 stores its projections as (in, out), we as (out, in)."""
    return weight.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else weight


def read_config(folder: Path, *, labels: bool = False) -> ModelConfig:
    """Return our config of the model in a folder of one of the three layouts; with ``labels`` one that gives these.

    Raises:
        Unsupported: it computes what our model does not.
        UserError: there is none.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model: it has no config.json")
    kind = read_type(folder / "config.json")
    if kind not in ARCHITECTURES:
        raise Unsupported(f"{folder} holds a model of type {kind!r}; we have {', '.join(ARCHITECTURES)}")
    from transformers import AutoConfig

    try:
        theirs = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its classes check their fields, each in its own way
        raise UserError(
            f"transformers can't read {folder / 'config.json'}: {' '.join(str(error).split())}"
        ) from None
    require_supported(theirs, folder)
    gives_labels = CLASSIFIERS[kind] in (theirs.architectures or ())
    if gives_labels != labels:
        does, not_done = (
            ("gives texts labels", "continues none")
            if gives_labels
            else ("continues texts", "gives no labels")
        )
        raise Unsupported(f"{folder} holds a model that {does}: it {not_done}")
    try:
        ours = our_config(theirs)
        only = {"labels": theirs.num_labels, "tie_embeddings": False}
        return ours.model_copy(update=only) if labels else ours
    except (ValidationError, TypeError) as error:
        raise Unsupported(
            f"{folder / 'config.json'} asks for what our model does not compute: {' '.join(str(error).split())}"
        ) from None


def our_config(theirs: Any) -> ModelConfig:
    """Return our config of what one of `transformers`' describes, which must be supported."""
    if theirs.model_type == "gpt2":
        return ModelConfig(
            positions="learned",
            vocab_size=theirs.vocab_size,
            width=theirs.n_embd,
            hidden=theirs.n_inner,
            layers=theirs.n_layer,
            heads=theirs.n_head,
            context=theirs.n_positions,
            norm_eps=theirs.layer_norm_epsilon,
            tie_embeddings=theirs.tie_word_embeddings,
        )
    usual = theirs.head_dim * theirs.num_attention_heads == theirs.hidden_size
    return ModelConfig(
        vocab_size=theirs.vocab_size,
        width=theirs.hidden_size,
        hidden=theirs.intermediate_size,
        layers=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=None if usual else theirs.head_dim,
        context=theirs.max_position_embeddings,
        norm_eps=theirs.rms_norm_eps,
        rope_theta=theirs.rope_parameters["rope_theta"],
        tie_embeddings=theirs.tie_word_embeddings,
        qk_norm=theirs.model_type == "qwen3",
    )


def require_supported(theirs: Any, folder: Path) -> None:
    """Refuse a config that asks for what our model does not compute.

    Raises:
        Unsupported: it does; all that is wrong is named.
    """
    if theirs.model_type == "gpt2":
        wrong = {
            "activation_function": theirs.activation_function not in ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": not theirs.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": theirs.scale_attn_by_inverse_layer_idx,
            "add_cross_attention": theirs.add_cross_attention,
        }
    else:
        rope = theirs.rope_parameters
        wrong = {
            "hidden_act": theirs.hidden_act != "silu",
            "attention_bias": theirs.attention_bias,
            "mlp_bias": getattr(theirs, "mlp_bias", False),
            "use_sliding_window": getattr(theirs, "use_sliding_window", False),
            "rope_parameters": rope.get("rope_type", "default") != "default"
            or rope.get("partial_rotary_factor", 1.0) != 1.0,
        }
    if names := [name for name, is_wrong in wrong.items() if is_wrong]:
        unsupported = ", ".join(f"{name} = {getattr(theirs, name)}" for name in names)
        raise Unsupported(f"{folder / 'config.json'} asks for what our model does not compute: {unsupported}")


def read_weights(folder: Path, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Yield our names and the weights of a model in one of the layouts, a tensor at a time.

    Raises:
        UserError: a file is missing, or can't be read.
    """
    from safetensors import SafetensorError, safe_open

    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if name.endswith(BUFFERS):
                        continue
                    if layout == "gpt2":
                        yield from from_gpt2(name, file.get_tensor(name))
                    else:
                        yield name.removeprefix("model."), file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} can't be read: {error}") from None


@torch.no_grad()
def load_weights(model: Transformer, folder: Path) -> None:
    """Copy the weights in a folder of one of the layouts into ``model``, which has its shape.

    Raises:
        UserError: a weight is missing, of another shape, or none of the model's.
    """
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    for name, weight in read_weights(folder, layout_of(model.config)):
        if name == HEAD and model.config.tie_embeddings:
            continue
        name = HEAD if model.config.labels and name == SCORE else name
        if name not in parameters:
            raise UserError(f"{folder} holds a weight that its config.json does not describe: {name}")
        rows = model.config.vocab_size if name == "embed_tokens.weight" else None
        if name == HEAD:
            rows = model.config.labels or model.config.vocab_size
        target = parameters[name][:rows]
        if target.shape != weight.shape:
            raise UserError(
                f"{folder}: {name} has shape {list(weight.shape)}, not the config's {list(target.shape)}"
            )
        target.copy_(weight)
        missing.discard(name)
    if missing:
        raise UserError(f"{folder} lacks weights: {', '.join(sorted(missing)[:5])}")


def content_sha256(folder: Path) -> str:
    """Return a hash of what the model in a folder computes, wherever it lies and however its files are written.

    Raises:
        UserError: there is none, or none that our model computes.
    """
    config = read_config(folder)
    tensors = []
    for name, weight in read_weights(folder, layout_of(config)):
        if not (name == "lm_head.weight" and config.tie_embeddings):
            content = hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().data).hexdigest()
            tensors.append([name, str(weight.dtype), list(weight.shape), content])
    described = json.dumps([arithmetic(config), sorted(tensors)], sort_keys=True, allow_nan=False)
    return hashlib.sha256(described.encode()).hexdigest()


def files_sha256(folder: Path, checksum: Callable[[Path], str]) -> str:
    """Return a hash of a model's files, by which older trainings name what they started from.

    ``checksum`` gives the SHA-256 of a file.
    """
    files = [folder / "config.json", *weight_files(folder)]
    described = json.dumps([[path.name, checksum(path)] for path in files], allow_nan=False)
    return hashlib.sha256(described.encode()).hexdigest()


def require_start(model: ModelConfig, folder: Path, specials: Sequence[str], tokenizer: Path | None) -> None:
    """Refuse to start a training of ``model`` from the model in ``folder``, where that is another one.

    Another context is no obstacle where positions are rotary. ``specials`` are the special tokens of this recipe's
    tokenizer, in the order of their ids; ``tokenizer`` is its folder, None where it is not made yet.

    Raises:
        UserError: it has another shape, or another tokenizer, for which tokens mean other text.
    """
    theirs = read_config(folder)
    if settings := settings_for(model, theirs):
        raise UserError(
            f"pretrain.init_from {folder} holds a model of another shape than this recipe's:\nset {settings}"
        )
    known = (folder / "tokenizer.json").is_file()
    its_specials = special_tokens(folder)[: len(specials)] if known else []
    if its_specials != list(specials) or (
        tokenizer and behaviour_sha256(folder) != behaviour_sha256(tokenizer)
    ):
        reason = "cuts text otherwise, or has other special tokens" if known else "is missing"
        raise UserError(
            f"pretrain.init_from {folder} was not made with this recipe's tokenizer (its tokenizer.json {reason}): "
            "tokens would stand for other text;\nstart from a model of the same data and tokenizer stages"
        )


def settings_for(ours: ModelConfig, theirs: ModelConfig) -> str:
    """Return what a recipe must set so that its model has another's shape: ``pretrain.model.heads=4 (not 8), ...``."""
    asked, given = theirs.model_dump(), ours.model_dump()
    here, there = arithmetic(ours), arithmetic(theirs)
    names = [name for name in there if here.get(name) != there[name] and asked[name] != given[name]]
    return ", ".join(
        f"{'train_tokenizer' if name == 'vocab_size' else 'pretrain.model'}.{name}={written(asked[name])} "
        f"(not {written(given[name])})"
        for name in names
    )


def settings_to_begin(ours: ModelConfig, theirs: ModelConfig) -> str:
    """`settings_for`, where a training begins with another's model: where positions are rotary, context and their base
    may be others."""
    if ours.positions == theirs.positions == "rotary":
        theirs = theirs.model_copy(update={"context": ours.context, "rope_theta": ours.rope_theta})
    return settings_for(ours, theirs)


def written(value: Any) -> str:
    """Return a setting as a recipe has it."""
    return json.dumps(value, allow_nan=False)


def arithmetic(config: ModelConfig) -> dict[str, Any]:
    """Return what decides which weights a model has and what it computes with them, derived values filled in."""
    shape = config.model_dump(exclude={"init_std"})
    shape |= {"kv_heads": config.kv_head_count, "head_dim": config.head_width, "hidden": config.hidden_width}
    del shape["rope_theta" if config.positions == "learned" else "context"]
    return shape


def load_folder(folder: Path, *, labels: bool = False) -> Transformer:
    """Return the model in a folder of one of the three layouts: fp32, in evaluation mode, on the CPU; with ``labels``
    one that gives these.

    Raises:
        UserError: there is none, or none that our model computes.
    """
    model = Transformer(read_config(folder, labels=labels))
    load_weights(model, folder)
    return model.eval()
