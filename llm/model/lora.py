"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): beside a frozen matrix W of a model, a product B A of two small
ones is trained, and W + (alpha / rank) B A is computed with. Shape suffixes: K features in, M features out, R rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipeline.core.files import atomic_path
from llm.kernels.matmul import Linear
from llm.model.config import Lora
from llm.model.files import Layout
from llm.model.layouts import GPT2_NAMES
from llm.model.transformer import Transformer

ADAPTER, DOWN, UP = "adapter", "lora_A.weight", "lora_B.weight"
"""Names of the modules and parameters: the latter are PEFT's."""
FOLDER = "adapter"
"""Where an artifact has its adapters."""


class Adapter(nn.Module):
    """The trained part of a matrix: (alpha / rank) B A x."""

    def __init__(self, linear: nn.Linear, lora: Lora, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = lora.scale
        self.lora_A = nn.Linear(linear.in_features, lora.rank, bias=False)
        self.lora_B = nn.Linear(lora.rank, linear.out_features, bias=False)
        bound = 1 / math.sqrt(linear.in_features)
        with torch.no_grad():  # as in PEFT; with B = 0 it begins as the model that is there
            self.lora_A.weight.uniform_(-bound, bound, generator=generator)
            self.lora_B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.lora_B(self.lora_A(x)) * self.scale
        return result


def add_adapters(model: Transformer, lora: Lora, seed: int) -> None:
    """Give each matrix of the targets an adapter, drawn from ``seed``; nothing else of the model is trained."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.rpartition(".")[2] in lora.targets:
            module.adapter = Adapter(module, lora, generator)


def merge(weights: Mapping[str, Tensor], lora: Lora) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of the model with its adapters added in, and those of the adapters by their own names:
    ``layers.0.self_attn.q_proj.lora_A.weight``."""
    marked = f".{ADAPTER}."
    adapters = {name.replace(marked, "."): weight for name, weight in weights.items() if marked in name}
    merged = {name: weight for name, weight in weights.items() if marked not in name}
    for name, up_MR in adapters.items():
        if name.endswith(UP):
            matrix = name.removesuffix(UP) + "weight"
            down_RK = adapters[name.removesuffix(UP) + DOWN]
            added_MK = lora.scale * (up_MR.double() @ down_RK.double())
            merged[matrix] = (merged[matrix].double() + added_MK).float()
    return merged, adapters


def as_gpt2(
    adapters: Mapping[str, Tensor], lora: Lora
) -> tuple[dict[str, Tensor], dict[str, tuple[int, float]]]:
    """Return adapters by the names of GPT-2's modules, and rank and alpha of those whose are others than ``lora``'s.

    q, k and v are one module there. Of their adapters it has the sum: the ``A`` one above the other, the ``B`` each in
    rows and columns of its own.
    """
    theirs: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, float]] = {}
    fused: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name in (name for name in adapters if name.endswith(UP)):
        module = name.removesuffix(f".{UP}")
        both = adapters[f"{module}.{DOWN}"], adapters[name]
        _, layer, inner = module.split(".", 2)
        part = inner.removeprefix("self_attn.").removesuffix("_proj")
        if part in ("q", "k", "v"):
            fused.setdefault(layer, {})[part] = both
        else:
            place = f"h.{layer}.{GPT2_NAMES[inner]}"
            theirs |= {f"{place}.{DOWN}": both[0], f"{place}.{UP}": both[1]}
    for layer, parts in fused.items():
        width, rank = next(iter(parts.values()))[1].shape
        up_MR = torch.zeros(3 * width, rank * len(parts))
        for number, (part, (_, its_up)) in enumerate(parts.items()):
            up_MR["qkv".index(part) * width :][:width, number * rank :][:, :rank] = its_up
        theirs[f"h.{layer}.attn.c_attn.{DOWN}"] = torch.cat([down for down, _ in parts.values()])
        theirs[f"h.{layer}.attn.c_attn.{UP}"] = up_MR
        ranks["attn.c_attn"] = (lora.rank * len(parts), lora.alpha * len(parts))
    return theirs, ranks


def save_adapters(
    adapters: Mapping[str, Tensor],
    lora: Lora,
    folder: Path,
    *,
    layout: Layout,
    head: Tensor | None = None,
) -> None:
    """Write adapters of a model in a layout as PEFT reads them; of one that gives labels with its ``head``, which is
    trained whole."""
    folder.mkdir(parents=True, exist_ok=True)
    inner, targets = "model", sorted(map(str, lora.targets))
    ranks: dict[str, tuple[int, float]] = {}
    if layout == "gpt2":
        inner = "transformer"
        adapters, ranks = as_gpt2(adapters, lora)
        targets = sorted(
            {name.removesuffix(f".{UP}").split(".", 2)[2] for name in adapters if name.endswith(UP)}
        )
    described: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
        "modules_to_save": None if head is None else ["score"],
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": layout == "gpt2",  # it stores its matrices turned
        "inference_mode": True,
    }
    if ranks:
        described["rank_pattern"] = {module: rank for module, (rank, _) in ranks.items()}
        described["alpha_pattern"] = {module: alpha for module, (_, alpha) in ranks.items()}
    with atomic_path(folder / "adapter_config.json") as path:
        path.write_text(json.dumps(described, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "adapter_model.safetensors") as path:
        named = {f"base_model.model.{inner}.{name}": weight.contiguous() for name, weight in adapters.items()}
        if head is not None:
            named["base_model.model.score.weight"] = head.contiguous()
        save_file(named, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes it readable by its owner only
