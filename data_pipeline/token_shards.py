"""Stage ``tokenize``: documents to Parquet token shards, split and shuffled by hash of their ids; and their reader.

Two passes. The first encodes each document shard and sorts its documents by hash; the second merges one range of
hashes from all of them into one token shard. Split, order and bounds depend on ids and token counts only, so the
same documents give the same token shards, however they were sharded and whatever the number of workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from data_pipeline.context import Metrics, Runtime, StageConfig, StageContext, UserError, atomic_path
from data_pipeline.documents import (
    add_up,
    byte_lengths,
    corrupt,
    hash_ids,
    once,
    read_shard,
    shard_paths,
    table,
)
from data_pipeline.encode import EncoderName, Unsupported, append_to_each, find_fault, load_encoder
from data_pipeline.tokenizer import end_of_text, load_tokenizer, sha256

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
ROW_GROUP_TOKENS = 1 << 18
HASHES = 1 << 64
TOKENIZER_KEY, TOKENS_KEY, VOCAB_KEY = b"llmill.tokenizer_sha256", b"llmill.tokens", b"llmill.vocab_size"


class TokenizeRuntime(Runtime):
    """How documents are encoded."""

    check_documents: int = Field(default=256, gt=0)
    """Documents whose ids from `gigatoken` are compared with those from `tokenizers`."""


class TokenizeConfig(StageConfig):
    """How documents are split and laid out in token shards."""

    val_fraction: float = Field(default=0.01, gt=0, lt=1)
    """Fraction of the documents (by hash of their id) that is held out."""
    shard_tokens: int = Field(default=1 << 26, gt=0)
    """Tokens in a shard, about."""
    seed: int = Field(default=0, ge=0)
    """Decides split, order and which documents are compared."""
    runtime: TokenizeRuntime = TokenizeRuntime()


@dataclass(frozen=True)
class Encoding:
    """What encodes a shard: passed to the workers."""

    config: TokenizeConfig
    tokenizer: Path
    encoder: EncoderName
    last_checked: int
    """Documents whose hash is at most this are encoded both ways, where ``encoder`` is `gigatoken`."""
    scratch: Path
    parallel: bool


def tokenize(config: TokenizeConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Encode ``inputs["dedup"]`` with ``inputs["train_tokenizer"]`` into ``train-*`` and ``val-*`` token shards.

    Raises:
        UserError: no document falls into one of the splits.
    """
    shards = shard_paths(inputs["dedup"])
    names = [path.stem for path in shards]
    scratch = out / "scratch"
    steps = 2 * len(shards)
    context.progress(0, steps, "shards")
    last = last_checked(shards, config)
    encoding = Encoding(
        config, inputs["train_tokenizer"], "gigatoken", last, scratch, parallel=context.workers == 1
    )
    tallies = context.map(partial(encode_shard, encoding), shards, names=[f"encode {name}" for name in names])
    faults = [tally["fault"] for tally in tallies if tally["fault"]]
    if faults:
        context.note(f"encoding with tokenizers (slower): {faults[0]}", warning=True)
        encoding = replace(encoding, encoder="tokenizers")
        tallies = context.map(
            partial(encode_shard, encoding), shards, names=[f"encode {name}" for name in names]
        )
    context.progress(len(shards), steps, "shards")
    plan = plan_shards(config, tallies)
    merging = Merging(inputs["train_tokenizer"], out, tuple(piece_stem(encoding, path) for path in shards))
    context.map(partial(merge, merging), plan, names=[f"write {item.name}" for item in plan])
    context.progress(steps, steps, "shards")
    return summarise(tallies, faults, len(plan), out / "report.md")


def last_checked(shards: Sequence[Path], config: TokenizeConfig) -> int:
    """The hash up to which ``runtime.check_documents`` lie, of all documents, whatever shard they are in."""
    ids = (batch.column("id").to_pylist() for shard in shards for batch in read_shard(shard, ("id",)))
    keys = [hash_ids(part, f"check-{config.seed}") for part in ids]
    smallest = np.sort(np.concatenate([np.zeros(0, np.uint64), *keys]))[: config.runtime.check_documents]
    return int(smallest[-1]) if len(smallest) else 0


def piece_stem(encoding: Encoding, shard: Path) -> Path:
    """How the scratch files of a document shard begin."""
    return encoding.scratch / f"{shard.stem}-{encoding.encoder}"


def encode_shard(encoding: Encoding, shard: Path) -> dict[str, Any]:
    """Encode one document shard into a scratch file for each split, sorted by hash.

    Returns its tally; ``fault`` in it says why `gigatoken` must not be used, and is None where it may.
    """

    def work() -> dict[str, Any]:
        try:
            return write_encoded(encoding, shard)
        except Unsupported as error:
            return {"fault": str(error)}

    return once(piece_stem(encoding, shard).with_suffix(".json"), work)


