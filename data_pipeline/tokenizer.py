"""Stage ``train_tokenizer``: learn a byte-level BPE vocabulary from a sample of the documents, and load it again.

There is no normaliser and every byte is in the alphabet, so decoding gives back exactly the text that was encoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.context import (
    Metrics,
    Runtime,
    StageConfig,
    StageContext,
    UserError,
    atomic_path,
    human_bytes,
)
from data_pipeline.documents import byte_lengths, hash_ids, once, read_shard, shard_paths, table

END_OF_TEXT = "<|endoftext|>"
BYTES = 256
"""Entries that every byte-level vocabulary begins with."""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is cut before merging: the pattern of GPT-4 (``cl100k_base`` in OpenAI's tiktoken)."""


class TokenizerConfig(StageConfig):
    """Size of the vocabulary and of the sample that it is learnt from."""

    vocab_size: int = Field(default=4096, gt=BYTES)
    """Entries in all, special tokens and the 256 bytes included."""
    reserved_tokens: int = Field(default=7, ge=0)
    """Special tokens without a meaning yet (``<|reserved_0|>``, ...), for later fine-tuning."""
    sample_bytes: int = Field(default=100_000_000, gt=0)
    """Text to learn from: documents are drawn by hash of their id until this is reached."""
    seed: int = 0
    runtime: Runtime = Runtime()

    @property
    def special_tokens(self) -> list[str]:
        """End-of-text first, then the reserved ones; their ids count from 0 in this order."""
        return [END_OF_TEXT, *(f"<|reserved_{number}|>" for number in range(self.reserved_tokens))]

    @model_validator(mode="after")
    def _room_for_bytes(self) -> Self:
        least = BYTES + len(self.special_tokens)
        if self.vocab_size < least:
            raise ValueError(
                f"vocab_size {self.vocab_size} is below {least} (256 bytes and the special tokens)"
            )
        return self


def train_tokenizer(
    config: TokenizerConfig, inputs: Mapping[str, Path], out: Path, context: StageContext
) -> Metrics:
    """Train on a sample of ``inputs["dedup"]``; writes ``tokenizer.json`` and what `transformers` wants beside it.

    Raises:
        UserError: the text gives fewer entries than ``vocab_size``.
    """
    shards = shard_paths(inputs["dedup"])
    context.progress(0, None, "MB")
    texts = draw_sample(config, shards, out / "scratch", context)
    size = sum(len(text.encode()) for text in texts)
    context.progress(0, size / 1e6, "MB")
    tokenizer = train(texts, config)
    context.progress(size / 1e6, size / 1e6, "MB")
    if tokenizer.get_vocab_size() < config.vocab_size:
        raise UserError(
            f"{human_bytes(size)} of text support a vocabulary of {tokenizer.get_vocab_size()} entries, not "
            f"{config.vocab_size}: lower train_tokenizer.vocab_size, or give more text"
        )
    save(tokenizer, config, out)
    metrics = {
        "vocab_size": float(tokenizer.get_vocab_size()),
        "sample_documents": float(len(texts)),
        "sample_bytes": float(size),
        "sample_bytes_per_token": bytes_per_token(tokenizer, texts),
    }
    write_report(tokenizer, config, metrics, out / "report.md")
    return metrics


def draw_sample(
    config: TokenizerConfig, shards: Sequence[Path], scratch: Path, context: StageContext
) -> list[str]:
    """Texts of the documents with the smallest hashes, in order of hash, just enough for ``sample_bytes``.

    So the sample depends on the documents and the seed, never on how they lie in shards.
    """
    salt = f"tokenizer-sample-{config.seed}"
    work = partial(measure, salt, scratch)
    measured = context.map(work, shards, names=[f"measure {path.stem}" for path in shards])
    keys = np.concatenate([np.array(one["keys"], np.uint64) for one in measured])
    sizes = np.concatenate([np.array(one["bytes"], np.int64) for one in measured])
    order = np.argsort(keys, kind="stable")
    enough = int(np.searchsorted(np.cumsum(sizes[order]), config.sample_bytes))
    last = keys[order[min(enough, len(order) - 1)]] if len(order) else np.uint64(0)
    drawn = [one for shard in shards for one in documents_up_to(shard, salt, last)]
    return [text for _, _, text in sorted(drawn)]


