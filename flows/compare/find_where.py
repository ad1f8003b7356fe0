"""Where two models differ, found from what was kept when they were scored: no model is loaded for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flows.compare.fixed import Row, Scoring, matched, scorings, unlike
from flows.compare.subjects import Subject
from flows.compare.where import Document, Item, OnSet, OnTask, Pair, Part, Place
from llm.score.classes import CLASSES, character_bytes, character_classes
from llm.score.prompts import Kind
from llm.score.statistics import Floats
from llm.score.task import OWN_RULE

MOST_DOCUMENTS, MOST_ITEMS = 10, 50
"""Documents of a set and items of a task that are listed, at most: those that differ most."""
TOKENS = "set_tokens.parquet"
QUARTILES = (0.25, 0.5, 0.75)


def find_where(subjects: Sequence[Subject]) -> list[OnSet | OnTask]:
    """Find where two models differ; of one model, or of more than two, nothing is said."""
    if len(subjects) != 2 or subjects[0].model == subjects[1].model:
        return []
    first, second = subjects
    labels = first.label, second.label
    return [
        on_set(pair, labels) if pair[0].kind == "sets" else on_task(pair, labels)
        for pair in scored_alike(first, second)
    ]


def scored_alike(first: Subject, second: Subject) -> Iterator[tuple[Scoring, Scoring]]:
    """Yield the scores of both on each set and task that both were scored on."""
    made = scorings(first), scorings(second)
    for key in made[0]:
        one, other = matched(*(found.get(key, []) for found in made))
        if one and other and not unlike(one.config, other.config, ""):
            yield one, other


def on_set(pair: tuple[Scoring, Scoring], labels: tuple[str, str]) -> OnSet:
    """Put two models side by side on a set."""
    name, (first, second) = pair[0].name, (one.rows for one in pair)
    if [(row["id"], row["bytes"]) for row in first] != [(row["id"], row["bytes"]) for row in second]:
        return OnSet(name, notes=["their documents differ: another version of llmill read the file"])
    bits = np.array([[row["text_nats"] for row in rows] for rows in (first, second)]) / math.log(2)
    sizes = np.array([row["bytes"] for row in first])
    lengths = by_length(sizes, bits)
    documents = [
        Document(place + 1, first[place]["id"], bytes=int(sizes[place]), bits=pair_of(bits[:, place]))
        for place in np.argsort(-np.abs(bits[1] - bits[0]), kind="stable")[:MOST_DOCUMENTS].tolist()
    ]
    if lacking := [
        label for label, one in zip(labels, pair, strict=True) if not (one.artifact.path / TOKENS).exists()
    ]:
        note = (
            f"by class of bytes and within documents: not known, for the scores of {' and '.join(lacking)} were made "
            "by an earlier version of llmill, which did not keep the bits of each token"
        )
        return OnSet(name, lengths=lengths, documents=documents, notes=[note])
    tokens = ByToken(pair)
    classes, left_out = by_class(tokens)
    documents = [replace(one, whole=tokens.whole(one.number - 1)) for one in documents]
    note = f"{left_out:,} of {len(sizes):,} documents are in no class: a tokenizer changes their text"
    return OnSet(name, classes, lengths, documents=documents, notes=[note] if left_out else [])


class ByToken:
    """The documents of a set under both models, token by token."""

    def __init__(self, pair: tuple[Scoring, Scoring]) -> None:
        tables = [
            pq.read_table(one.artifact.path / TOKENS, filters=[("set", "==", one.name)]).combine_chunks()
            for one in pair
        ]
        self._texts = tables[0]["text"]
        self._tokens = [[table[column] for column in ("token_bytes", "token_nats")] for table in tables]

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, place: int) -> str:
        found: str = self._texts[place].as_py()
        return found

    def bits(self, place: int) -> Floats | None:
        """Return the bits ``(2, characters)`` of each character of a text under both models; None where a tokenizer
        changes it."""
        starts = np.cumsum(sizes := character_bytes(self.text(place))) - sizes
        found = []
        for columns in self._tokens:
            counts, nats = (column[place].values for column in columns)
            if counts is None:
                return None
            found.append(np.add.reduceat(spread(counts.to_numpy(), nats.to_numpy()), starts))
        return np.array(found)

    def whole(self, place: int) -> Place | None:
        """Return a text with the bits that the second model needs more for each character."""
        text, bits = self.text(place), self.bits(place)
        return None if bits is None else Place(text, bits[1] - bits[0], start=0, of=len(text))


def spread(counts: NDArray[np.int32], nats: NDArray[np.float32]) -> Floats:
    """Return the bits of each byte of a text: those of a token, evenly over the bytes ``counts`` that it stands for."""
    some = counts > 0
    found: Floats = np.repeat(nats[some] / (math.log(2) * counts[some]), counts[some])
    return found


def by_class(tokens: ByToken) -> tuple[list[Part], int]:
    """Sum a set's bytes and bits by class, the class that adds most first; and count the documents left out."""
    bits, sizes, left_out = np.zeros((2, len(CLASSES))), np.zeros(len(CLASSES), np.int64), 0
    for place in range(len(tokens)):
        if (found := tokens.bits(place)) is None:
            left_out += 1
            continue
        text = tokens.text(place)
        classes = character_classes(text)
        bits += [np.bincount(classes, one, len(CLASSES)) for one in found]
        np.add.at(sizes, classes, character_bytes(text))
    parts = [
        Part(name, int(size), pair_of(pair), of=int(sizes.sum()))
        for name, size, pair in zip(CLASSES, sizes, bits.T, strict=True)
        if size
    ]
    return sorted(parts, key=lambda part: -abs(part.adds)), left_out


