"""How much of some texts stands in the documents that a model was trained on.

The rule is that of `data_pipeline.clean.decontaminate`: runs of `NGRAM` words. A shorter text of `SHORTEST` words or
more is sought as a whole, as by Brown et al. 2020 (GPT-3, appendix C), whose n-grams have 8 to 13 words; one that is
shorter yet would be found by chance, and is not sought.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.clean.decontaminate import NGRAM
from data_pipeline.clean.normalise import Form, normalise, normalise_column
from data_pipeline.clean.sequences import Sequences
from data_pipeline.core.files import atomic_path, once
from data_pipeline.core.pinned_files import PinnedFile, pin
from data_pipeline.documents import read_shard, save_array, shard_paths
from data_pipeline.hashing import hash_column
from data_pipeline.stage import StageContext
from data_pipeline.tokenize.stage import TokenizeConfig

SHORTEST = 8
FORMS: tuple[Form, ...] = ("NFC", "NFKC")
"""Texts are sought in both and documents brought to the first, which leaves those of the second as they are: so it is
of no account to which form a recipe's `clean` brought them."""


@dataclass(frozen=True)
class Corpus:
    """Documents, and how they were split: those that were held out are not looked at."""

    documents: Path
    split: TokenizeConfig


@dataclass(frozen=True)
class Overlap:
    """N-grams of each text."""

    seen: NDArray[np.int64]
    """Those that stand in a document."""
    sought: NDArray[np.int64]
    """All; none of a text that is too short."""
    size: int
    """Bytes of the training documents."""


def find_overlap(
    texts: Sequence[str], corpora: Sequence[Corpus], scratch: Path, context: StageContext
) -> Overlap:
    """Look in the training documents of ``corpora`` for ``texts``; what a killed attempt left in ``scratch`` is used.

    Raises:
        UserError: a shard of documents can't be read.
    """
    path = scratch / "texts.parquet"
    scratch.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), temporary)
    [file] = pin([path], "texts")
    shards = [
        (scratch / f"corpus-{number}-{shard.stem}", shard, corpus.split)
        for number, corpus in enumerate(corpora)
        for shard in shard_paths(corpus.documents)
    ]
    context.progress(0, len(shards), "shards")
    names = [f"overlap with {shard.stem}" for _, shard, _ in shards]
    sizes = context.map(partial(search_shard, file), shards, names=names)
    context.progress(len(shards), len(shards), "shards")
    sequences = sequences_of(file)
    found = np.zeros(len(sequences.items), np.bool_)
    for kept, _, _ in shards:
        found[np.load(kept.with_suffix(".npy"))] = True
    sought_FN = sequences.windows.reshape(len(FORMS), len(texts))
    seen_FN = np.bincount(sequences.items[found], minlength=sought_FN.size).reshape(sought_FN.shape)
    best = seen_FN.argmax(axis=0), np.arange(len(texts))
    return Overlap(seen_FN[best], sought_FN[best], sum(one["bytes"] for one in sizes))


@lru_cache(maxsize=1)
def sequences_of(file: PinnedFile) -> Sequences:
    """Return what is sought, made once a process."""
    texts = pq.read_table(io.BytesIO(file.read())).column("text").to_pylist()
    normal = [normalise(text, form) for form in FORMS for text in texts]
    return Sequences(normal, ngram=NGRAM, shortest=SHORTEST, joined=True)


def search_shard(file: PinnedFile, item: tuple[Path, Path, TokenizeConfig]) -> dict[str, Any]:
    """Look in a shard; what is found goes into ``.npy``, as indices of windows. Returns the bytes that were read."""
    kept, shard, split = item

    def search() -> dict[str, Any]:
        sequences, size = sequences_of(file), 0
        seen = np.zeros(len(sequences.items), np.bool_)
        for batch in read_shard(shard, ("id", "text")):
            training = hash_column(batch.column("id"), split.salt) >= np.uint64(split.held_out)
            texts = batch.column("text").filter(pa.array(training))
            size += pc.sum(pc.binary_length(texts)).as_py() or 0
            sequences.mark(normalise_column(texts, FORMS[0]), seen)
        save_array(kept.with_suffix(".npy"), np.flatnonzero(seen))
        return {"bytes": size}

    return once(kept.with_suffix(".json"), search)
