"""Stage ``train_tokenizer``: learn a byte-level BPE vocabulary from a sample of the documents.

There is no normaliser and every byte is in the alphabet, so decoding gives back exactly the text that was encoded.
Learning from a word costs the square of its length, so words are cut after `LONGEST_WORD` characters for it; encoding
costs no more for a long word than for a short one, and cuts none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path, once
from data_pipeline.core.processes import compute_apart
from data_pipeline.core.text import human_bytes, table
from data_pipeline.documents import byte_lengths, corrupt, shard_paths
from data_pipeline.hashing import HASHES, hash_column
from data_pipeline.sorted_runs import SortedRuns, gather, order_of, write_run
from data_pipeline.stage import Metrics, Runtime, StageConfig, StageContext
from data_pipeline.train_tokenizer.long_runs import longest_runs
from data_pipeline.train_tokenizer.tokenizer import END_OF_TEXT, load_tokenizer

BYTES = 256
"""Entries that every byte-level vocabulary begins with."""
MARGIN = 1.25
"""How much more than the sample is looked at first, since sizes of documents vary."""
FOOTERS_AT_ONCE = 16
LONGEST_WORD = 256
"""Characters of a word after which it is cut while the vocabulary is learnt: no word that people read is as long."""
MARKED_CASES = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": "|".join(rf"[^\r\n\p{{L}}\p{{N}}]?{one}(?i:'s|'t|'re|'ve|'m|'ll|'d)?" for one in MARKED_CASES)
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""How text is cut before merging: the patterns of GPT-2, of GPT-4 and of GPT-4o (OpenAI's tiktoken). The first two cut
words at vowel signs and other marks, so Hindi, Thai, Tamil and others are for the third."""


class TokenizerConfig(StageConfig):
    """Size of the vocabulary, what a word is, and the sample that it is learnt from."""

    vocab_size: int = Field(default=4096, gt=BYTES)
    """Entries in all, special tokens and the 256 bytes included."""
    reserved_tokens: int = Field(default=7, ge=0)
    """Special tokens without a meaning yet (``<|reserved_0|>``, ...), for later fine-tuning."""
    pattern: str = "o200k"
    """How text is cut into words, across which nothing is merged: one of `PATTERNS` by name, or a regular expression of
    one's own in Oniguruma's syntax, by which documents are encoded more slowly."""
    sample_bytes: int = Field(default=100_000_000, gt=0)
    """Text to learn from: documents are drawn by hash of their id until this is reached."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sample."""
    runtime: Runtime = Runtime()

    @property
    def special_tokens(self) -> list[str]:
        """End-of-text first, then the reserved ones; their ids count from 0 in this order."""
        return [END_OF_TEXT, *(f"<|reserved_{number}|>" for number in range(self.reserved_tokens))]

    @property
    def split(self) -> str:
        """The regular expression that `pattern` stands for."""
        return PATTERNS.get(self.pattern, self.pattern)

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Return what cuts text before merging."""
        return byte_level(split(self.split))

    @field_validator("pattern")
    @classmethod
    def _pattern_is_known(cls, pattern: str) -> str:
        if pattern not in PATTERNS:
            if re.fullmatch(r"[\w-]*", pattern):  # as a regular expression it would find itself only
                raise ValueError(f"{pattern!r} is neither of {', '.join(PATTERNS)}, nor a regular expression")
            try:
                Regex(pattern)
            except Exception as error:  # tokenizers raises bare Exception
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern

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
    """Train on a sample of ``inputs["documents"]``; writes ``tokenizer.json`` and what `transformers` wants beside it.

    Raises:
        UserError: the text gives fewer entries than ``vocab_size``.
    """
    shards = shard_paths(inputs["documents"])
    context.progress(0, None, "MB")
    texts = draw_sample(config, shards, out / "scratch", context)
    size = int(pc.binary_length(texts).to_numpy().sum())
    context.progress(0, size / 1e6, "MB")
    sample = out / "scratch" / "sample.arrow"
    save_sample(texts, sample)
    compute_apart(learn, config, sample, out)
    tokenizer = load_tokenizer(out)
    context.progress(size / 1e6, size / 1e6, "MB")
    cut = long_words(tokenizer, texts)
    if cut:
        context.note(
            f"{cut:,} words of more than {LONGEST_WORD} characters were cut after each {LONGEST_WORD} for learning"
        )
    if tokenizer.get_vocab_size() < config.vocab_size:
        raise UserError(
            f"{human_bytes(size)} of text support a vocabulary of {tokenizer.get_vocab_size()} entries, not "
            f"{config.vocab_size}: lower train_tokenizer.vocab_size, or give more text"
        )
    metrics = {
        "vocab_size": float(tokenizer.get_vocab_size()),
        "sample_documents": float(len(texts)),
        "sample_bytes": float(size),
        "sample_bytes_per_token": bytes_per_token(tokenizer, strings(texts)),
        "long_words": float(cut),
    }
    write_report(tokenizer, config, metrics, out / "report.md")
    return metrics


def draw_sample(
    config: TokenizerConfig, shards: Sequence[Path], scratch: Path, context: StageContext
) -> pa.Array:
    """Return texts of the documents with the smallest hashes, in order of hash, just enough for ``sample_bytes``.

    So the sample depends on the documents and the seed, never on how they lie in shards. The footers show about which
    hashes to look at; of row groups without one of these, no text is read. Held in memory are `MARGIN` times
    ``sample_bytes`` and the sample.
    """
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        size = sum(pool.map(text_size, shards))
    last = min(HASHES - 1, int(MARGIN * HASHES * config.sample_bytes / max(1, size)))
    while True:
        work = partial(draw, f"tokenizer-sample-{config.seed}", last, scratch)
        drawn = context.map(work, shards, names=[f"sample {path.stem}" for path in shards])
        if sum(drawn) >= config.sample_bytes or last == HASHES - 1:
            break
        last = min(HASHES - 1, 2 * last + 1)
    runs = SortedRuns(scratch, tuple(sample_name(shard, last) for shard in shards))
    rows = gather(runs, context).between(0, last)
    order = order_of(rows)
    sizes = pc.binary_length(rows.column("data")).to_numpy()[order]
    enough = int(np.searchsorted(np.cumsum(sizes), config.sample_bytes)) + 1
    return rows.column("data").take(pa.array(order[:enough])).cast(pa.large_string())


def text_size(shard: Path) -> int:
    """Count the bytes of text in a shard, about, from its footer."""
    try:
        footer = pq.read_metadata(shard)
    except (pa.ArrowException, OSError) as error:
        raise corrupt(shard, error) from error
    column = footer.schema.names.index("text")
    return sum(
        footer.row_group(group).column(column).total_uncompressed_size
        for group in range(footer.num_row_groups)
    )


def sample_name(shard: Path, last: int) -> str:
    return f"{shard.stem}-{last:016x}"


def draw(salt: str, last: int, scratch: Path, shard: Path) -> int:
    """Copy a shard's documents whose hash is at most ``last`` into a sorted run; returns the bytes of their text."""
    name = sample_name(shard, last)

    def work() -> dict[str, int]:
        size = 0
        with write_run(SortedRuns(scratch, ()).path(name, 0)) as run:
            for ids, keys, texts in read_drawn(shard, salt, last):
                size += int(byte_lengths(texts).sum())
                run.add(ids, keys, texts.cast(pa.large_binary()))
        return {"bytes": size}

    return int(once(scratch / f"{name}.json", work)["bytes"])


