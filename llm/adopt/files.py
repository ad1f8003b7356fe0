"""The files that a thing to be adopted consists of, by its type: found by name, checked to be there, and hashed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from data_pipeline.core.errors import UserError
from llm.model.files import ARCHITECTURES, Unsupported, read_type, weight_files

Kind = Literal["tokenizer", "model", "documents", "tokens"]
Files = Mapping[str, Path]
"""Name in the artifact -> where it lies."""

VOCABULARIES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
"""Entries and merges, as GPT-2's maker and as `transformers` call them."""
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files that may lie beside a tokenizer, and set what its special tokens are for."""
INDEX = "model.safetensors.index.json"
OTHERS = {
    "tokenizer.model": "a SentencePiece model",
    "spiece.model": "a SentencePiece model",
    "vocab.txt": "WordPiece's vocabulary",
}
"""Files of tokenizers that are no byte-level BPE."""
TOKENIZER_PATTERNS = ("tokenizer.json", *BESIDE, *(name for pair in VOCABULARIES for name in pair))
PATTERNS: dict[Kind, tuple[str, ...]] = {
    "tokenizer": TOKENIZER_PATTERNS,
    "model": ("config.json", "*.safetensors", INDEX, *TOKENIZER_PATTERNS),
    "documents": ("documents-*.parquet",),
    "tokens": ("train-*.parquet", "val-*.parquet"),
}
"""Names of the files of each type."""


def find_files(path: Path, kind: Kind, *, any_architecture: bool = False) -> Files:
    """Find the files of a thing of this type.

    Args:
        any_architecture: whether a model may be one that ours does not compute.

    Raises:
        UserError: one that it needs is missing or empty, or what is there is of another kind.
    """
    if not os.path.exists(path):  # unlike the path's method, for names that are too long as well
        raise UserError(f"there is nothing at {path}:\nname the folder of the {kind} with adopt.path")
    files = of_file(path, kind) if path.is_file() else of_folder(path, kind, any_architecture)
    for one in files.values():
        if not one.is_file():
            raise UserError(f"{one} is no file")
        if not one.stat().st_size:
            raise UserError(f"{one} is empty:\ncopy it again from where it came")
    return files


def of_file(path: Path, kind: Kind) -> Files:
    """Take a single file for a whole tokenizer or corpus."""
    wanted = {"tokenizer": (".json", "tokenizer.json"), "documents": (".parquet", "documents-00000.parquet")}
    suffix, name = wanted.get(kind, ("", ""))
    if not suffix or path.suffix != suffix:
        what = f"a folder, or a {suffix} file" if suffix else "a folder"
        raise UserError(f"{path} is a file:\nfor {kind}, name {what} with adopt.path")
    return {name: path}


def of_folder(folder: Path, kind: Kind, any_architecture: bool) -> Files:
    """Find the files of a type in a folder."""
    if kind == "model":
        return {**model_files(folder, any_architecture), **tokenizer_files(folder)}
    return tokenizer_files(folder) if kind == "tokenizer" else shard_files(folder, kind)


def tokenizer_files(folder: Path) -> Files:
    """Find a tokenizer and what lies beside it.

    Raises:
        UserError: there is none, or one of another kind only.
    """
    sets = (("tokenizer.json",), *VOCABULARIES)
    names = next((names for names in sets if all((folder / name).exists() for name in names)), None)
    if names is None:
        others = [f"{name} is {what}" for name, what in OTHERS.items() if (folder / name).exists()]
        hint = (
            f"its {others[0]}, and llmill reads byte-level BPE only" if others else "save it beside the model"
        )
        raise UserError(f"{folder} has no tokenizer.json, nor encoder.json and vocab.bpe:\n{hint}")
    return {name: folder / name for name in (*names, *BESIDE) if (folder / name).exists()}


def model_files(folder: Path, any_architecture: bool) -> Files:
    """Find the config and the weights of a model.

    Raises:
        Unsupported: they are of a model that ours is not, and may not be.
        UserError: they are missing or damaged.
    """
    config = folder / "config.json"
    if not config.is_file():
        ours = (folder / "model.json").is_file()
        hint = (
            "it is one that llmill made: name its export" if ours else "name a folder that transformers loads"
        )
        raise UserError(f"{folder} holds no model: it has no config.json;\n{hint}")
    if (kind := read_type(config)) not in ARCHITECTURES and not any_architecture:
        raise Unsupported(
            f"{folder} holds a model of type {kind!r}, which llmill does not compute:\n"
            f"there are {', '.join(ARCHITECTURES)}; adopt.any_architecture lets it be scored by transformers"
        )
    paths = [config, *weight_files(folder)]
    paths += [folder / INDEX] if (folder / INDEX).exists() else []
    return {path.name: path for path in paths}


def shard_files(folder: Path, kind: Kind) -> Files:
    """Find the shards of documents or tokens.

    Raises:
        UserError: there are none.
    """
    found: dict[str, Path] = {}
    for pattern in PATTERNS[kind]:
        paths = sorted(folder.glob(pattern))
        if not paths:
            hint = "a source of `download` (kind: local) reads Parquet of other names and columns"
            raise UserError(
                f"{folder} holds no {pattern}, as llmill writes {kind}"
                + (f":\n{hint}" if kind == "documents" else ":\nadopt the documents, and tokenise them")
            )
        found |= {path.name: path for path in paths}
    return found
