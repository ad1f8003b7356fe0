"""Stage ``tokenize``: documents to token shards, split and shuffled by hash of their ids.

Two passes. The first encodes each document shard into a run sorted by hash; the second merges one range of hashes from
all runs into one token shard, as Parquet and flat (`data_pipeline.tokenize.flat`). Split, order and bounds depend on
ids and token counts only, so the same documents give the same token shards, however they were sharded and whatever the
number of workers. Memory is bounded by `RUN_BYTES` and a row group of documents in the first pass, and by
``shard_tokens`` in the second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import once
from data_pipeline.core.text import human_bytes
from data_pipeline.documents import add_up, count_rows, read_shard, shard_paths
from data_pipeline.hashing import HASHES, hash_column, mix
from data_pipeline.sorted_runs import SortedRuns, gather, pack, write_run
from data_pipeline.stage import Metrics, Runtime, StageConfig, StageContext
from data_pipeline.tokenize.encode import (
    Encoder,
    EncoderName,
    Unsupported,
    append_to_each,
    find_fault,
    kept_encoder,
)
from data_pipeline.tokenize.flat import Vocabulary
from data_pipeline.tokenize.merge import Merging, TokenShard, merge
from data_pipeline.tokenize.report import COUNTS, Split, count, summarise
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer, sha256, vocab_size

FOOTERS_AT_ONCE = 16
WORKER_BYTES = 400_000_000
"""Bytes a worker holds beside the tokens of a shard: libraries, the encoder with its cache, a run to be sorted."""
CHECK = np.uint64(0xA0761D6478BD642F)
"""Makes the documents to be compared others than those that come first in the order."""


class TokenizeRuntime(Runtime):
    """How documents are encoded."""

    check_documents: int = Field(default=256, gt=0)
    """Documents, about, whose ids from `gigatoken` are compared with those from `tokenizers`."""


class TokenizeConfig(StageConfig):
    """How documents are split and laid out in token shards."""

    val_fraction: float = Field(default=0.01, gt=0, lt=1)
    """Fraction of the documents (by hash of their id) that is held out."""
    shard_tokens: int = Field(default=1 << 26, gt=0, le=1 << 30)
    """Tokens in a shard, about; a worker holds them in memory while it writes the shard."""
    seed: int = Field(default=0, ge=0)
    """Decides split, order and which documents are compared."""
    runtime: TokenizeRuntime = TokenizeRuntime()

    @property
    def held_out(self) -> int:
        """Documents whose hash is below this are held out."""
        return round(self.val_fraction * HASHES)

    @property
    def salt(self) -> str:
        """Salt of the hash of ids that decides split and order."""
        return f"tokenize-{self.seed}"

    def first_keys(self, split: Split, shards: int) -> list[int]:
        """Return the smallest hash of each of a split's ``shards`` shards, and last what the hashes of all are
        below."""
        first, end = (0, self.held_out) if split == "val" else (self.held_out, HASHES)
        return [first + (end - first) * index // shards for index in range(shards + 1)]

    def predict(self, metrics: Mapping[str, float], workers: int) -> list[str]:
        """Memory, which depends on the config only: measured were 0.31 to 0.48 GB a worker at the default."""
        worker = WORKER_BYTES + 4 * self.shard_tokens
        return [
            f"{human_bytes(workers * worker)} of memory at most, about ({human_bytes(worker)} for each of {workers} "
            "workers), whatever the size of the corpus; scratch on disk: about half the bytes of the text"
        ]


@dataclass(frozen=True)
class Encoding:
    """Task that encodes a shard: passed to the workers."""

    config: TokenizeConfig
    folder: Path
    vocabulary: Vocabulary
    end: int
    """The token that ends every document."""
    encoder: EncoderName
    checked: int
    """Documents whose mixed hash is below this are encoded both ways, where ``encoder`` is `gigatoken`."""
    scratch: Path
    parallel: bool

    def load(self, encoder: EncoderName) -> Encoder:
        return kept_encoder(encoder, self.folder, self.parallel, self.vocabulary.tokenizer_sha256)

    def name(self, shard: Path) -> str:
        """Return the name of the run that a document shard becomes."""
        return f"{shard.stem}-{self.encoder}"


def tokenize(config: TokenizeConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Encode ``inputs["documents"]`` with ``inputs["tokenizer"]`` into ``train-*`` and ``val-*`` token shards, and
    their flat files.

    Raises:
        UserError: no document falls into one of the splits.
    """
    shards = shard_paths(inputs["documents"])
    context.progress(0, 2 * len(shards), "shards")
    encoding = prepare(config, inputs["tokenizer"], shards, out / "scratch", context)
    tallies = encode_all(encoding, shards, context)
    faults = [tally["fault"] for tally in tallies if tally["fault"]]
    if faults:
        context.note(f"encoding with tokenizers (slower): {faults[0]}", warning=True)
        encoding = replace(encoding, encoder="tokenizers")
        tallies = encode_all(encoding, shards, context)
    context.progress(len(shards), 2 * len(shards), "shards")
    plan = plan_shards(config, tallies)
    write_all(encoding, shards, plan, out, context)
    context.progress(2 * len(shards), 2 * len(shards), "shards")
    return summarise(tallies, faults, len(plan), out / "report.md")