def measure(salt: str, scratch: Path, shard: Path) -> dict[str, Any]:
    """Hash of the id and bytes of text of every document in a shard."""

    def work() -> dict[str, Any]:
        keys, sizes = [], []
        for batch in read_shard(shard, ("id", "text")):
            keys += hash_ids(batch.column("id").to_pylist(), salt).tolist()
            sizes += byte_lengths(batch.column("text")).tolist()
        return {"keys": keys, "bytes": sizes}

    return once(scratch / f"{shard.stem}.json", work)


def documents_up_to(shard: Path, salt: str, last: np.uint64) -> Iterator[tuple[int, str, str]]:
    """(hash, id, text) of the documents whose hash is at most ``last``."""
    for batch in read_shard(shard, ("id", "text")):
        keys = hash_ids(batch.column("id").to_pylist(), salt)
        for row in np.flatnonzero(keys <= last):
            yield int(keys[row]), batch.column("id")[row].as_py(), batch.column("text")[row].as_py()


def train(texts: Sequence[str], config: TokenizerConfig) -> Tokenizer:
    """Learn the merges; the same texts give the same vocabulary whatever the number of threads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=config.special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def save(tokenizer: Tokenizer, config: TokenizerConfig, out: Path) -> None:
    """Write the folder that `load_tokenizer` and `transformers.AutoTokenizer` load."""
    files = {
        "special_tokens_map.json": {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, value in files.items():
        with atomic_path(out / name) as temporary:
            temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    with atomic_path(out / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary), pretty=True)


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str], enough: int = 1_000_000) -> float:
    """Bytes of UTF-8 that a token stands for, over the first texts of the sample (about ``enough`` characters)."""
    size = tokens = characters = 0
    for text in texts:
        if characters >= enough:
            break
        characters += len(text)
        size += len(text.encode())
        tokens += len(tokenizer.encode(text).ids)
    return size / max(1, tokens)


def write_report(tokenizer: Tokenizer, config: TokenizerConfig, metrics: Metrics, path: Path) -> None:
    """Write what was learnt, for a person: figures, the longest and the last entries."""
    text = f"# Tokenizer\n\nByte-level BPE with {config.vocab_size} entries, learnt from "
    text += f"{metrics['sample_documents']:.0f} documents ({human_bytes(metrics['sample_bytes'])}); "
    text += f"{metrics['sample_bytes_per_token']:.2f} bytes a token on a part of them.\n\n"
    first = BYTES + len(config.special_tokens)
    learnt = [tokenizer.decode([id]) for id in range(first, config.vocab_size)]
    text += table(
        ("entries", ""),
        [
            ("special", ", ".join(f"`{token}`" for token in config.special_tokens)),
            ("learnt first", " ".join(map(repr, learnt[:20]))),
            ("learnt last", " ".join(map(repr, learnt[-20:]))),
            (
                "longest",
                " ".join(
                    map(
                        repr,
                        sorted((one for one in learnt if one.strip()), key=lambda one: (-len(one), one))[:10],
                    )
                ),
            ),
        ],
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a stage's folder, set so that text never yields a special token.

    A document that holds the characters ``<|endoftext|>`` is encoded as these characters; to end a document,
    append `end_of_text` (tokenizer).

    Raises:
        UserError: there is none, or it can't be read.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"can't load the tokenizer {path}: {error}\nrun `llmill verify`") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of the token that ends every document."""
    id = tokenizer.token_to_id(END_OF_TEXT)
    assert id is not None, f"the vocabulary lacks {END_OF_TEXT}"
    return int(id)


def token_bytes(folder: Path) -> NDArray[np.int32]:
    """UTF-8 bytes that each token id stands for, shape (vocab_size,); 0 for special tokens.

    Every character of a byte-level entry stands for one byte.
    """
    tokenizer = load_tokenizer(folder)
    lengths = np.zeros(tokenizer.get_vocab_size(), np.int32)
    for token, id in tokenizer.get_vocab().items():
        lengths[id] = len(token)
    lengths[list(tokenizer.get_added_tokens_decoder())] = 0
    return lengths


def sha256(folder: Path) -> str:
    """Hash of ``tokenizer.json``: token shards and models carry it, so that a mix-up is noticed."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
