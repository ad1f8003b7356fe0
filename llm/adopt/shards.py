"""Documents and tokens that another llmill made: their shards are copied, and every row of them is looked at."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import once
from data_pipeline.core.text import first_line
from data_pipeline.documents import SCHEMA, byte_lengths, corrupt, count_rows, read_shard
from data_pipeline.stage import Metrics, StageContext
from data_pipeline.tokenize.flat import lay_flat
from data_pipeline.tokenize.shards import TokenShards
from llm.adopt.files import Files
from llm.adopt.tokenizer import copy


def adopt_documents(files: Files, out: Path, context: StageContext) -> Metrics:
    """Copy document shards.

    Raises:
        UserError: one has other columns, or is damaged.
    """
    for path in files.values():
        require_schema(path)
    names = list(files)
    work = partial(copy_documents, out)
    tallies = context.map(work, [(name, files[name]) for name in names], names=names)
    totals = {name: float(sum(tally[name] for tally in tallies)) for name in ("documents", "bytes")}
    if not totals["documents"]:
        raise UserError(f"{next(iter(files.values())).parent} holds no document: its shards have no rows")
    return totals


def require_schema(path: Path) -> None:
    """See that a file has the columns of documents.

    Raises:
        UserError: it has others, or is no Parquet.
    """
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file: {first_line(error)}") from None
    if not schema.equals(SCHEMA, check_metadata=False):
        has = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise UserError(
            f"{path} has the columns {has}; documents have id, text, source and meta, all of type string:\n"
            "read it with a source of `download` (kind: local), which takes any columns"
        )


def copy_documents(out: Path, item: tuple[str, Path]) -> dict[str, Any]:
    """Copy one shard and count what is in it."""
    name, path = item

    def work() -> dict[str, Any]:
        copy({name: path}, out)
        counts = {"documents": 0, "bytes": 0}
        for batch in read_shard(out / name):
            require_rows(batch, path)
            counts["documents"] += batch.num_rows
            counts["bytes"] += int(byte_lengths(batch.column("text")).sum())
        return counts

    return once(out / "scratch" / f"{name}.json", work)


def require_rows(batch: pa.RecordBatch, path: Path) -> None:
    """See that rows are whole, and their texts UTF-8.

    Raises:
        UserError: they are not.
    """
    if empty := [name for name in SCHEMA.names if batch.column(name).null_count]:
        raise UserError(f"{path} has rows without {', '.join(empty)}:\nfill them in, or leave those rows out")
    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        raise corrupt(path, error) from None


def adopt_tokens(files: Files, out: Path, context: StageContext) -> Metrics:
    """Copy token shards.

    Raises:
        UserError: they are damaged, or of several tokenizers.
    """
    names = list(files)
    context.map(partial(copy_shard, out), [(name, files[name]) for name in names], names=names)
    train, held_out = TokenShards(out, "train"), TokenShards(out, "val")
    if (train.tokenizer_sha256, train.vocab_size) != (held_out.tokenizer_sha256, held_out.vocab_size):
        raise UserError("the train and val shards come from different tokenizers:\nadopt those of one step")
    try:
        lay_flat(out, last_token(train), context)
    except AssertionError as error:  # which a fault of ours would be, of shards that we made
        raise UserError(
            f"{first_line(error)}: tokens made elsewhere must end each document with one token"
        ) from None
    return {
        "documents": float(sum(map(count_rows, [*train.paths, *held_out.paths]))),
        "train_tokens": float(train.tokens),
        "val_tokens": float(held_out.tokens),
        "vocab_size": float(train.vocab_size),
    }


def last_token(shards: TokenShards) -> int:
    """Return the token at the end of the first document: that which ends them all.

    Raises:
        UserError: there is none.
    """
    batch = next((one for one in shards if len(one.ids)), None)
    if batch is None or batch.offsets[0] == batch.offsets[1]:
        raise UserError(f"{shards.paths[0].parent} holds no training document, or its first has no token")
    return int(batch.tokens[batch.offsets[1] - 1])


def copy_shard(out: Path, item: tuple[str, Path]) -> None:
    """Copy one token shard, and read it through."""
    name, path = item
    try:
        columns = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file: {first_line(error)}") from None
    if columns != ["id", "tokens"]:
        raise UserError(f"{path} has the columns {', '.join(columns)}; token shards have id and tokens")
    copy({name: path}, out)
    for _ in read_shard(out / name):
        pass
