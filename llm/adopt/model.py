"""Models that were made elsewhere, in a layout of `transformers`, written as `llm.pretrain` leaves those of ours."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.stage import Metrics, StageContext
from llm.adopt.files import INDEX, Files
from llm.model.config import ModelConfig
from llm.model.files import weight_files
from llm.model.foreign import load_foreign, require_causal, require_context
from llm.model.layouts import load_weights, read_config
from llm.model.transformer import Transformer, save_model

TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types of stored weights that fp32 holds without loss, as safetensors and torch call them."""


def adopt_model(folder: Path, out: Path, context: StageContext) -> Metrics:
    """Write the model in ``folder`` as `load_model` reads it, in fp32.

    Raises:
        UserError: it is damaged, quantised, or computes what our model does not.
    """
    config = read_config(folder)
    stored = require_types(folder)
    model = Transformer(config)
    load_weights(model, folder)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    require_finite(parameters, folder)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in parameters:
            parameters[name][config.vocab_size :] = 0  # what pads the vocabulary was drawn at random
    context.note(
        f"{model.parameter_count():,} parameters, stored as {' and '.join(stored)}, are kept in float32"
    )
    save_model(config, parameters, out)
    return {"parameters": float(model.parameter_count()), "context": float(config.context)}


def adopt_foreign(folder: Path, files: Files, out: Path) -> Metrics:
    """Copy the files of a model that only `transformers` computes, as `load_foreign` reads them.

    Raises:
        UserError: `transformers` does not compute it either, or it is damaged.
    """
    model = load_foreign(folder)
    require_causal(model)
    require_context(model)
    require_finite(dict(model.named_parameters()), folder)
    for name, path in files.items():
        if name in ("config.json", INDEX) or name.endswith(".safetensors"):
            with atomic_path(out / name) as temporary:
                shutil.copyfile(path, temporary)
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": float(count), "context": float(model.config.context)}


def require_types(folder: Path) -> list[str]:
    """Return the types that the weights in a folder are stored in.

    Raises:
        UserError: one is not held by fp32 without loss, or is no floating-point number.
    """
    found = set()
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                named = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no dict)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} can't be read: {error}") from None
        for name, kind in named.items():
            if kind not in TYPES and not name.endswith(".attn.bias"):
                raise UserError(
                    f"{path}: {name} is stored as {kind}, not as {', '.join(TYPES.values())}:\n"
                    "dequantise or convert the model first"
                )
        found |= {TYPES[kind] for kind in named.values() if kind in TYPES}
    return sorted(found)


def require_finite(parameters: dict[str, torch.Tensor], folder: Path) -> None:
    """See that weights are numbers.

    Raises:
        UserError: some are infinite, or none at all.
    """
    if wrong := [name for name, weight in parameters.items() if not torch.isfinite(weight).all()]:
        raise UserError(
            f"{folder} holds weights that are no finite numbers ({', '.join(wrong[:3])}):\nit is damaged"
        )


def read_sealed(folder: Path) -> Metrics:
    """Return the metrics of a model that is written already."""
    config = ModelConfig.model_validate_json((folder / "model.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        count = Transformer(config).parameter_count()
    return {"parameters": float(count), "context": float(config.context)}