def by_length(sizes: NDArray[np.int64], bits: Floats) -> list[Part]:
    """Sum documents by quartile of their bytes; bits ``(2, documents)``. Documents of one length stay together."""
    ends = np.unique(np.quantile(sizes, QUARTILES, method="lower"))
    quartile = np.searchsorted(ends, sizes)
    parts = []
    for number in np.unique(quartile):
        those = quartile == number
        low, high = sizes[those].min(), sizes[those].max()
        name = f"{low:,} to {high:,} bytes" if low < high else f"{low:,} bytes"
        pair, size = pair_of(bits[:, those].sum(axis=1)), int(sizes[those].sum())
        parts.append(Part(name, size, pair, of=int(sizes.sum()), documents=int(those.sum())))
    return parts


def on_task(pair: tuple[Scoring, Scoring], labels: tuple[str, str]) -> OnTask:
    """Find the items of a task that only one of two models got right."""
    kind: Kind = pair[0].config["kind"]
    first, second = ({row["item"]: row for row in one.rows} for one in pair)
    pairs = [(row, second[number]) for number, row in first.items() if number in second]
    differ = [pair for pair in pairs if pair[0]["right"] != pair[1]["right"]]
    differ.sort(key=lambda pair: -abs(gold_nats(pair[1]) - gold_nats(pair[0])))
    items = [item_of(kind, *pair) for pair in differ[:MOST_ITEMS]]
    only_first = sum(one["right"] for one, _ in differ)
    notes = []
    if len(differ) > MOST_ITEMS:
        notes.append(f"{MOST_ITEMS} of {len(differ):,} such items, whose right answers' bits differ most")
    if any(item.question is None for item in items):
        was = f"{' and '.join(labels)} were scored by an earlier version of llmill"
        notes.append(f"texts are not known, for {was}, which did not keep them")
    return OnTask(pair[0].name, only_first, len(differ) - only_first, items=items, notes=notes)


def item_of(kind: Kind, first: Row, second: Row) -> Item:
    rule = f"chosen_by_{OWN_RULE.get(kind, 'sum')}"
    kept = first if first.get("question") is not None else second
    if kind == "generation" and None not in (first["answer"], second["answer"]):
        return Item(  # of answers that were written, one is right
            number=first["item"],
            right=(first["right"], second["right"]),
            chosen=(0, 1),
            gold=0 if first["right"] else 1,
            question=kept.get("question"),
            options=[first["answer"], second["answer"]],
        )
    return Item(
        number=first["item"],
        right=(first["right"], second["right"]),
        chosen=(first[rule], second[rule]),
        gold=first["gold"],
        question=kept.get("question"),
        options=kept.get("options") or [],
    )


def gold_nats(row: Row) -> float:
    found: float = row["nats"][row["gold"]]
    return found


def pair_of(numbers: Floats) -> Pair:
    first, second = numbers.tolist()
    return first, second