def write_encoded(encoding: Encoding, shard: Path) -> dict[str, Any]:
    encode = load_encoder(encoding.encoder, encoding.tokenizer, parallel=encoding.parallel)
    slow = load_encoder("tokenizers", encoding.tokenizer)
    tokenizer = load_tokenizer(encoding.tokenizer)
    schema = piece_schema(tokenizer.get_vocab_size())
    fault = None
    config = encoding.config
    pieces: dict[Split, list[pa.RecordBatch]] = {split: [] for split in SPLITS}
    tally = {name: Counter[str]() for name in ("documents", "tokens", "bytes", "source_tokens")}
    for batch in read_shard(shard, ("id", "text", "source")):
        ids, texts = batch.column("id").to_pylist(), batch.column("text")
        if encoding.encoder == "gigatoken" and not fault:
            checked = hash_ids(ids, f"check-{config.seed}") <= np.uint64(encoding.last_checked)
            fault = find_fault(texts.filter(pa.array(checked)), encode, slow)
        offsets, tokens = append_to_each(encode(texts), end_of_text(tokenizer))
        lists = pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), pa.array(tokens, schema.field("tokens").type.value_type)
        )
        keys = pa.array(hash_ids(ids, f"order-{config.seed}"))
        rows = pa.record_batch([batch.column("id"), keys, lists], schema)
        held_out = hash_ids(ids, f"split-{config.seed}") < np.uint64(config.val_fraction * HASHES)
        lengths, sizes = np.diff(offsets), byte_lengths(texts)
        for split, mask in zip(SPLITS, (~held_out, held_out), strict=True):
            pieces[split].append(rows.filter(pa.array(mask)))
            tally["documents"][split] += int(mask.sum())
            tally["tokens"][split] += int(lengths[mask].sum())
            tally["bytes"][split] += int(sizes[mask].sum())
        sources = batch.column("source").to_numpy(zero_copy_only=False)
        for source in np.unique(sources):
            tally["source_tokens"][str(source)] += int(lengths[sources == source].sum())
    for split, batches in pieces.items():
        write_piece(pa.Table.from_batches(batches, schema), piece_path(piece_stem(encoding, shard), split))
    return {"fault": fault, **{name: dict(counts) for name, counts in tally.items()}}


def piece_schema(vocab_size: int) -> pa.Schema:
    """Rows of a scratch file: id, hash, tokens (two bytes each where the vocabulary allows)."""
    width = pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()
    return pa.schema([("id", pa.string()), ("key", pa.uint64()), ("tokens", pa.list_(width))])


def piece_path(stem: Path, split: Split) -> Path:
    return stem.with_name(f"{stem.name}-{split}.arrow")


def write_piece(rows: pa.Table, path: Path) -> None:
    """Write a shard's rows of one split as one record batch, sorted by hash."""
    rows = rows.sort_by([("key", "ascending"), ("id", "ascending")]).combine_chunks()
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, rows.schema) as writer,
    ):
        writer.write_table(rows)


@dataclass(frozen=True)
class TokenShard:
    """One token shard to be written: the documents of a split with a hash in [first, last]."""

    split: Split
    number: int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


def plan_shards(config: TokenizeConfig, tallies: Sequence[Mapping[str, Any]]) -> list[TokenShard]:
    """Cut the range of hashes so that a shard holds about ``shard_tokens``.

    Raises:
        UserError: a split is empty.
    """
    tokens = add_up(tally["tokens"] for tally in tallies)
    documents = sum(add_up(tally["documents"] for tally in tallies).values())
    plan = []
    for split in SPLITS:
        if not tokens.get(split):
            more = "raise" if split == "val" else "lower"
            raise UserError(
                f"none of the {documents} documents fell into the {split} split: {more} tokenize.val_fraction "
                f"(now {config.val_fraction}), or cut the text into more documents (a local source's split_chars)"
            )
        count = -(-tokens[split] // config.shard_tokens)
        bounds = [HASHES * part // count for part in range(count + 1)]
        plan += [TokenShard(split, n, bounds[n], bounds[n + 1] - 1) for n in range(count)]
    return plan


@dataclass(frozen=True)
class Merging:
    """What writes a token shard: passed to the workers."""

    tokenizer: Path
    out: Path
    pieces: tuple[Path, ...]
    """How the scratch files of each document shard begin."""


def merge(merging: Merging, item: TokenShard) -> None:
    """Write one token shard, unless it is there, from the scratch files of all document shards."""
    path = merging.out / f"{item.name}.parquet"
    if path.exists():
        return
    parts = [slice_piece(piece_path(stem, item.split), item) for stem in merging.pieces]
    rows = pa.concat_tables(parts).sort_by([("key", "ascending"), ("id", "ascending")]).drop_columns("key")
    lengths = pc.list_value_length(rows.column("tokens")).to_numpy().astype(np.int64)
    metadata = {
        TOKENIZER_KEY: sha256(merging.tokenizer),
        TOKENS_KEY: str(lengths.sum()),
        VOCAB_KEY: str(load_tokenizer(merging.tokenizer).get_vocab_size()),
    }
    schema = rows.schema.with_metadata(metadata)
    # Ids and tokens hardly repeat within a page: a dictionary would only cost time.
    options = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:
        group = (np.cumsum(lengths) - lengths) // ROW_GROUP_TOKENS
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(lengths)], strict=True):
            writer.write_table(rows.slice(start, end - start).combine_chunks())


