"""Labels that texts have: their names and order, their counts, and which texts are taken where all count alike."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.core.pinned_files import PinnedFile
from llm.classify.config import MOST_OF_SEVERAL, ClassifyConfig, LabelledFile
from llm.classify.texts import Labelled, read_texts
from llm.data.packed import Conversation
from llm.finetune.config import DataFile
from llm.finetune.rows import Item

FILE = "labels.json"
MOST = 1000
"""Labels in the files, where they are not named: with more, the column is taken to hold something else."""


@dataclass(frozen=True)
class LabelSet:
    """The labels of a classifier."""

    names: tuple[str, ...]
    several: bool
    counts: dict[str, int]
    """Label -> texts that have it, each text counted once."""
    taken: frozenset[str] | None = None
    """SHA-256 of the texts that are taken, where not all are."""

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Label -> its place."""
        return {name: place for place, name in enumerate(self.names)}

    def target(self, labels: Sequence[str]) -> int:
        """Return labels as a target: the place of the only one, or the bits of all of them."""
        if not self.several:
            return self.numbers[labels[0]]
        return sum(1 << self.numbers[label] for label in labels)

    def weights(self) -> tuple[float, ...]:
        """Return the weight of a text of each label with which all labels count alike; their mean over texts is 1."""
        total = sum(self.counts.values())
        return tuple(total / (len(self.names) * max(1, self.counts[name])) for name in self.names)

    def write(self, folder: Path) -> None:
        """Write names and counts to ``labels.json``."""
        described = {"labels": self.names, "several": self.several, "texts": self.counts}
        with atomic_path(folder / FILE) as path:
            path.write_text(
                json.dumps(described, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8"
            )


def read_labels(folder: Path) -> tuple[tuple[str, ...], bool]:
    """Return the names of the labels that a model in a folder gives, and whether a text may have several."""
    described: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return tuple(described["labels"]), bool(described["several"])


def all_texts(config: ClassifyConfig) -> Iterator[Labelled]:
    """Yield the rows of all files."""
    for one, file in zip(config.data, config.files, strict=True):
        yield from read_texts(one, file, several=config.several)


def find_labels(config: ClassifyConfig) -> LabelSet:
    """Read the labels of all files.

    Raises:
        UserError: a file can't be read; there are too few labels, or too many.
    """
    by_label: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for row in all_texts(config):
        digest = text_digest(config.seed, row.text)
        if row.rejected or digest in seen:
            continue
        seen.add(digest)
        for label in row.labels:
            by_label[label].append(digest)
    names = config.labels or tuple(sorted(by_label, key=in_order))
    most = MOST_OF_SEVERAL if config.several else MOST
    if not 2 <= len(names) <= most:
        some = ", ".join(names[:5]) or "none"
        raise UserError(f"classify.data has {len(names):,} labels ({some}), where 2 to {most:,} are wanted")
    counts = {name: len(by_label[name]) for name in names}
    if missing := [name for name in names if not counts[name]]:
        raise UserError(f"classify.labels: no text in classify.data has the label {', '.join(missing)}")
    if config.balance != "equal":
        return LabelSet(names=names, several=config.several, counts=counts)
    fewest = min(counts.values())
    taken = {digest for name in names for digest in sorted(by_label[name])[:fewest]}
    return LabelSet(names=names, several=config.several, counts=counts, taken=frozenset(taken))


def in_order(label: str) -> tuple[float, str]:
    """Return the key by which labels are sorted: numbers by their value, then names."""
    try:
        return (float(label), label)
    except ValueError:
        return (float("inf"), label)


def text_digest(seed: int, text: str) -> str:
    """Return a hash of a text by which texts are drawn: another one than that by which they are held out, or all that
    are drawn would be."""
    return hashlib.sha256(json.dumps(["drawn", seed, text], allow_nan=False).encode()).hexdigest()


@dataclass(frozen=True)
class Texts:
    """Texts as items of packed rows: at the last token of each its label is the target."""

    config: ClassifyConfig
    labels: LabelSet
    tokenizer: Tokenizer

    def items(self, one: DataFile, file: PinnedFile) -> Iterator[Item]:
        """Read the rows of a file.

        Raises:
            UserError: it can't be read.
        """
        assert isinstance(one, LabelledFile)
        for row in read_texts(one, file, several=self.config.several):
            rejected = row.rejected
            if not rejected and not {*row.labels} <= {*self.labels.names}:
                rejected = "a label that is not among labels"
            ids = [] if rejected else self.tokenizer.encode(row.text).ids
            if not rejected and not ids:
                rejected = "no tokens"
            if rejected:
                yield Item(row.number, rejected=rejected, content=row.content or row.text)
                continue
            dropped = ""
            if (
                self.labels.taken is not None
                and text_digest(self.config.seed, row.text) not in self.labels.taken
            ):
                dropped = "more than the rarest label has"
            part = Conversation([*ids, self.labels.target(row.labels)], [False] * len(ids) + [True])
            whole = {"text": row.text, "labels": list(row.labels)}
            yield Item(row.number, [part], asked=row.text, whole=whole, dropped=dropped)

    def cut(self, parts: Sequence[Conversation], room: int) -> Sequence[Conversation]:
        """Return a text's beginning, with its label."""
        [only] = parts
        return [Conversation([*only.tokens[:room], only.tokens[-1]], [False] * room + [True])]

    def show(self, item: Item) -> str:
        """Return a text with its labels."""
        return f"{item.whole['text']}\n⟦{', '.join(item.whole['labels'])}⟧"
