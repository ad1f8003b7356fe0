"""The export stage: a folder that `transformers` loads with `AutoModelForCausalLM` and `AutoTokenizer`, in the layout
that the model has (`llm.model.layouts`), with a model card written from the manifests of all the stages before. The
folder is loaded back and its logits held against ours before it counts as made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.core.text import table
from data_pipeline.stage import Metrics, StageContext
from data_pipeline.train_tokenizer.tokenizer import (
    CONFIG,
    content_of,
    end_of,
    end_of_text,
    end_token,
    load_tokenizer,
    read_object,
)
from llm.chat.template import FILE, Chat
from llm.classify.labels import FILE as LABELS
from llm.classify.labels import read_labels
from llm.export.config import ExportConfig
from llm.export.gguf import file_name, write_gguf
from llm.export.llama_cpp import require_reproducible
from llm.export.model_card import about_tokens, model_card
from llm.model.config import ModelConfig
from llm.model.layouts import exported_weights, layout_of, transformers_config
from llm.model.transformer import Transformer, load_model

TOLERANCE = 1e-4
"""Largest difference between a logit of `transformers` and ours, in fp32; where logits are large, times their root mean
square."""


def export(config: ExportConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Write the folder and load it back; ``inputs`` are all the stages before.

    Raises:
        UserError: `transformers` has no layout for the model, or llama.cpp can't give the tokenizer's ids.
        RuntimeError: `transformers` computes other logits from the folder than we do from the model.
    """
    if config.gguf:
        require_reproducible(inputs["tokenizer"])
    model = load_model(inputs["model"], labels=True)
    if config.gguf and model.config.labels:
        raise UserError(
            "export.gguf is for a model that continues text, and this one gives texts labels: leave it out"
        )
    tokenizer = load_tokenizer(inputs["tokenizer"])
    its = write_loadable(model, inputs["tokenizer"], out, config.dtype, template=template_of(inputs["model"]))
    if model.config.labels:
        write_labels(inputs["model"], out)
    difference = (label_difference if model.config.labels else logits_difference)(model, out)
    allowed = TOLERANCE if difference <= TOLERANCE else TOLERANCE * max(1.0, logits_scale(model))
    require_same(difference, allowed, out)
    metrics = {"parameters": float(model.parameter_count()), "logits_max_abs_difference": difference}
    metrics |= write_ggufs(config, model, out, allowed=allowed, context=context)
    tokens = about_tokens(end_of(tokenizer), its)
    write_text(
        out / "README.md", model_card(config.name, model.config, read_manifests(inputs), metrics, tokens)
    )
    write_text(out / "report.md", report(config, model.config, metrics, allowed=allowed, out=out))
    return metrics


def write_ggufs(
    config: ExportConfig, model: Transformer, out: Path, *, allowed: float, context: StageContext
) -> Metrics:
    """Write the GGUF files that a config asks for. That in fp32 is loaded back by `transformers`.

    Args:
        allowed: difference of logits that it may have.

    Returns:
        How far its logits are from ours.

    Raises:
        RuntimeError: farther than that.
    """
    metrics = {}
    for kind in config.gguf:
        file = file_name(kind)
        if wider := write_gguf(out, kind, name=config.name):
            context.note(
                f"{file}: {len(wider)} matrices ({wider[0]} ...) are F16, for rows must be blocks of 32"
            )
        if kind == "F32":
            difference = logits_difference(model, out, file)
            require_same(difference, allowed, out / file)
            metrics["gguf_logits_max_abs_difference"] = difference
    return metrics


def require_same(difference: float, allowed: float, written: Path) -> None:
    """See that logits of what was written differ by no more than may be.

    Raises:
        RuntimeError: they do.
    """
    if not difference <= allowed:
        raise RuntimeError(
            f"transformers' logits of {written.name} differ from ours by {difference:.2e}, more than {allowed:.0e}"
        )


def template_of(folder: Path) -> str | None:
    """Return the chat template that a model was trained with here; None of one that was trained on no conversations.

    What was adopted has that of its tokenizer, which lies beside it.
    """
    trained = (folder / FILE).is_file() and not (folder / "tokenizer.json").exists()
    return (folder / FILE).read_text(encoding="utf-8") if trained else None


