"""Fixed sets of texts, scored document by document."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import PinnedFile
from data_pipeline.core.text import first_line
from data_pipeline.train_tokenizer.tokenizer import end_of_text
from llm.data.bits import bits_per_byte
from llm.model.transformer import Transformer
from llm.score.config import SetConfig
from llm.score.documents import Document, score_documents

DOCUMENTS = pa.schema(
    [
        ("set", pa.string()),
        ("id", pa.string()),
        ("bytes", pa.int64()),
        ("tokens", pa.int64()),
        ("text_nats", pa.float64()),
        ("bits_per_byte", pa.float64()),
        ("sliding_nats", pa.float64()),
        ("as_it_is", pa.bool_()),
        ("seen", pa.float64()),
    ]
)
"""Columns of a document's row: ``sliding_nats`` by windows that overlap, where a stride is set; ``as_it_is``: whether
its tokens stand for just its bytes; ``seen``: share of its n-grams that stand in the training documents, null where
that was not looked for."""
Text = tuple[str, str]
"""Id and text."""


def run_set(
    model: Transformer,
    tokenizer: Tokenizer,
    chosen: SetConfig,
    *,
    file: PinnedFile,
    sizes: NDArray[np.int32],
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Score a model on a set; return a row a document, in the order of its file.

    Bytes are those of the text itself, whatever a tokenizer makes of it: so they are the same for every model.

    Args:
        sizes: bytes that each token stands for.
        progress: called with the tokens scored and those there are.

    Raises:
        UserError: the file can't be read, or has no text.
    """
    texts = first_texts(chosen, file)
    encodings = tokenizer.encode_batch([text for _, text in texts])
    documents: list[Document] = [
        (name, np.array(encoding.ids, np.int64)) for (name, _), encoding in zip(texts, encodings, strict=True)
    ]

    def scores(stride: int | None) -> list[dict[str, Any]]:
        return score_documents(
            model, documents, sizes=sizes, end=end_of_text(tokenizer), stride=stride, progress=progress
        )

    rows = scores(None)
    sliding = [row["text_nats"] for row in scores(chosen.stride)] if chosen.stride else [None] * len(rows)
    found = []
    for (name, text), row, other in zip(texts, rows, sliding, strict=True):
        size = len(text.encode())
        found.append(
            {
                "set": chosen.name,
                "id": name,
                "bytes": size,
                "tokens": row["tokens"],
                "text_nats": row["text_nats"],
                "bits_per_byte": bits_per_byte(row["text_nats"], size),
                "sliding_nats": other,
                "as_it_is": row["bytes"] == size,
            }
        )
    return found


def first_texts(chosen: SetConfig, file: PinnedFile) -> list[Text]:
    """Return the texts of a set that are scored.

    Raises:
        UserError: there is none, or a row has no text.
    """
    texts = list(islice(read_texts(chosen, file), chosen.max_documents))
    if not texts:
        raise UserError(f"{file.path}: the set {chosen.name} has no text")
    return texts


def read_texts(chosen: SetConfig, file: PinnedFile) -> Iterator[Text]:
    """Yield the texts of a set with their ids, empty ones left out.

    Raises:
        UserError: a row has no text.
    """
    name = file.path.name.removesuffix(".gz")
    if name.endswith(".txt"):
        rows: Iterator[tuple[int, Any]] = iter([(1, {chosen.text: file.text()})])
    elif name.endswith(".parquet"):
        rows = enumerate(parquet_rows(chosen, file), 1)
    elif name.endswith((".jsonl", ".json", ".ndjson")):
        rows = json_rows(file)
    else:
        raise UserError(f"{file.path}: a set is a file of .jsonl, .parquet or .txt")
    for number, row in rows:
        text = row.get(chosen.text) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{file.path}, row {number}: it has no text in the field {chosen.text}")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{file.path}, row {number}: half of a surrogate pair is no text")
        if text:
            yield str(row.get("id") or f"{chosen.name}/{number}"), text


def json_rows(file: PinnedFile) -> Iterator[tuple[int, Any]]:
    """Yield the objects of JSON lines with the lines' numbers."""
    for number, line in enumerate(file.text().split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file.path}, line {number}: no JSON: {error}") from None


def parquet_rows(chosen: SetConfig, file: PinnedFile) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file: the text and, where there is one, the id."""
    try:
        found = pq.ParquetFile(io.BytesIO(file.read()))
        columns = [name for name in ("id", chosen.text) if name in found.schema_arrow.names]
        for batch in found.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{file.path} can't be read: {first_line(error)}") from None
