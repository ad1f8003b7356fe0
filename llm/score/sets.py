"""Fixed sets of texts, scored document by document."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from llm.data.bits import bits_per_byte
from llm.score.config import SetConfig
from llm.score.documents import Document, text_nats, token_nats
from llm.score.replicas import Replicas

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
TOKENS = pa.schema(
    [
        ("set", pa.string()),
        ("id", pa.string()),
        ("text", pa.string()),
        ("token_bytes", pa.list_(pa.int32())),
        ("token_nats", pa.list_(pa.float32())),
    ]
)
"""Columns of a document token by token, so that where in a text a model is good can be seen: the bytes of the text that
each stands for, and its loss by windows that don't overlap. Null where the tokenizer changes the text."""
Text = tuple[str, str]
"""Id and text."""


@dataclass(frozen=True)
class PreparedSet:
    """The texts of a set that are scored, and their tokens."""

    chosen: SetConfig
    texts: Sequence[Text]
    documents: Sequence[Document]

    @classmethod
    def of(cls, chosen: SetConfig, file: PinnedFile, tokenizer: Tokenizer) -> PreparedSet:
        """Read and tokenize the texts.

        Raises:
            UserError: the file can't be read, or has no text.
        """
        texts = first_texts(chosen, file)
        encodings = tokenizer.encode_batch([text for _, text in texts])
        documents = [
            (name, np.array(encoding.ids, np.int64))
            for (name, _), encoding in zip(texts, encodings, strict=True)
        ]
        return cls(chosen, texts, documents)


def run_set(
    replicas: Replicas,
    prepared: PreparedSet,
    *,
    end: int,
    sizes: NDArray[np.int32],
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Score a model on a set; return a row a document, in the order of its file, with the columns of `DOCUMENTS` and
    `TOKENS`.

    Bytes are those of the text itself, whatever a tokenizer makes of it: so they are the same for every model.

    Args:
        end: the token that stands before each document.
        sizes: bytes that each token stands for.
        progress: called with the tokens scored and those there are.
    """
    chosen, texts, documents = prepared.chosen, prepared.texts, prepared.documents

    def nats(stride: int | None) -> list[NDArray[np.float32]]:
        return token_nats(replicas, documents, end=end, stride=stride, progress=progress)

    scored = nats(None)
    sliding = nats(chosen.stride) if chosen.stride else [None] * len(documents)
    rows = []
    for (name, text), (_, tokens), losses, other in zip(texts, documents, scored, sliding, strict=True):
        size, parts = len(text.encode()), sizes[tokens]
        as_it_is, loss = int(parts.sum()) == size, text_nats(losses, parts)
        rows.append(
            {
                "set": chosen.name,
                "id": name,
                "bytes": size,
                "tokens": len(tokens),
                "text_nats": loss,
                "bits_per_byte": bits_per_byte(loss, size),
                "sliding_nats": None if other is None else text_nats(other, parts),
                "as_it_is": as_it_is,
                "text": text,
                "token_bytes": parts if as_it_is else None,
                "token_nats": losses if as_it_is else None,
            }
        )
    return rows


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
        rows = file.json_lines()
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


def parquet_rows(chosen: SetConfig, file: PinnedFile) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file: the text and, where there is one, the id."""
    try:
        found = pq.ParquetFile(io.BytesIO(file.read()))
        columns = [name for name in ("id", chosen.text) if name in found.schema_arrow.names]
        for batch in found.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{file.path} can't be read: {first_line(error)}") from None
