"""The text that benchmarks work on: sources and documentation of the installed packages, which every machine has.

Made by llmill's own download stage, kept in the work folder. `random_part` takes less for slow peers; `variants` makes
more of it, by editing so many words that the copies are no near-duplicates.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.core.processes import cores
from data_pipeline.documents import SCHEMA, hash_ids, read_shard, shard_paths, write_shard
from data_pipeline.download.sources import InstalledPythonSource
from data_pipeline.download.stage import DownloadConfig, download
from data_pipeline.stage import LocalContext

EDITED = 0.3
"""Share of words that `variants` changes: two texts then share 0.7^5 = 17% of their 5-word shingles at most."""


def installed_text(work: Path, megabytes: float) -> Path:
    """Document shards with the text of the installed packages, ``megabytes`` of it or what there is."""
    source = InstalledPythonSource(name="python", max_bytes=int(megabytes * 1e6))

    def build(out: Path) -> None:
        download(DownloadConfig(sources=(source,)), {}, out, LocalContext(cores()))
        shutil.rmtree(out / "scratch", ignore_errors=True)

    return kept(work / f"text-{megabytes:g}", build)


def kept(folder: Path, build: Callable[[Path], None]) -> Path:
    """``folder``, which ``build`` fills where it isn't there yet."""
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        build(partial)
        os.replace(partial, folder)
    return folder.resolve()


def text_bytes(folder: Path, kind: str = "documents") -> int:
    """UTF-8 bytes of all texts in a folder of document shards."""
    return sum(
        pc.sum(pc.binary_length(batch.column("text"))).as_py() or 0
        for path in shard_paths(folder, kind)
        for batch in read_shard(path, ("text",))
    )


def documents(folder: Path) -> int:
    """Number of documents in a folder of document shards."""
    return sum(int(pq.read_metadata(path).num_rows) for path in shard_paths(folder))


def random_part(folder: Path, megabytes: float, shards: int = 8) -> Path:
    """About ``megabytes`` of the text in ``folder``, documents drawn by hash of their id; all if it has less."""
    total = text_bytes(folder)
    if total <= megabytes * 1e6:
        return folder
    last = np.uint64(megabytes * 1e6 / total * 2**64)

    def build(out: Path) -> None:
        batches = [
            batch.filter(pa.array(hash_ids(batch.column("id").to_pylist(), "benchmark") <= last))
            for path in shard_paths(folder)
            for batch in read_shard(path)
        ]
        rows = pa.Table.from_batches(batches, SCHEMA)
        size = -(-len(rows) // shards)
        for number in range(shards):
            with write_shard(out / f"documents-{number:05d}.parquet") as writer:
                for batch in rows.slice(number * size, size).combine_chunks().to_batches():
                    writer.add_batch(batch)

    return kept(folder.with_name(f"{folder.name}-part-{megabytes:g}"), build)


def variants(folder: Path, copies: int) -> Path:
    """The text in ``folder`` and ``copies - 1`` times the same with words edited, as if it were that much more."""

    def build(out: Path) -> None:
        paths = shard_paths(folder)
        for copy in range(copies):
            for number, path in enumerate(paths):
                with write_shard(out / f"documents-{copy * len(paths) + number:05d}.parquet") as writer:
                    for batch in read_shard(path):
                        writer.add_batch(edit_words(batch, copy) if copy else batch)

    return kept(folder.with_name(f"{folder.name}-times-{copies}"), build)


def edit_words(batch: pa.RecordBatch, copy: int) -> pa.RecordBatch:
    """Rows whose texts have another first letter in a random `EDITED` of their words (those of lower-case ASCII)."""
    texts = batch.column("text")
    _, offsets, data = pa.concat_arrays([texts]).buffers()
    letters = np.frombuffer(data, np.uint8).copy()
    starts = word_starts(letters)
    chosen = starts[np.random.default_rng(copy).random(len(starts)) < EDITED]
    letters[chosen] = (letters[chosen] - ord("a") + copy) % 26 + ord("a")
    edited = pa.StringArray.from_buffers(len(texts), offsets, pa.py_buffer(letters))
    ids = pa.array([f"variant-{copy}/{one}" for one in batch.column("id").to_pylist()])
    return pa.record_batch([ids, edited, batch.column("source"), batch.column("meta")], SCHEMA)


def word_starts(letters: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Positions of lower-case ASCII letters that follow none."""
    lower = (letters >= ord("a")) & (letters <= ord("z"))
    return np.flatnonzero(lower & ~np.concatenate([[False], lower[:-1]]))


def columns(folder: Path, names: tuple[str, ...]) -> pa.Table:
    """Columns of all document shards of a folder, in memory."""
    return pa.concat_tables([pq.read_table(path, columns=list(names)) for path in shard_paths(folder)])