def prepare(
    config: TokenizeConfig, folder: Path, shards: Sequence[Path], scratch: Path, context: StageContext
) -> Encoding:
    tokenizer = load_tokenizer(folder)
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        documents = sum(pool.map(count_rows, shards))
    return Encoding(
        config=config,
        folder=folder,
        vocabulary=Vocabulary(sha256(folder), vocab_size(tokenizer)),
        end=end_of_text(tokenizer),
        encoder="gigatoken",
        checked=min(HASHES - 1, HASHES * config.runtime.check_documents // max(1, documents)),
        scratch=scratch,
        parallel=context.workers == 1,
    )


def encode_all(encoding: Encoding, shards: Sequence[Path], context: StageContext) -> list[dict[str, Any]]:
    names = [f"encode {path.stem}" for path in shards]
    return context.map(partial(encode_shard, encoding), shards, names=names)


def encode_shard(encoding: Encoding, shard: Path) -> dict[str, Any]:
    """Encode one document shard into a sorted run.

    Returns its tally; ``fault`` in it is why `gigatoken` must not be used, and is None where it may.
    """

    def work() -> dict[str, Any]:
        try:
            return encode_into_run(encoding, shard)
        except Unsupported as error:
            return {"fault": str(error)}

    return once(encoding.scratch / f"{encoding.name(shard)}.json", work)


def encode_into_run(encoding: Encoding, shard: Path) -> dict[str, Any]:
    encode = encoding.load(encoding.encoder)
    tally: dict[str, Counter[str]] = {name: Counter() for name in COUNTS}
    fault = None
    with write_run(SortedRuns(encoding.scratch, ()).path(encoding.name(shard), 0)) as run:
        for batch in read_shard(shard, ("id", "text", "source")):
            ids, texts, sources = (batch.column(name) for name in ("id", "text", "source"))
            keys = hash_column(ids, encoding.config.salt)
            if encoding.encoder == "gigatoken" and not fault:
                checked = texts.filter(pa.array(mix(keys ^ CHECK) < np.uint64(encoding.checked)))
                fault = find_fault(checked, encode, encoding.load("tokenizers"))
            offsets, tokens = encode(texts)
            count(tally, keys < np.uint64(encoding.config.held_out), sources, np.diff(offsets), texts)
            ended = append_to_each((offsets, tokens.astype(encoding.vocabulary.token_type)), encoding.end)
            run.add(ids, keys, pack(*ended))
    return {"fault": fault, **{name: dict(counts) for name, counts in tally.items()}}


def plan_shards(config: TokenizeConfig, tallies: Sequence[Mapping[str, Any]]) -> list[TokenShard]:
    """Cut the range of hashes so that a shard holds about ``shard_tokens``, or one document where those are longer.

    Raises:
        UserError: a split is empty.
    """
    documents, tokens = (add_up(tally[f"split_{of}"] for tally in tallies) for of in ("documents", "tokens"))
    plan = []
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        if not documents.get(split):
            more = "raise" if split == "val" else "lower"
            raise UserError(
                f"none of the {sum(documents.values())} documents fell into the {split} split: {more} "
                f"tokenize.val_fraction (now {config.val_fraction}), or cut the text into more documents "
                "(a local source's split_chars)"
            )
        shards = min(documents[split], -(-(tokens[split] + documents[split]) // config.shard_tokens))
        firsts = config.first_keys(split, shards)
        plan += [
            TokenShard(f"{split}-{index:05d}", firsts[index], firsts[index + 1] - 1)
            for index in range(shards)
        ]
    return plan


def write_all(
    encoding: Encoding, shards: Sequence[Path], plan: Sequence[TokenShard], out: Path, context: StageContext
) -> None:
    """Merge the runs of all document shards into the token shards that are planned."""
    runs = SortedRuns(encoding.scratch, tuple(encoding.name(path) for path in shards))
    merging = Merging(runs=gather(runs, context), out=out, vocabulary=encoding.vocabulary, end=encoding.end)
    context.map(partial(merge, merging), plan, names=[f"write {item.name}" for item in plan])