def slice_piece(path: Path, item: TokenShard) -> pa.Table:
    """The rows of a scratch file that belong into a token shard, memory-mapped."""
    with pa.memory_map(str(path)) as file:  # what was read of it stays mapped
        rows = pa.ipc.open_file(file).read_all()
    keys = rows.column("key").to_numpy()
    start = int(np.searchsorted(keys, np.uint64(item.first), side="left"))
    end = int(np.searchsorted(keys, np.uint64(item.last), side="right"))
    return rows.slice(start, end - start)


def summarise(
    tallies: Sequence[Mapping[str, Any]], faults: Sequence[str], shards: int, report: Path
) -> Metrics:
    """Write the report and return the metrics."""
    documents, tokens, sizes, by_source = (
        add_up(tally[name] for tally in tallies) for name in ("documents", "tokens", "bytes", "source_tokens")
    )
    per_token = {split: sizes[split] / (tokens[split] - documents[split]) for split in SPLITS}
    text = "# Tokenize\n\n" + table(
        ("split", "documents", "tokens", "bytes a token"),
        [(split, documents[split], tokens[split], f"{per_token[split]:.3f}") for split in SPLITS],
    )
    text += "\n" + table(("source", "tokens"), by_source.items())
    text += "\nEncoded with " + (
        f"`tokenizers`. **Warning**: not with `gigatoken`, since {faults[0]}.\n"
        if faults
        else "`gigatoken`.\n"
    )
    with atomic_path(report) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return {
        "documents": float(sum(documents.values())),
        "train_tokens": float(tokens["train"]),
        "val_tokens": float(tokens["val"]),
        "bytes_per_token": sum(sizes.values()) / (sum(tokens.values()) - sum(documents.values())),
        "shards": float(shards),
    }


@dataclass(frozen=True)
class TokenBatch:
    """Documents of one row group: document i is ``tokens[offsets[i] : offsets[i + 1]]`` and has ``ids[i]``."""

    ids: list[str]
    offsets: NDArray[np.int64]
    """Shape (documents + 1,), beginning with 0."""
    tokens: NDArray[np.unsignedinteger[Any]]
    """Shape (tokens,), uint16 or uint32; every document ends with end-of-text."""


class TokenShards:
    """The token shards of one split in a folder, in their order.

    Raises:
        UserError: there are none, one is corrupt, or they come from different tokenizers.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        self.paths = shard_paths(folder, split)
        heads = [self._head(path) for path in self.paths]
        if len({(head[TOKENIZER_KEY], head[VOCAB_KEY]) for head in heads}) != 1:
            raise UserError(
                f"the {split} shards in {folder} come from different tokenizers; build them again"
            )
        self.tokenizer_sha256 = heads[0][TOKENIZER_KEY].decode()
        self.vocab_size = int(heads[0][VOCAB_KEY])
        self.tokens = sum(int(head[TOKENS_KEY]) for head in heads)

    @staticmethod
    def _head(path: Path) -> Mapping[bytes, bytes]:
        try:
            head = pq.read_schema(path).metadata or {}
        except (pa.ArrowException, OSError) as error:
            raise corrupt(path, error) from error
        if missing := {TOKENIZER_KEY, TOKENS_KEY, VOCAB_KEY} - set(head):
            raise corrupt(path, ValueError(f"no token shard: its metadata lacks {sorted(missing)}"))
        return head

    def __iter__(self) -> Iterator[TokenBatch]:
        """The row groups of all shards, in order."""
        for path in self.paths:
            for batch in read_shard(path):
                lists = batch.column("tokens")
                offsets = lists.offsets.to_numpy().astype(np.int64)
                tokens = lists.values.to_numpy()[offsets[0] : offsets[-1]]
                yield TokenBatch(batch.column("id").to_pylist(), offsets - offsets[0], tokens)

    def read_all(self) -> NDArray[np.unsignedinteger[Any]]:
        """All tokens of the split in one array, shape (tokens,), uint16 or uint32."""
        width: type[np.uint16] | type[np.uint32] = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        flat: NDArray[np.unsignedinteger[Any]] = np.empty(self.tokens, width)
        end = 0
        for batch in self:
            flat[end : end + len(batch.tokens)] = batch.tokens
            end += len(batch.tokens)
        assert end == self.tokens, f"{end} tokens in the row groups, {self.tokens} in the metadata"
        return flat
