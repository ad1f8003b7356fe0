"""From a column of texts to token ids: by `gigatoken`, or by `tokenizers` where the two disagree.

`gigatoken` reads the same ``tokenizer.json`` and is tens of times faster. It reads Arrow's text buffers in place
and gives offsets and ids back as arrays, so no Python object is made for a document. A run relies on it only
after it has given the same ids as `tokenizers` for a sample of its own documents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import awkward
import gigatoken
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.documents import hash_ids, once, read_shard
from data_pipeline.tokenizer import load_tokenizer

Encoded = tuple[NDArray[np.int64], NDArray[np.uint32]]
"""Offsets (documents + 1) into ids (tokens): document i is ``ids[offsets[i] : offsets[i + 1]]``."""
Encoder = Callable[[pa.Array], Encoded]
EncoderName = Literal["gigatoken", "tokenizers"]


def load_encoder(name: EncoderName, folder: Path, *, parallel: bool = False) -> Encoder:
    """The encoder of the tokenizer in ``folder``; no text yields a special token.

    Raises:
        RuntimeError: `gigatoken` doesn't know a part of this tokenizer.
    """
    return with_gigatoken(folder, parallel) if name == "gigatoken" else with_tokenizers(folder)


def with_gigatoken(folder: Path, parallel: bool) -> Encoder:
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    description["added_tokens"] = []  # else "<|endoftext|>" written in a text would become the special token
    tokenizer = gigatoken.Tokenizer.from_json(json.dumps(description))

    def encode(texts: pa.Array) -> Encoded:
        if not len(texts):
            return empty()
        layout = awkward.to_layout(tokenizer.encode_batch(in_place(texts), parallel=parallel))
        offsets = np.asarray(layout.offsets.data).astype(np.int64)
        return offsets - offsets[0], np.asarray(layout.content.data)[offsets[0] : offsets[-1]]

    return encode


def in_place(texts: pa.Array) -> awkward.Array:
    """Arrow's strings as awkward's, sharing the buffers. (`awkward.from_arrow` makes them nullable at times,
    which `gigatoken` refuses.)
    """
    _, offsets, data = texts.buffers()
    characters = np.frombuffer(data or b"", np.uint8)
    starts = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    contents = awkward.contents
    return awkward.Array(
        contents.ListOffsetArray(
            awkward.index.Index64(starts.astype(np.int64)),
            contents.NumpyArray(characters, parameters={"__array__": "char"}),
            parameters={"__array__": "string"},
        )
    )


def with_tokenizers(folder: Path) -> Encoder:
    tokenizer = load_tokenizer(folder)

    def encode(texts: pa.Array) -> Encoded:
        if not len(texts):
            return empty()
        ids = [np.array(one.ids, np.uint32) for one in tokenizer.encode_batch_fast(texts.to_pylist())]
        return np.cumsum([0, *map(len, ids)], dtype=np.int64), np.concatenate(ids)

    return encode


def empty() -> Encoded:
    return np.zeros(1, np.int64), np.zeros(0, np.uint32)


def append_to_each(encoded: Encoded, token: int) -> Encoded:
    """Every document with ``token`` after its last."""
    offsets, ids = encoded
    documents = len(offsets) - 1
    longer = np.full(len(ids) + documents, token, np.uint32)
    document_of_token = np.repeat(np.arange(documents), np.diff(offsets))
    longer[np.arange(len(ids)) + document_of_token] = ids
    return offsets + np.arange(documents + 1), longer


@dataclass(frozen=True)
class Check:
    """Which documents are encoded both ways before a run relies on `gigatoken`."""

    tokenizer: Path
    salt: str
    last: int
    """Documents whose hash with ``salt`` is at most this."""


def choose_checked(tokenizer: Path, shards: Sequence[Path], documents: int, salt: str) -> Check:
    """A check of the documents with the smallest hashes of all, wherever they lie."""
    ids = (batch.column("id").to_pylist() for shard in shards for batch in read_shard(shard, ("id",)))
    keys = np.sort(np.concatenate([np.zeros(0, np.uint64), *(hash_ids(part, salt) for part in ids)]))
    return Check(tokenizer, salt, int(keys[:documents][-1]) if len(keys) else 0)


def check_shard(check: Check, scratch: Path, shard: Path) -> dict[str, Any]:
    """Encode a shard's share of the documents both ways; ``fault`` says how they differ (None: they don't)."""
    return once(scratch / f"{shard.stem}-check.json", lambda: {"fault": find_fault(check, shard)})


def find_fault(check: Check, shard: Path) -> str | None:
    texts = chosen_texts(shard, check)
    try:
        fast = load_encoder("gigatoken", check.tokenizer)(texts)
    except (RuntimeError, ValueError) as error:
        return f"gigatoken can't use this tokenizer: {str(error).splitlines()[0]}"
    slow = load_encoder("tokenizers", check.tokenizer)(texts)
    equal = np.array_equal(fast[0], slow[0]) and np.array_equal(fast[1], slow[1])
    return None if equal else f"gigatoken gave other ids than tokenizers in {shard.name}"


def chosen_texts(shard: Path, check: Check) -> pa.Array:
    parts = []
    for batch in read_shard(shard, ("id", "text")):
        rows = np.flatnonzero(hash_ids(batch.column("id").to_pylist(), check.salt) <= np.uint64(check.last))
        parts.append(batch.column("text").take(pa.array(rows)))
    return pa.concat_arrays(parts) if parts else pa.array([], pa.string())
