"""GGUF files of an exported folder, for llama.cpp and what is built on it: weights, shape, tokenizer and chat template
in one file. The format and llama.cpp's names are those of the package `gguf`, which llama.cpp's makers publish.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    TokenType,
    dequantize,
    get_tensor_name_map,
    quantize,
)
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.train_tokenizer.tokenizer import (
    CONFIG,
    content_of,
    end_of_text,
    load_tokenizer,
    read_object,
)
from llm.chat.template import FILE
from llm.export.config import Kind
from llm.export.llama_cpp import require_reproducible
from llm.model.config import ModelConfig
from llm.model.files import Layout, weight_files
from llm.model.layouts import layout_of, read_config, turned

Weight = NDArray[np.float32]
ARCHITECTURES: dict[Layout, MODEL_ARCH] = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen3": MODEL_ARCH.QWEN3,
    "gpt2": MODEL_ARCH.GPT2,
}
FILE_TYPES: dict[Kind, LlamaFileType] = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
F32, F16, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0
BLOCK = GGML_QUANT_SIZES[Q8_0][0]
"""Weights of a row that share a scale in Q8_0."""
LEAST_F16 = 2.0**-24
"""Smallest number above 0 in 16 bits."""


def file_name(kind: Kind) -> str:
    """Return the name of a GGUF file in an exported folder."""
    return f"model-{kind}.gguf"


def write_gguf(folder: Path, kind: Kind, *, name: str) -> list[str]:
    """Write the model and the tokenizer of an exported folder into a GGUF file there, and read it back.

    Args:
        name: what programs that load the file show.

    Returns:
        Names of the matrices that are stored in F16, for their rows can't be cut into blocks of Q8_0.

    Raises:
        UserError: llama.cpp can't give the tokenizer's ids, or the kind can't hold the weights.
        RuntimeError: the file holds other weights than the folder.
    """
    cut = require_reproducible(folder)
    config = read_config(folder)
    path = folder / file_name(kind)
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, layout_of(config))
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        add_shape(writer, config)
        add_entries(writer, load_tokenizer(folder), config.vocab_size)
        writer.add_tokenizer_pre(cut)
        add_special_tokens(writer, folder)
        for tensor, weight in read_tensors(folder, config):
            stored = stored_type(tensor, weight, kind)
            writer.add_tensor(tensor, quantize(weight, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return compare_tensors(path, folder, config, kind)


def add_shape(writer: GGUFWriter, config: ModelConfig) -> None:
    """Add what llama.cpp must know of a model before its tensors."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.hidden_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_head_count)
    if layout_of(config) == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)


def add_entries(writer: GGUFWriter, tokenizer: Tokenizer, rows: int) -> None:
    """Add the vocabulary and the merges.

    llama.cpp wants an entry for each row of the embeddings: ids that the tokenizer has not become unused ones.

    Raises:
        UserError: the vocabulary has an entry that is named as an unused one.
    """
    entries = [tokenizer.id_to_token(id) for id in range(rows)]
    types = [TokenType.UNUSED if entry is None else TokenType.NORMAL for entry in entries]
    for id, token in tokenizer.get_added_tokens_decoder().items():
        types[id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    named = [f"[PAD{id}]" if entry is None else entry for id, entry in enumerate(entries)]
    if len(set(named)) < rows:
        raise UserError(
            "export.gguf: the vocabulary has an entry like [PAD1], as llama.cpp calls ids that have none"
        )
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")  # a byte-level BPE, whichever
    writer.add_token_list(named)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])


def add_special_tokens(writer: GGUFWriter, folder: Path) -> None:
    """Add which tokens begin and end texts, what the tokenizer of a folder puts around one, and its chat template."""
    tokenizer, config = load_tokenizer(folder), read_object(folder / CONFIG)

    def named(key: str) -> int | None:
        content = content_of(config.get(key))
        return None if content is None else tokenizer.token_to_id(content)

    end = end_of_text(tokenizer)
    first, last, padding = (named(key) for key in ("bos_token", "eos_token", "pad_token"))
    bos, eos = end if first is None else first, end if last is None else last
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    if padding is not None:
        writer.add_pad_token_id(padding)
    stops = read_object(folder / "generation_config.json")["eos_token_id"]
    others = [stop for stop in (stops if isinstance(stops, list) else [stops]) if stop != eos]
    for add, stop in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(stop)
    adds_bos, adds_eos = added_around(folder, tokenizer, bos, eos)
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(adds_eos)
    template = config.get("chat_template")
    if (folder / FILE).is_file():
        template = (folder / FILE).read_text(encoding="utf-8")
    if isinstance(template, str):
        writer.add_chat_template(template)


