"""From sorted runs to a token shard: the documents of a range of keys, as Parquet and flat."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.core.files import atomic_path
from data_pipeline.sorted_runs import SortedRuns, order_of, unpack
from data_pipeline.tokenize.flat import Vocabulary, is_written, write_flat

ROW_GROUP_TOKENS = 1 << 18
PARQUET = {
    "compression": "zstd",
    "use_dictionary": False,  # ids and tokens hardly repeat within a page: it would only cost time,
    "write_statistics": False,  # and so would their extremes
    # Parquet stores each token in four bytes; byte by byte they are compressed in two thirds of the time.
    "column_encoding": {"tokens.list.element": "BYTE_STREAM_SPLIT"},
}


@dataclass(frozen=True)
class TokenShard:
    """One token shard to be written: the documents with a key in [first, last]."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Merging:
    """Task that writes a token shard: passed to the workers."""

    runs: SortedRuns
    out: Path
    vocabulary: Vocabulary
    end: int
    """The token that ends every document."""


def merge(merging: Merging, item: TokenShard) -> None:
    """Write one token shard and its flat files, unless they are there; of a range without documents, empty ones.

    Holds its ids and tokens once, beside the pages that are mapped.
    """
    path = merging.out / f"{item.name}.parquet"
    if path.exists() and is_written(merging.out, item.name):
        return
    rows = merging.runs.between(item.first, item.last)
    order = order_of(rows)
    width = merging.vocabulary.token_type
    lengths = pc.binary_length(rows.column("data")).to_numpy()[order] // width.itemsize
    element = pa.from_numpy_dtype(width)
    schema = pa.schema(
        [("id", pa.string()), ("tokens", pa.list_(element))],
        metadata=merging.vocabulary.metadata(int(lengths.sum())),
    )
    group = (np.cumsum(lengths) - lengths) // ROW_GROUP_TOKENS
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, schema, write_page_checksum=True, **PARQUET) as writer,
        write_flat(merging.out, item.name, merging.vocabulary, merging.end) as flat,
    ):
        for start, end in pairwise([*starts, len(lengths)]):
            taken = rows.take(pa.array(order[start:end]))
            ids, tokens = taken.column("id").cast(pa.string()), unpack(taken.column("data"), element)
            writer.write_batch(pa.record_batch([ids, tokens], schema))
            flat.add(ids, tokens)