def write_loadable(
    model: Transformer, tokenizer_folder: Path, out: Path, dtype: str, *, template: str | None = None
) -> dict[str, Any]:
    """Write the folder that `transformers` loads: tokenizer, configs and weights; the model's are rounded to ``dtype``.

    Args:
        template: the chat template that the model was trained with; None: it was trained on no conversations.

    Returns:
        The ``tokenizer_config.json``.

    Raises:
        UserError: `transformers` has no layout for the model.
    """
    layout_of(model.config)
    with torch.no_grad():  # what is stored is what is compared; the rotary tables stay fp32
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    tokenizer = load_tokenizer(tokenizer_folder)
    end = end_of_text(tokenizer)
    side = "right" if model.config.labels else "left"
    its = write_tokenizer(tokenizer_folder, out, model.config.context, template, side=side)
    padding = tokenizer.token_to_id(its["pad_token"])
    described = transformers_config(model.config, end, dtype)
    # By the token that fills up short texts a model that gives labels finds the last one of each.
    write_json(out / "config.json", described | ({"pad_token_id": padding} if model.config.labels else {}))
    ends: dict[str, Any] = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": padding,
    }
    if (turn := tokenizer.token_to_id(str(content_of(its["eos_token"])))) not in (None, end):
        ends["eos_token_id"] = [turn, end]
    if template is not None and (stop := Chat(tokenizer_folder, template).stop) not in (None, end):
        ends["eos_token_id"] = [stop, end]
    if not model.config.labels:
        write_json(out / "generation_config.json", {**ends, "do_sample": True})
    with atomic_path(out / "model.safetensors") as path:
        save_file(exported_weights(model, getattr(torch, dtype)), path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes it readable by its owner only
    return its


def write_labels(folder: Path, out: Path) -> None:
    """Name the labels that the model in a folder gives, in the config of the one that was written."""
    shutil.copyfile(folder / LABELS, out / LABELS)
    names, several = read_labels(folder)
    described = read_object(out / "config.json")
    described |= {"id2label": {str(number): name for number, name in enumerate(names)}}
    described |= {"label2id": {name: number for number, name in enumerate(names)}}
    described |= {"problem_type": f"{'multi' if several else 'single'}_label_classification"}
    write_json(out / "config.json", described)


def write_tokenizer(
    folder: Path, out: Path, longest: int, template: str | None, *, side: str
) -> dict[str, Any]:
    """Copy the tokenizer in ``folder``, with what a batch needs: a token that fills up short texts, on the ``side``
    where no continuation is in the way; and ``longest``, the tokens to which texts are cut.

    With a chat template it reads the special tokens that this spells, and so those that any text spells.

    Returns:
        Its ``tokenizer_config.json``.
    """
    for name in ("tokenizer.json", "chat_template.jinja"):
        if (folder / name).exists():
            with atomic_path(out / name) as path:
                shutil.copyfile(folder / name, path)
    if template is not None:
        write_text(out / FILE, template)
    config = read_object(folder / CONFIG)
    named = content_of(config.get("pad_token"))
    known = named is not None and load_tokenizer(folder).token_to_id(named) is not None
    padding = {"pad_token": named if known else end_token(folder)}
    config |= {**padding, "padding_side": side, "model_max_length": longest}
    if (folder / "special_tokens_map.json").exists():
        write_json(out / "special_tokens_map.json", read_object(folder / "special_tokens_map.json") | padding)
    if template is not None:
        config |= {"split_special_tokens": False}
    write_json(out / CONFIG, config)
    return config


def report(config: ExportConfig, model: ModelConfig, metrics: Metrics, *, allowed: float, out: Path) -> str:
    """Return the stage's report in Markdown: what the model card, ``README.md``, does not hold.

    ``allowed`` is the difference of logits that fp32 may have.
    """
    architecture = transformers_config(model, 0, config.dtype)["architectures"][0]
    files = sorted(path for path in out.iterdir() if path.is_file() and not path.name.startswith("."))
    rows = [(path.name, f"{path.stat().st_size:,}") for path in files if path.name != "report.md"]
    gguf = "gguf_logits_max_abs_difference"
    ours = f" Those of {file_name('F32')} differ by at most {metrics[gguf]:.1e}." if gguf in metrics else ""
    return (
        f"# Export of {config.name}\n\n"
        f"`transformers` loads it as {architecture}, weights in {config.dtype}. Its logits differ from ours by at "
        f"most {metrics['logits_max_abs_difference']:.1e} (allowed: {allowed:.0e}).{ours}\n\n"
        + table(("file", "bytes"), rows)
    )


@torch.inference_mode()
def logits_scale(model: Transformer) -> float:
    """Return the root mean square of a model's logits on random tokens."""
    logits_BTV = model(random_tokens(model.config))[..., : model.config.labels or model.config.vocab_size]
    return logits_BTV.square().mean().sqrt().item()


def random_tokens(config: ModelConfig, sequences: int = 2, positions: int = 256) -> Tensor:
    """Return the same tokens ``(B, T)`` each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (sequences, min(positions, config.context)), generator=generator)


@torch.inference_mode()
def logits_difference(model: Transformer, folder: Path, gguf: str | None = None) -> float:
    """Largest absolute difference between the logits of ``folder`` in `transformers` and of ``model``, in fp32.

    Args:
        gguf: the file there that has the weights; None: those in safetensors. `transformers` reads but a part of
            what it says of their shape, so that is taken from ``config.json``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm  # which heeds that; its own bar does not
    described = AutoConfig.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf, config=described, dtype=torch.float32
    ).eval()
    vocab_size = len(AutoTokenizer.from_pretrained(folder))
    assert vocab_size <= model.config.vocab_size, f"the tokenizer has {vocab_size} entries, the model fewer"
    tokens_BT = random_tokens(model.config)
    ours_BTV = model(tokens_BT)[..., : model.config.vocab_size]
    return (ours_BTV - theirs(tokens_BT).logits).abs().max().item()


@torch.inference_mode()
def label_difference(model: Transformer, folder: Path) -> float:
    """Largest absolute difference between the logits of labels in `transformers` and of ``model``, in fp32."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokens_BT = random_tokens(model.config)
    tokens_BT[:, -1] = (theirs.config.pad_token_id + 1) % model.config.vocab_size  # else it counts as none
    return (model(tokens_BT)[:, -1] - theirs(tokens_BT).logits).abs().max().item()


def read_manifests(inputs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Return the manifests of the stages that have one, in the order of the pipeline."""
    paths = {stage: folder / "manifest.json" for stage, folder in inputs.items()}
    return {
        stage: json.loads(path.read_text(encoding="utf-8")) for stage, path in paths.items() if path.exists()
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` to ``path``, atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
