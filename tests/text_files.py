"""Texts in the formats that people keep them in, as bytes of a file."""

from __future__ import annotations

import json
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

TEXTS = ["first line\nsecond", "Zürich, 東京", "third \u2028 text"]


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "n": n}).encode() + b"\n" for n, text in enumerate(texts))


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    ".jsonl": jsonl,
    ".json": lambda texts: json.dumps([{"text": text} for text in texts]).encode(),
    ".parquet": parquet,
}
