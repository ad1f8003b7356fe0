"""Models and tokenizers for GGUF files, and texts on which tokenizers differ."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_pipeline.stage import LocalContext
from data_pipeline.train_tokenizer.stage import TokenizerConfig, train_tokenizer
from data_pipeline.train_tokenizer.tokenizer import CONFIG
from llm.export.config import ExportConfig
from llm.export.llama_cpp import QWEN2, QWEN35, TRIALS
from llm.export.stage import export

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 2, "rope_theta": 777.0},
    "qwen3": {"kv_heads": 2, "qk_norm": True, "head_dim": 16, "norm_eps": 1e-3, "rope_theta": 777.0},
    "gpt2": {"positions": "learned", "hidden": 96},
}
PATTERNS = {"gpt2": "gpt-2", "cl100k": "dbrx", QWEN2: "qwen2", QWEN35: "qwen35"}
"""Settings of train_tokenizer, with llama.cpp's name for how they cut text."""
ORDINARY: dict[str, str] = json.loads((Path(__file__).parent / "ordinary_texts.json").read_text("utf-8"))
BLOCKS = (
    (0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE80),
    (0xE80, 0x1200), (0x1780, 0x1800), (0x1E00, 0x2070), (0x2100, 0x2800), (0x3000, 0x3100), (0x4E00, 0x4F00),
    (0xAC00, 0xAD00), (0xFB00, 0xFE10), (0x1F1E6, 0x1F650), (0x20000, 0x20010),
)  # fmt: skip
"""Ranges of characters from which hostile texts are drawn."""


def texts(count: int) -> Iterator[str]:
    """Yield ordinary sentences in many scripts, trials, and drawn texts that mix scripts, digits and white space."""
    drawn = random.Random(0)
    ordinary = [*TRIALS, *ORDINARY.values()]
    for number in range(count):
        if number < len(ordinary):
            yield ordinary[number]
        elif number % 2:
            text = drawn.choice(ordinary)
            start = drawn.randrange(len(text))
            yield text[start : start + drawn.randrange(1, 80)] + drawn.choice(ordinary)[: drawn.randrange(40)]
        else:
            words = ("".join(chr(drawn.randrange(*block)) for _ in range(drawn.randrange(1, 6)))
                     for block in drawn.choices(BLOCKS, k=12))  # fmt: skip
            yield "".join(
                word + drawn.choice(("", " ", "  ", "\n", "\r\n\t", "'s", "12345", "\u3000"))
                for word in words
            )


def trained(documents: Path, pattern: str, folder: Path) -> Path:
    """Train a tokenizer of 500 entries on documents, and return its folder."""
    config = TokenizerConfig(vocab_size=500, pattern=pattern)
    train_tokenizer(config, {"documents": documents}, folder, LocalContext())
    return folder


def changed(folder: Path, into: Path, change: Callable[[dict[str, Any]], object], **config: object) -> Path:
    """Copy a tokenizer whose ``tokenizer.json`` is changed, and in ``tokenizer_config.json`` the keys given."""
    into.mkdir()
    description = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    change(description)
    Tokenizer.from_str(json.dumps(description)).save(str(into / "tokenizer.json"))
    beside = json.loads((folder / CONFIG).read_text("utf-8"))
    (into / CONFIG).write_text(json.dumps({**beside, **config}), encoding="utf-8")
    return into


def exported(inputs: Mapping[str, Path], out: Path, **settings: Any) -> tuple[Path, list[str]]:
    """Export with some settings, and return the folder and what was noted."""
    context = LocalContext()
    export(ExportConfig.model_validate(settings), inputs, out, context)
    return out, context.notes