def added_around(folder: Path, tokenizer: Tokenizer, bos: int, eos: int) -> tuple[bool, bool]:
    """Find whether the tokenizer, as `transformers` loads it, puts ``bos`` before a text and ``eos`` behind it.

    Raises:
        UserError: it puts something else there.
    """
    from transformers import AutoTokenizer

    given = AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
    plain = tokenizer.encode("a").ids
    for before, behind in product((False, True), repeat=2):
        if given == [bos] * before + plain + [eos] * behind:
            return before, behind
    raise UserError("export.gguf: the tokenizer puts around a text what llama.cpp does not")


def read_tensors(folder: Path, config: ModelConfig) -> Iterator[tuple[str, Weight]]:
    """Yield llama.cpp's names and the weights of an exported folder, in fp32, a tensor at a time.

    Matrices are (out, in) there, GPT-2's too. Of Llama's layout it turns the features 2i and 2i + 1 of a head
    together, where `transformers` turns i and i + E/2: rows of the matrices are put in that order.
    """
    layout = layout_of(config)
    names = get_tensor_name_map(ARCHITECTURES[layout], config.layers)
    rotary = {"q_proj": config.heads, "k_proj": config.kv_head_count} if layout == "llama" else {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                weight = turned(name, file.get_tensor(name)).to(torch.float32)
                heads = rotary.get(name.split(".")[-2])
                its = names.get_name(name, try_suffixes=(".weight", ".bias"))
                assert its is not None, f"llama.cpp has no name for {name}"
                yield its, (weight if heads is None else interleaved(weight, heads)).contiguous().numpy()


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Order the rows ``(H E, D)`` of each head as 0, E/2, 1, E/2 + 1, ..., so that what turns together is together."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def stored_type(tensor: str, weight: Weight, kind: Kind) -> GGMLQuantizationType:
    """Return the type in which a tensor is stored: vectors and learned positions always in F32, as llama.cpp does."""
    if weight.ndim == 1 or tensor.startswith("position_embd"):
        return F32
    wanted = GGMLQuantizationType[kind]
    return F16 if wanted == Q8_0 and weight.shape[-1] % BLOCK else wanted


def compare_tensors(path: Path, folder: Path, config: ModelConfig, kind: Kind) -> list[str]:
    """Hold what a GGUF file stores against the folder that it was made of: it may differ by rounding alone.

    Returns:
        Names of the matrices that are in F16 and were to be in Q8_0.
    """
    held = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    wider = []
    for name, weight in read_tensors(folder, config):
        tensor = held.pop(name)
        stored = dequantize(tensor.data, tensor.tensor_type)
        if not np.isfinite(stored).all():
            raise UserError(f"export.gguf: {kind} can't hold numbers as large as those of {name}: choose F32")
        if not (np.abs(stored - weight) <= rounding(weight, tensor.tensor_type)).all():
            raise RuntimeError(f"{path} holds other weights than {folder} in {name}")
        if kind == "Q8_0" and tensor.tensor_type == F16:
            wider.append(name)
    assert not held, f"{path} holds more tensors than {folder}: {', '.join(held)}"
    return wider


def rounding(weight: Weight, stored: GGMLQuantizationType) -> Weight | float:
    """Return how far a weight may be from what is stored: half a step.

    In Q8_0 a step is a 127th of the largest weight of a block of a row, itself rounded to 16 bits.
    """
    if stored == F32:
        return 0.0
    if stored == F16:
        return np.maximum(np.abs(weight) * 2.0**-11, LEAST_F16 / 2)
    largest = np.abs(weight.reshape(*weight.shape[:-1], -1, BLOCK)).max(-1, keepdims=True)
    allowed = largest * (0.5 / 127 + 2.0**-11) + 127 * LEAST_F16 / 2
    result: Weight = np.broadcast_to(allowed * (1 + 1e-6), (*allowed.shape[:-1], BLOCK)).reshape(weight.shape)
    return result
