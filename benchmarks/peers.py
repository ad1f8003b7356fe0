"""Peers as contestants, each set up as its documentation says, for the same text and shingles.

Every function imports its peer itself: one that is not installed shows as such in the table.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.measure import Work
from benchmarks.ours import empty_folder
from data_pipeline.core.words import OPERATORS
from data_pipeline.documents import shard_paths
from data_pipeline.train_tokenizer.tokenizer import END_OF_TEXT, load_tokenizer

IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[^\W{IDEOGRAPHS}]+|[{IDEOGRAPHS}]")
"""The letters of a word as llmill takes them (combining marks and scripts other than Chinese and Japanese aside)."""
SIGNS = re.escape(OPERATORS)
BEFORE_SIGN = re.compile(rf"[^\w{SIGNS}]+(?=[{SIGNS}])")
SIGNED_WORD = re.compile(rf"(?:{WORD.pattern})[{SIGNS}]*|[{SIGNS}]+")
SHINGLE = 5
"""Words; llmill's default."""


def words_of(text: str) -> list[str]:
    """The words of a text as llmill takes them by default, each with the operators behind it (of ASCII)."""
    return SIGNED_WORD.findall(BEFORE_SIGN.sub("", text))


class Words:
    """A word tokenizer for datatrove that costs next to nothing: two regular expressions."""

    def word_tokenize(self, text: str) -> list[str]:
        return words_of(text)


class Spaces:
    """The cheapest word tokenizer for datatrove: what white space parts."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()


DATATROVE: dict[str, str] = {
    "same": "datatrove, words by two regular expressions",
    "spaces": "datatrove, split at white space",
    "whitespace": "datatrove, its WhitespaceTokenizer",
    "english": "datatrove, its English tokenizer",
}
"""Its word tokenizers; with "same" shingles are llmill's, the others follow its own normalisation."""


def daft_minhash(corpus: str, permutations: int, words: str, in_memory: bool) -> Work:
    """Text to signatures by Daft's own runner.

    ``words`` is "spaces" (as Daft's `minhash` takes them: what spaces part), "normalised" (its `normalize` first, which
    joins words that punctuation alone parts) or "same" (as llmill takes them: runs of letters, digits, underscores).
    """
    import daft
    from daft.functions import lower, minhash, normalize, regexp_replace

    text = daft.col("text")
    if words == "normalised":
        text = normalize(text, lowercase=True, remove_punct=True, white_space=True)
    elif words == "same":
        text = regexp_replace(lower(text), r"\W+", " ")
    signature = minhash(text, num_hashes=permutations, ngram_size=SHINGLE).alias("signature")
    frame = daft.read_parquet(f"{corpus}/documents-*.parquet").select("text")
    if in_memory:
        frame = frame.collect()

    def work() -> int:
        return len(frame.select(signature).collect())

    return work


def rensa_minhash(corpus: str, permutations: int) -> Work:
    """Text in memory to signatures, by rensa, which wants the shingles as strings."""
    from rensa import RMinHash

    texts = [text for path in shard_paths(Path(corpus)) for text in pq.read_table(path)["text"].to_pylist()]

    def shingles(text: str) -> list[str]:
        words = words_of(text.lower())
        return [" ".join(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1))]

    def work() -> int:
        return len(RMinHash.digests_from_token_sets(map(shingles, texts), permutations, 0))

    return work


def datatrove_signature(corpus: str, out: str, workers: int, bands: int, rows: int, tokenizer: str) -> Work:
    """Parquet shards to signature files: the first of datatrove's four steps."""
    folder = empty_folder(out)
    step = signature_step(folder, bands, rows, tokenizer)

    def work() -> None:
        run_datatrove([reader(corpus), step], len(shard_paths(Path(corpus))), workers, folder)

    return work


def signature_step(folder: Path, bands: int, rows: int, tokenizer: str) -> Any:
    """`MinhashDedupSignature` with one of the tokenizers of `DATATROVE`."""
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer

    step = MinhashDedupSignature(str(folder / "signatures"), minhash_config(bands, rows, tokenizer))
    step._hash_func = xxh64  # its own hands a string to xxhash, which refuses that from version 4 on
    if tokenizer != "english":
        own = {"same": Words, "spaces": Spaces, "whitespace": WhitespaceTokenizer}
        step.word_tokenizer = own[tokenizer]()
    return step


def xxh64(shingle: str) -> int:
    import xxhash

    return int(xxhash.xxh64_intdigest(shingle.encode()))


def minhash_config(bands: int, rows: int, tokenizer: str) -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.text import TextNormConfig

    lower_only = TextNormConfig(
        norm_whitespace=False, remove_punctuation=False, norm_unicode_diacritics=False, norm_numbers=False
    )
    norm = lower_only if tokenizer == "same" else TextNormConfig()
    return MinhashConfig(n_grams=SHINGLE, num_buckets=bands, hashes_per_bucket=rows, norm_config=norm)


