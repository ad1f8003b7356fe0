"""Where a model is better than another: by class of bytes, by length of document, by document, and the items that only
one got right. All of it describes the texts at hand; nothing here is tested.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from llm.score.classes import FOLLOWS, class_of
from llm.score.statistics import Floats

PLACE = 240
"""Characters of the place in a document that differs most."""
WITHHELD = "the texts are left out, for runtime.upload_texts is false"
Pair = tuple[float, float]
"""A figure of the first model and of the second."""


@dataclass(frozen=True)
class Part:
    """A part of a set's bytes: those of a class, or of documents of some lengths."""

    name: str
    bytes: int
    bits: Pair
    of: int
    """Bytes of the whole."""
    documents: int | None = None

    @property
    def per_byte(self) -> Pair:
        first, second = self.bits
        return first / self.bytes, second / self.bytes

    @property
    def difference(self) -> float:
        """Bits that the second needs more for a byte of this part."""
        return self.per_byte[1] - self.per_byte[0]

    @property
    def adds(self) -> float:
        """Bits a byte by which this part moves the difference over the whole: over all parts they sum to it."""
        return (self.bits[1] - self.bits[0]) / self.of

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"difference": self.difference, "adds": self.adds}


@dataclass(frozen=True)
class Place:
    """A piece of a text."""

    text: str
    more: Floats
    """Bits that the second needs more for each character."""
    start: int
    """Characters before it."""
    of: int
    """Characters of the whole text."""


@dataclass(frozen=True)
class Document:
    """A document under both models."""

    number: int
    """Its place in the set, from 1; ids need not be unique."""
    id: str
    bytes: int
    bits: Pair
    whole: Place | None = None
    """Its text, and what each character adds; None where that is not known."""

    @property
    def more(self) -> float:
        """Bits that the second needs more."""
        return self.bits[1] - self.bits[0]

    def place(self, width: int = PLACE) -> Place | None:
        """Return the ``width`` characters in which most of the difference lies."""
        return most_of(self.whole, width, 1 if self.more > 0 else -1) if self.whole else None

    def as_json(self) -> dict[str, Any]:
        own: dict[str, Any] = {"number": self.number, "id": self.id, "bytes": self.bytes, "bits": self.bits}
        if (found := self.place()) is None:
            return own | {"place": None}
        end = found.start + len(found.text)
        place = {"start": found.start, "end": end, "more_bits": float(found.more.sum()), "text": found.text}
        return own | {"place": place}


@dataclass(frozen=True)
class OnSet:
    """Two models on a set."""

    name: str
    classes: list[Part] = field(default_factory=list)
    lengths: list[Part] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    """Those that differ most, these first."""
    notes: list[str] = field(default_factory=list)
    """Notes on what is left out, or not known, and why."""

    def without_texts(self) -> OnSet:
        """Return the same without a word of the documents."""
        documents = [replace(one, whole=None) for one in self.documents]
        return replace(self, documents=documents, notes=[*self.notes, WITHHELD])

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "classes": [one.as_json() for one in self.classes],
            "lengths": [one.as_json() for one in self.lengths],
            "documents": [one.as_json() for one in self.documents],
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Item:
    """An item that only one of two models got right."""

    number: int
    """Its place in the task, from 0, as in ``items.parquet``."""
    right: tuple[bool, bool]
    chosen: tuple[int | None, int | None]
    """The option that each chose, from 0; None where there is only one."""
    gold: int
    question: str | None
    """None where it was not kept."""
    options: list[str]


@dataclass(frozen=True)
class OnTask:
    """Two models on a task."""

    name: str
    only_first: int
    """Items that only the first got right."""
    only_second: int
    items: list[Item]
    """Those of them whose right answers' bits differ most."""
    notes: list[str] = field(default_factory=list)

    def without_texts(self) -> OnTask:
        """Return the same without a word of the items."""
        items = [replace(one, question=None, options=[]) for one in self.items]
        return replace(self, items=items, notes=[*self.notes, WITHHELD])

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def most_of(whole: Place, width: int, sign: int) -> Place:
    """Return the ``width`` characters that together have most of ``sign``, from no mark that belongs to a letter on."""
    sums = np.cumsum(np.concatenate([[0.0], whole.more]))
    last = max(0, len(whole.text) - width)
    start = int(np.argmax(sign * (sums[min(width, len(whole.text)) :] - sums[: last + 1])))
    while start and class_of(whole.text[start]) == FOLLOWS:
        start -= 1
    end = start + width
    return Place(whole.text[start:end], whole.more[start:end], start=start, of=whole.of)
