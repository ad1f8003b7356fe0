"""Items of tasks as texts: what a model reads of each option, and which part of it counts.

The rules are those of CORE (Li et al. 2024, arXiv:2406.11794, section 3.5 and appendix G; as nanochat scores it): shots
come before the item, each behind an empty line; the text of an option is whole, so that a tokenizer sees no seam.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["choice", "schema", "continuation", "pairs", "generation"]
Item = Mapping[str, Any]
"""An item as its task's file has it."""
FIELDS: dict[Kind, tuple[str, ...]] = {
    "choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "continuation": ("context", "continuation"),
    "pairs": ("sentence_good", "sentence_bad"),
    "generation": ("question", "answers"),
}
"""Kind -> the fields that an item has."""
Counts = Literal["after the common beginning", "the common end", "after the context", "all"]
"""Which tokens of a text count."""
COUNTED: dict[Kind, Counts] = {
    "choice": "after the common beginning",
    "schema": "the common end",
    "continuation": "after the context",
    "pairs": "all",
    "generation": "after the context",
}


@dataclass(frozen=True)
class Prompt:
    """An item as it is read."""

    texts: tuple[str, ...]
    """One for each option."""
    gold: int
    counts: Counts
    context: str = ""
    """The text before what counts, where the kind has a context."""


def render(kind: Kind, item: Item, shots: Sequence[Item] = (), delimiter: str = " ") -> Prompt:
    """Render an item behind some solved ones.

    Args:
        delimiter: stands between question and answer, or context and continuation.
    """
    before = "".join(f"{solved(kind, one, delimiter)}\n\n" for one in shots)
    if kind == "pairs":
        texts, gold = [item["sentence_good"], item["sentence_bad"]], 0
    elif kind == "choice":
        texts, gold = [f"{item['query']}{delimiter}{choice}" for choice in item["choices"]], item["gold"]
    elif kind == "schema":
        contexts, end = item["context_options"], item["continuation"]
        texts, gold = [f"{context}{delimiter}{end}" for context in contexts], item["gold"]
    else:
        # A tokenizer may join a space at the end of a context with what follows, so none is left there.
        field = "question" if kind == "generation" else "context"
        context = f"{before}{item[field].strip()}{delimiter}".strip()
        whole = f"{before}{solved(kind, item, delimiter)}"
        return Prompt(texts=(whole,), gold=0, counts=COUNTED[kind], context=context)
    return Prompt(tuple(f"{before}{text}" for text in texts), gold, COUNTED[kind])


def solved(kind: Kind, item: Item, delimiter: str) -> str:
    """Render an item with its right answer."""
    if kind == "pairs":
        return str(item["sentence_good"])
    if kind == "choice":
        return f"{item['query']}{delimiter}{item['choices'][item['gold']]}"
    if kind == "schema":
        return f"{item['context_options'][item['gold']]}{delimiter}{item['continuation']}"
    if kind == "generation":
        return f"{item['question'].strip()}{delimiter}{item['answers'][0]}"
    return f"{item['context'].strip()}{delimiter}{item['continuation']}"


def asked(kind: Kind, item: Item) -> tuple[str, list[str]]:
    """Return an item's question and its options, as people read them: without what is put around them."""
    if kind == "pairs":
        return "", [item["sentence_good"], item["sentence_bad"]]
    if kind == "choice":
        return item["query"], item["choices"]
    if kind == "schema":
        return f"… {item['continuation']}", item["context_options"]
    if kind == "generation":
        return item["question"], item["answers"]
    return item["context"], [item["continuation"]]


def draw_shots(items: Sequence[Item], place: int, count: int, seed: int) -> list[Item]:
    """Draw the solved items that stand before the one at ``place``: others of the same file, by Python's ``random``
    seeded with ``seed + place``, as nanochat draws them."""
    if not count:
        return []
    others = [other for other in range(len(items)) if other != place]
    return [items[other] for other in random.Random(seed + place).sample(others, count)]
