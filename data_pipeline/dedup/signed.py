"""Files of what finding duplicates needs of each document: written shard by shard, read by row or by range of keys.

For each shard there are ids, a few numbers a document, signatures, and band entries: for every band of every signature
its hash, called key, and the document's row, sorted by key. So a partition of the keys is a contiguous slice of each
shard's file, and no files are needed for shards times partitions. There are two kinds of signature: ``text`` is the
digest of the text, as one band, so that equal texts meet; ``near`` is MinHash. A row is a document's index in the whole
corpus, shard after shard; it is an address only, and no result depends on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.core.files import atomic_path, once
from data_pipeline.core.words import Signs
from data_pipeline.dedup.minhash import band_hashes, has_words, signatures
from data_pipeline.documents import byte_lengths, read_shard, save_array

Kind = Literal["text", "near"]

DOCUMENT = np.dtype([("score", "<f8"), ("bytes", "<i8")])
"""``score``: what is preferred is higher; equal ones go by id."""
DIGEST_ENTRIES = 8
"""A digest of 128 bits as a signature of 16-bit entries."""
KEYS = 1 << 64


@dataclass(frozen=True, kw_only=True)
class SignRules:
    """How documents are signed; the fields of `data_pipeline.dedup.config.DedupConfig` that matter here."""

    ngram: int
    signs: Signs
    bands: int
    rows: int
    seed: int
    prefer: str
    quality_field: str | None


def sign_shard(rules: SignRules, folder: Path, shard: Path) -> dict[str, int]:
    """Write a shard of `Signed`; returns its number of documents, bytes and entries of kind ``near``."""
    return once(folder / f"{shard.stem}.json", lambda: write_signed(rules, folder, shard))


def write_signed(rules: SignRules, folder: Path, shard: Path) -> dict[str, int]:
    columns = ("id", "text", "meta") if rules.prefer == "best" else ("id", "text")
    ids = [pa.array([], pa.string())]
    documents = [np.zeros(0, DOCUMENT)]
    digests = [np.zeros((0, DIGEST_ENTRIES), np.uint16)]
    signed = [np.zeros((0, rules.bands * rules.rows), np.uint16)]
    for batch in read_shard(shard, columns):
        texts = batch.column("text")
        one = np.empty(len(texts), DOCUMENT)
        one["bytes"] = byte_lengths(texts)
        one["score"] = scores(rules, batch, one["bytes"])
        documents.append(one)
        ids.append(batch.column("id"))
        hashed = b"".join(
            blake2b(text.as_buffer(), digest_size=2 * DIGEST_ENTRIES).digest() for text in texts
        )
        digests.append(np.frombuffer(hashed, "<u2").reshape(-1, DIGEST_ENTRIES))
        signed.append(
            signatures(
                texts,
                permutations=rules.bands * rules.rows,
                ngram=rules.ngram,
                seed=rules.seed,
                signs=rules.signs,
            )
        )
    table = np.concatenate(documents)
    save_array(folder / f"{shard.stem}-documents.npy", table)
    save_ids(folder / f"{shard.stem}-ids.arrow", pa.concat_arrays(ids))
    save_kind(folder / f"{shard.stem}-text", np.concatenate(digests), 1, np.ones(len(table), np.bool_))
    near = np.concatenate(signed)
    entries = save_kind(folder / f"{shard.stem}-near", near, rules.bands, has_words(near))
    return {"documents": len(table), "bytes": int(table["bytes"].sum()), "entries": entries}


def scores(rules: SignRules, batch: pa.RecordBatch, sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how much each document is preferred."""
    if rules.prefer == "longest":
        return sizes.astype(np.float64)
    if rules.prefer == "best":
        return np.array([quality(meta.as_py(), rules.quality_field) for meta in batch.column("meta")])
    return np.zeros(len(sizes))


def quality(meta: str | None, field: str | None) -> float:
    """Return the number under ``field`` of a document's meta; minus infinity where there is none."""
    try:
        value = json.loads(meta or "{}")[field]
        number = float(value) if isinstance(value, int | float) else -np.inf
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return -np.inf
    return -np.inf if np.isnan(number) else number


def save_ids(path: Path, ids: pa.Array) -> None:
    schema = pa.schema([("id", pa.string())])
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
    ):
        writer.write_batch(pa.record_batch([ids], schema))


