"""Counts of the stage ``tokenize``, by split and by source, and the report it makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.core.files import atomic_path
from data_pipeline.core.text import table
from data_pipeline.documents import add_up, byte_lengths
from data_pipeline.stage import Metrics

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
COUNTS = (
    *(f"split_{of}" for of in ("documents", "tokens", "bytes")),
    *(f"source_{of}" for of in ("documents", "tokens", "bytes", "words")),
)


def count(
    tally: dict[str, Counter[str]],
    held_out: NDArray[np.bool_],
    sources: pa.Array,
    tokens: NDArray[np.int64],
    texts: pa.Array,
) -> None:
    """Add documents to a tally, by split and by source; ``tokens`` are those of their text, without end-of-text."""
    coded = sources.dictionary_encode()
    names, codes = coded.dictionary.to_pylist(), coded.indices.to_numpy()
    counts = {"documents": np.ones(len(tokens)), "tokens": tokens, "bytes": byte_lengths(texts)}
    for of, values in counts.items():
        for by, labels, group in (("split", SPLITS, held_out.astype(np.int64)), ("source", names, codes)):
            sums = np.bincount(group, values, len(labels)).astype(np.int64).tolist()
            tally[f"{by}_{of}"].update(dict(zip(labels, sums, strict=True)))
    if (codes[1:] < codes[:-1]).any():  # sources by turns
        order = np.argsort(codes, kind="stable")
        codes, texts = codes[order], texts.take(pa.array(order))
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    for start, end in pairwise([*starts, len(codes)]):
        tally["source_words"][names[codes[start]]] += count_words(texts.slice(start, end - start))


def count_words(texts: pa.Array, block: int = 1 << 16) -> int:
    """Count the words in a column of texts: what stands between ASCII white space and control characters.

    In blocks that stay in the processor's cache: passes over arrays as large as a row group take four times as long.
    """
    _, offsets, data = texts.buffers()
    starts = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    characters = np.frombuffer(data or b"", np.uint8)[starts[0] : starts[-1]]
    words = 0
    before = np.zeros(1, bool)
    for start in range(0, len(characters), block):
        black = np.concatenate([before, characters[start : start + block] > ord(" ")])
        words += int(np.count_nonzero(black[1:] > black[:-1]))
        before = black[-1:]
    joints = np.unique(starts[1:-1] - starts[0])  # between two texts a word begins whatever stands before
    joints = joints[(joints > 0) & (joints < len(characters))]
    joined = (characters[joints - 1] > ord(" ")) & (characters[joints] > ord(" "))
    return words + int(np.count_nonzero(joined))


def summarise(
    tallies: Sequence[Mapping[str, Any]], faults: Sequence[str], shards: int, report: Path
) -> Metrics:
    """Write the report and return the metrics."""
    totals = {name: add_up(tally[name] for tally in tallies) for name in COUNTS}
    documents, tokens, sizes = (totals[f"split_{of}"] for of in ("documents", "tokens", "bytes"))
    words = totals["source_words"]
    text = "# Tokenize\n\n" + table(
        ("split", "documents", "tokens", "bytes a token"),
        [
            (split, documents[split], tokens[split] + documents[split], ratio(sizes[split], tokens[split]))
            for split in SPLITS
        ],
    )
    by_source = [totals[f"source_{of}"] for of in ("documents", "tokens", "bytes", "words")]
    text += "\n" + table(
        ("source", "documents", "tokens", "bytes a token", "tokens a word"),
        [
            (source, count, number + count, ratio(size, number), ratio(number, word))
            for source in words
            for count, number, size, word in [[counts[source] for counts in by_source]]
        ],
    )
    text += "\nTokens include the end-of-text of each document, the ratios don't. "
    text += "A word is what stands between white space.\n"
    text += "\nEncoded with " + (
        f"`tokenizers`. **Warning**: not with `gigatoken`, since {faults[0]}.\n"
        if faults
        else "`gigatoken`.\n"
    )
    with atomic_path(report) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return {
        "documents": float(sum(documents.values())),
        "train_tokens": float(tokens["train"] + documents["train"]),
        "val_tokens": float(tokens["val"] + documents["val"]),
        "bytes_per_token": sum(sizes.values()) / max(1, sum(tokens.values())),
        "tokens_per_word": sum(tokens.values()) / max(1, sum(words.values())),
        "shards": float(shards),
        **{
            f"tokens/{source}": float(number + totals["source_documents"][source])
            for source, number in totals["source_tokens"].items()
        },
    }


def ratio(of: int, to: int) -> str:
    return f"{of / max(1, to):.3f}"