def reader(corpus: str) -> Any:
    from datatrove.pipeline.readers import ParquetReader

    return ParquetReader(corpus, glob_pattern="documents-*.parquet", recursive=False)


def run_datatrove(steps: list[Any], tasks: int, workers: int, folder: Path) -> None:
    """Run one pipeline on datatrove's local executor."""
    from datatrove.executor import LocalPipelineExecutor

    name = type(steps[-1]).__name__ + type(steps[0]).__name__
    LocalPipelineExecutor(steps, tasks=tasks, workers=workers, logging_dir=str(folder / "logs" / name)).run()


def datatrove_dedup(corpus: str, out: str, workers: int, bands: int, rows: int, tokenizer: str) -> Work:
    """Document shards to document shards by datatrove's four MinHash steps."""
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.writers import ParquetWriter

    folder = empty_folder(out)
    config = minhash_config(bands, rows, tokenizer)
    sign = signature_step(folder, bands, rows, tokenizer)
    signatures, pairs, remove = (str(folder / name) for name in ("signatures", "pairs", "remove"))
    buckets = minhash.MinhashDedupBuckets(signatures, pairs, config=config)
    cluster = minhash.MinhashDedupCluster(pairs, remove, config=config)
    keep = minhash.MinhashDedupFilter(remove)
    tasks = len(shard_paths(Path(corpus)))

    def work() -> None:
        run_datatrove([reader(corpus), sign], tasks, workers, folder)
        run_datatrove([buckets], bands, workers, folder)
        run_datatrove([cluster], 1, 1, folder)
        write = ParquetWriter(str(folder / "run"), compression="zstd")
        run_datatrove([reader(corpus), keep, write], tasks, workers, folder)

    return work


def text_dedup(corpus: str, out: str, workers: int, bands: int, rows: int) -> Work:
    """Document shards to a saved data set by text-dedup's MinHash, with the faster of its two hashes."""
    from text_dedup.minhash import main

    folder = empty_folder(out)
    options = {
        "path": "parquet",
        "data_files": f"{corpus}/documents-*.parquet",
        "split": "train",
        "cache_dir": folder / "cache",
        "output": folder / "run",
        "column": "text",
        "num_proc": workers,
        "ngram": SHINGLE,
        "min_length": 1,
        "b": bands,
        "r": rows,
        "num_perm": bands * rows,
        "hash_func": "xxh3",
        "hash_bits": 64,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]

    def work() -> None:
        main.main(args=words, standalone_mode=False)

    return work


def datasets_map(corpus: str, tokenizer: str, out: str, workers: int, threads: bool) -> Work:
    """Document shards to token Parquet by `datasets.map` with `tokenizers`, batched.

    In ``workers`` processes, or in one with the ``threads`` of `tokenizers`.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = str(threads).lower()
    import datasets

    folder = empty_folder(out)
    encoder = load_tokenizer(Path(tokenizer))
    end = encoder.token_to_id(END_OF_TEXT)
    assert end is not None, "the tokenizer has no end of text"

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoder.encode_special_tokens = True  # what load_tokenizer sets, which pickling forgets
        return {"tokens": [[*one.ids, end] for one in encoder.encode_batch_fast(batch["text"])]}

    def work() -> int:
        files = [str(path) for path in shard_paths(Path(corpus))]
        loaded = datasets.load_dataset(
            "parquet",
            data_files=files,
            split="train",
            columns=["id", "text"],
            cache_dir=str(folder / "cache"),
        )
        encoded = loaded.map(
            encode, batched=True, num_proc=None if threads else workers, remove_columns=["text"]
        )
        encoded.to_parquet(str(folder / "documents-00000.parquet"))
        return len(encoded)

    return work


def datatrove_tokens(corpus: str, tokenizer: str, out: str, workers: int) -> Work:
    """Document shards to datatrove's token files, by its tokenizer step (documents not shuffled)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from datatrove.pipeline.tokens import DocumentTokenizer

    folder = empty_folder(out)
    step = DocumentTokenizer(
        str(folder / "run"), f"{tokenizer}/tokenizer.json", eos_token=END_OF_TEXT, shuffle_documents=False
    )

    def work() -> None:
        run_datatrove([reader(corpus), step], len(shard_paths(Path(corpus))), workers, folder)

    return work


def kept_ids(folder: Path) -> list[str]:
    """Ids of the documents that a contestant's removal of duplicates left."""
    if (folder / "dataset_info.json").exists():  # text-dedup's
        import datasets

        return list(datasets.load_from_disk(str(folder))["id"])
    paths = [path for path in sorted(folder.glob("*.parquet")) if path.name != "removed.parquet"]
    return [id for path in paths for id in pq.read_table(path, columns=["id"])["id"].to_pylist()]


def count_kept(folder: Path) -> int:
    """Count how many `kept_ids` there are."""
    return len(kept_ids(folder))