def save_kind(stem: Path, signed: NDArray[np.uint16], bands: int, among: NDArray[np.bool_]) -> int:
    """Write signatures and the entries of those ``among`` them; returns how many entries there are."""
    rows = np.flatnonzero(among).astype(np.uint32)
    keys = band_hashes(signed[rows], bands, signed.shape[1] // bands).ravel()
    order = np.argsort(keys)
    save_array(stem.with_name(f"{stem.name}-signatures.npy"), signed)
    save_array(stem.with_name(f"{stem.name}-keys.npy"), keys[order])
    save_array(stem.with_name(f"{stem.name}-rows.npy"), rows[order // bands])
    return len(keys)


@dataclass(frozen=True)
class Signed:
    """Reads what `sign_shard` wrote, for all shards. Small: it travels to every task."""

    folder: Path
    stems: tuple[str, ...]
    counts: tuple[int, ...]
    """Documents of each shard."""

    @classmethod
    def of(cls, folder: Path, shards: Sequence[Path], tallies: Sequence[dict[str, int]]) -> Self:
        return cls(folder, tuple(path.stem for path in shards), tuple(one["documents"] for one in tallies))

    @property
    def documents(self) -> int:
        return sum(self.counts)

    @cached_property
    def first_row(self) -> NDArray[np.int64]:
        """Row at which each shard begins; shape (shards + 1,)."""
        return np.cumsum([0, *self.counts], dtype=np.int64)

    def by_shard(self, rows: NDArray[np.int64]) -> Iterator[tuple[str, slice, NDArray[np.int64]]]:
        """Yield ascending rows shard by shard: its stem, which of ``rows`` lie in it, and their indices in it."""
        bounds = np.searchsorted(rows, self.first_row)
        for shard in np.flatnonzero(np.diff(bounds)).tolist():
            within = slice(int(bounds[shard]), int(bounds[shard + 1]))
            yield self.stems[shard], within, rows[within] - self.first_row[shard]

    def gather(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return what file ``name`` (``documents``, ``near-signatures``, ...) holds for some ascending rows."""
        arrays = [np.load(self.folder / f"{self.stems[0]}-{name}.npy", mmap_mode="r")[:0]]
        arrays += [
            np.load(self.folder / f"{stem}-{name}.npy", mmap_mode="r")[indices]
            for stem, _, indices in self.by_shard(rows)
        ]
        return np.concatenate(arrays)

    def ids(self, rows: NDArray[np.int64]) -> pa.Array:
        """Return the ids of some ascending rows."""
        arrays = [pa.array([], pa.string())]
        for stem, _, indices in self.by_shard(rows):
            with pa.memory_map(str(self.folder / f"{stem}-ids.arrow")) as file:
                arrays.append(pa.ipc.open_file(file).get_batch(0).column(0).take(pa.array(indices)))
        return pa.concat_arrays(arrays)

    def slices(
        self, kind: Kind, low: int, high: int
    ) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        """Yield the keys from ``low`` to below ``high`` and their rows, for each shard that has any."""
        for shard, stem in enumerate(self.stems):
            keys, within = self._keys(stem, kind, low, high)
            if within.start < within.stop:
                indices = np.load(self.folder / f"{stem}-{kind}-rows.npy", mmap_mode="r")[within]
                yield np.array(keys[within]), indices.astype(np.int64) + self.first_row[shard]

    def count(self, kind: Kind, low: int, high: int) -> int:
        """Count how many entries have keys from ``low`` to below ``high``."""
        found = [self._keys(stem, kind, low, high)[1] for stem in self.stems]
        return sum(within.stop - within.start for within in found)

    def _keys(self, stem: str, kind: Kind, low: int, high: int) -> tuple[NDArray[np.uint64], slice]:
        keys = np.load(self.folder / f"{stem}-{kind}-keys.npy", mmap_mode="r")
        start = int(np.searchsorted(keys, np.uint64(low)))
        end = int(np.searchsorted(keys, np.uint64(high))) if high < KEYS else len(keys)
        return keys, slice(start, end)

    def rank(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rank some ascending rows by preference among them, from 0: the higher score, then the lower id."""
        table = pa.table({"score": self.gather("documents", rows)["score"], "id": self.ids(rows)})
        order = pc.sort_indices(table, [("score", "descending"), ("id", "ascending")]).to_numpy()
        rank = np.empty(len(rows), np.int64)
        rank[order] = np.arange(len(rows))
        return rank