def read_drawn(shard: Path, salt: str, last: int) -> Iterator[tuple[pa.Array, NDArray[np.uint64], pa.Array]]:
    """Ids, hashes and texts of the documents with a hash of at most ``last``, by row group.

    Raises:
        UserError: the file can't be read.
    """
    try:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:

            def column(group: int, name: str) -> pa.Array:
                return file.read_row_group(group, columns=[name], use_threads=False)[name].combine_chunks()

            for group in range(file.num_row_groups):
                ids = column(group, "id")
                keys = hash_column(ids, salt)
                drawn = keys <= np.uint64(last)
                if drawn.any():
                    chosen = pa.array(drawn)
                    yield ids.filter(chosen), keys[drawn], column(group, "text").filter(chosen)
    except (pa.ArrowException, OSError) as error:
        raise corrupt(shard, error) from error


def save_sample(texts: pa.Array, path: Path) -> None:
    """Write the sample as an Arrow file of one column, to be mapped by the process that learns from it."""
    with atomic_path(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
        batch = pa.record_batch([texts], ["text"])
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)


def learn(config: TokenizerConfig, sample: Path, out: Path) -> None:
    """Train on the sample in a file, and `save` into ``out``."""
    with pa.memory_map(str(sample)) as file:
        texts = pa.ipc.open_file(file).get_batch(0).column("text")
        save(train(strings(texts), config), config, out)


def strings(texts: pa.Array, at_once: int = 256) -> Iterator[str]:
    """Yield the texts one after the other; only a few exist as Python objects at a time."""
    for start in range(0, len(texts), at_once):
        yield from texts.slice(start, at_once).to_pylist()


def train(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Learn the merges; the same texts give the same vocabulary whatever the number of threads."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.FixedLength(length=LONGEST_WORD)
    tokenizer.pre_tokenizer = byte_level(split(config.split), cut)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=config.special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = config.pre_tokenizer()
    return tokenizer


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Return a pre-tokenizer that cuts text at each match of a regular expression, and between them."""
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def byte_level(*steps: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """Return a pre-tokenizer of some steps, then of characters that stand for bytes."""
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, by_bytes])


def long_words(tokenizer: Tokenizer, texts: pa.Array) -> int:
    """Count the words of the texts longer than `LONGEST_WORD`, where one kind of character alone is as long."""
    words = tokenizer.pre_tokenizer[0]
    found = texts.filter(pa.array(longest_runs(texts) >= LONGEST_WORD))
    return sum(
        len(word) > LONGEST_WORD for text in strings(found) for word, _ in words.pre_tokenize_str(text)
    )


def save(tokenizer: Tokenizer, config: TokenizerConfig, out: Path) -> None:
    """Write the folder that `load_tokenizer` and `transformers.AutoTokenizer` load."""
    files = {
        "special_tokens_map.json": {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # text never yields a special token, as in `load_tokenizer`
        },
    }
    for name, value in files.items():
        with atomic_path(out / name) as temporary:
            temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(out / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary), pretty=True)


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str], enough: int = 1_000_000) -> float:
    """Return bytes of UTF-8 that a token stands for, over the first texts of the sample (about ``enough``
    characters)."""
    size = tokens = characters = 0
    for text in texts:
        if characters >= enough:
            break
        characters += len(text)
        size += len(text.encode())
        tokens += len(tokenizer.encode(text).ids)
    return size / max(1, tokens)


def write_report(tokenizer: Tokenizer, config: TokenizerConfig, metrics: Metrics, path: Path) -> None:
    """Write what was learnt, for a person: metrics, the longest and the last entries."""
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
