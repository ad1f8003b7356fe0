"""A first recipe for a text of one's own, with comments: what it says is a start that trains, not an optimum."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.core.errors import UserError
from data_pipeline.core.text import human_bytes
from data_pipeline.download.formats import has_known_suffix, is_compressed, known_suffixes, split_suffix
from data_pipeline.download.local import local_files
from llm.machine.gpus import gpus

TOKEN_BYTES = 4
"""Bytes of text that a token stands for, about."""
PACKED = 4
"""How many times as large a compressed text is unpacked, about."""
BLOCK_TOKENS = 983_040
"""A model of depth d has 12 d (64 d)^2 parameters in its blocks, and wants 20 tokens for each: so many times d^3."""
LARGE_FILE = 100_000
"""Bytes of a ``.txt`` that is rather a book than a page."""
DATASET = re.compile(r"[\w.-]+/[\w.-]+")

RECIPE = """\
# {about}
# Look at it first: llmill plan {name}.yaml; then: llmill run {name}.yaml
# Whatever a recipe may say: llmill settings [STAGE[.FIELD]], or docs/settings.md.
name: {name}
description: ""

download:
  sources:
    - {source}

clean:                                # rules that drop documents; what is dropped is counted and kept apart
  # gopher: null                      # keep what its rules of quality drop: code, verse, tables
  # language: {{allowed: [en]}}         # keep these languages alone
  # masking: {{}}                       # put <EMAIL>, <IP_ADDRESS>, <PHONE_NUMBER> in place of personal data
  min_chars: 1

train_tokenizer:
  vocab_size: {vocab}

tokenize:
  val_fraction: {held_out}                   # of the documents are held out, and measure the model

pretrain:
  depth: {depth}                            # one dial: width, batch, learning rate, tokens follow (llmill plan)
  model: {{context: {context}, tie_embeddings: true}}
{tokens}  runtime: {{checkpoint_every: 50, validation: {{every: 50, tokens: 65_536}}}}

evaluate:
  prompts: ["", "The "]               # a sample is written for each
  # tasks:                            # does it know English grammar? Guessing is right in half; docs/evaluate.md
  #   - {{name: agreement, path: "llmill://english_agreement.jsonl", kind: pairs}}
"""
FEW_TOKENS = (
    "  tokens: 2_000_000                   # some minutes on two cores; without it, 20 a parameter follow\n"
)


@dataclass(frozen=True)
class Text:
    """A text, as it is known before it is read."""

    source: dict[str, str | int]
    """As ``download.sources`` has it."""
    about: str
    size: float
    """Bytes, about; 0 where it is not known."""
    documents: float
    """About; 0 where it is not known."""


def new_recipe(name: str, place: str) -> str:
    """Write a recipe for the text at ``place``: a file, a folder or a pattern, or a data set of the Hub (OWNER/NAME).

    Raises:
        UserError: there is nothing to read.
    """
    text = look_at(name, place)
    tokens = text.size / TOKEN_BYTES
    large = gpus() > 0
    depth = min(max(2, round((tokens / BLOCK_TOKENS) ** (1 / 3))), 12 if large else 4)
    return RECIPE.format(
        about=text.about,
        name=name,
        source=json.dumps(text.source, ensure_ascii=False, allow_nan=False),
        vocab=32_768 if text.size > 1e9 else 4096,
        held_out=0.01 if not text.documents or text.documents > 2000 else 0.1,
        depth=depth,
        context=1024 if large else 256,
        tokens="" if large else FEW_TOKENS,
    )


def look_at(name: str, place: str) -> Text:
    """Describe a text by the names and sizes of its files, which are not opened."""
    source = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_") or "text"
    local = Path(place).expanduser()
    if not local.exists() and DATASET.fullmatch(place):
        about = f"The data set {place} of the Hub; say which of its configs and splits where it has several."
        return Text(
            source={"name": source, "kind": "huggingface", "dataset": place}, about=about, size=0, documents=0
        )
    _, files, left_out = local_files(str(local))
    readable = [file for file in files if has_known_suffix(file.name)]
    if not readable:
        others = f" ({len(files)} files, none ending with {known_suffixes()})" if files else ""
        raise UserError(f"--from {place}: there is nothing to read{others}")
    sizes = [file.stat().st_size * (PACKED if is_compressed(file.name) else 1) for file in readable]
    kinds = Counter(split_suffix(file.name)[0] for file in readable)
    found = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common())
    passed = len(files) - len(readable) + sum(left_out.values())
    about = f"{found}, {human_bytes(sum(sizes))} of text, about" + (
        f"; {passed} others are not read" if passed else ""
    )
    written: dict[str, str | int] = {"name": source, "kind": "local", "path": str(local)}
    documents = float(len(readable))
    if kinds.most_common(1)[0][0] == ".txt" and sum(sizes) > LARGE_FILE * len(sizes):
        written["split_chars"] = 4000
        documents = sum(sizes) / 4000
    elif set(kinds) != {".txt"}:
        documents = 0  # a file of these holds any number
    return Text(source=written, about=about, size=sum(sizes), documents=documents)
