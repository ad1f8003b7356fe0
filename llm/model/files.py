"""The files of a model as `transformers` lays it down. They are found without torch, so that a plan needs none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from data_pipeline.core.errors import UserError

Layout = Literal["llama", "qwen3", "gpt2"]

ARCHITECTURES: dict[Layout, str] = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}

CLASSIFIERS: dict[Layout, str] = {
    "llama": "LlamaForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
}
"""The same with a head that gives labels."""


class Unsupported(UserError):
    """A model that ours does not compute, though `transformers` may."""


def read_type(path: Path) -> str | None:
    """Read from a ``config.json`` which type the model is of; None where it has none.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object")
    return raw.get("model_type")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model: one, or those that its index names.

    Raises:
        UserError: there are none, some are missing, or the index is damaged.
    """
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        try:
            names = {
                str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index} is damaged: it names no files of weights") from None
        if outside := sorted(name for name in names if Path(name).name != name):
            raise UserError(f"{index} names {outside[0]}: files of weights lie beside it, in no other folder")
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise UserError(f"{folder} lacks {', '.join(missing)}: weights are read from safetensors files only")
    return sorted(folder / name for name in names)
