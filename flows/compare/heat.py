"""Where one of two models is better, for terminal and page: tables, and texts coloured by the difference."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text

from flows.compare.cells import Section
from flows.compare.where import Document, Item, OnSet, OnTask, Part, Place
from flows.listeners.terminal import visible
from llm.score.classes import FOLLOWS, class_of

MOST_ON_SCREEN = 3
"""Documents of a set, and items of a task, that the terminal shows."""
MOST_CHARACTERS = 5_000
"""Characters of a document on the page."""
MOST_OF_ITEM = 300
"""Characters of an item's question, and of each option, in the terminal."""
DESCRIBED = (
    "Where one is better: figures are bits per byte of these texts, and nothing of it is tested. What the parts add "
    "sums to the whole difference. A token's bits are spread evenly over its bytes."
)
OF_TWO = "Where one is better, by kind of text, document and item, is shown of two runs at a time."
STEPS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Parts of the largest difference in a text from which on a character has the next deeper colour."""
KEY = (
    'In texts <span class="heat"><b class="w2">the second needs more bits</b> or <b class="v2">fewer</b></span> than '
    "the first; a colour is a step deeper at twice the difference."
)
Names = tuple[str, str]
WORSE = ("", "#fbe0d3", "#f5b08c", "#ef7f45", "#d9480f")
BETTER = ("", "#d8e9f7", "#a9cfee", "#6aade0", "#3d8fd1")
"""Colours by depth, on which black can be read: where the second needs more bits, and where it needs fewer."""
STYLE = (
    "pre.heat { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--rule); padding: .6rem; "
    "font-size: .85rem; max-height: 30rem; overflow-y: auto }\n.heat b { font-weight: inherit; color: #000 }\n"
    + "".join(
        f".heat .{name}{depth} {{ background: {colour} }} "
        for name, colours in (("w", WORSE), ("v", BETTER))
        for depth, colour in enumerate(colours)
        if depth
    )
)
"""Rules of the page: ``w`` where the second is worse, ``v`` where it is better."""


def tables(one: OnSet | OnTask, names: Names) -> list[Section]:
    """Return the tables of a set; a task has none."""
    if isinstance(one, OnTask):
        return []
    first, second = names
    header = [first, second, f"{second} − {first}", "adds"]
    by_document = ["number", "document", "bytes", first, second, f"{second} − {first} in bits"]
    return [
        Section(
            heading=f"{one.name}: {what}", header=columns, rows=rows, empty="not known", fixed=len(columns)
        )
        for what, columns, rows in (
            ("by class of bytes", ["class", "bytes", *header], [part_cells(part) for part in one.classes]),
            ("by length", ["length", "documents", *header], [part_cells(part) for part in one.lengths]),
            ("documents that differ most", by_document, [document_cells(doc) for doc in one.documents]),
        )
    ]


def part_cells(part: Part) -> list[str]:
    first, second = part.per_byte
    count = part.bytes if part.documents is None else part.documents
    figures = f"{first:.4f}", f"{second:.4f}", f"{part.difference:+.4f}", f"{part.adds:+.4f}"
    return [part.name, f"{count:,}", *figures]


def document_cells(document: Document) -> list[str]:
    per_byte = [f"{bits / document.bytes:.4f}" for bits in document.bits]
    return [f"{document.number:,}", document.id, f"{document.bytes:,}", *per_byte, f"{document.more:+,.1f}"]


def show(one: OnSet | OnTask, names: Names, console: Console) -> None:
    """Print what stands below the tables: notes, and the documents or items that differ most."""
    for note in one.notes:
        console.print(Text(note, "dim"), soft_wrap=False)
    if isinstance(one, OnTask):
        console.print()
        console.print(Text(counts(one, names), "bold"), soft_wrap=False)
        for item in one.items[:MOST_ON_SCREEN]:
            for line in item_lines(item, names, MOST_OF_ITEM):
                console.print(Text(line.replace("\n", "↵")), soft_wrap=False)
        return
    for document in one.documents[:MOST_ON_SCREEN]:
        if (place := document.place()) is None:
            continue
        where = f"{place_text(document, place, names)}: {place.more.sum():+,.1f} bits here"
        console.print(Text(where, "dim"), soft_wrap=False)
        colours = [(piece.replace("\n", "↵"), terminal_style(depth)) for depth, piece in pieces(place)]
        console.print(Text.assemble(*colours), soft_wrap=False)


def html(one: OnSet | OnTask, names: Names) -> list[str]:
    """Return the same for the page, with the documents whole, or the most of them."""
    parts = [f'<p class="quiet">{escape(note)}</p>' for note in one.notes]
    if isinstance(one, OnTask):
        parts.append(f"<h2>{escape(counts(one, names))}</h2>")
        return parts + [
            f'<pre class="heat" dir="auto">\n{escape(visible(line))}</pre>'
            for item in one.items
            for line in ["\n".join(item_lines(item, names, MOST_CHARACTERS))]
        ]
    for document in one.documents:
        if (place := document.place(MOST_CHARACTERS)) is None:
            continue
        largest = abs(place.more).max(initial=0.0)
        caption = (
            f"{place_text(document, place, names)}; deepest colour from {largest / 2:.2f} bits a character on"
        )
        coloured = "".join(span(depth, escape(piece)) for depth, piece in pieces(place))
        parts.append(f'<p>{escape(caption)}</p><pre class="heat" dir="auto">\n{coloured}</pre>')
    return parts


def place_text(document: Document, place: Place, names: Names) -> str:
    """``document 3, novels/3 (B − A = +120.3 bits), characters 1,201 to 1,440 of 9,000``."""
    end = place.start + len(place.text)
    first, second = names
    part = (
        f", characters {place.start + 1:,} to {end:,} of {place.of:,}" if len(place.text) < place.of else ""
    )
    return (
        f"document {document.number:,}, {document.id} ({second} − {first} = {document.more:+,.1f} bits){part}"
    )


def counts(task: OnTask, names: Names) -> str:
    """``quiz: 12 items that only A got right, 20 that only B did``."""
    return (
        f"{task.name}: {task.only_first:,} items that only {names[0]} got right, "
        f"{task.only_second:,} that only {names[1]} did"
    )


def item_lines(item: Item, names: Names, most: int) -> list[str]:
    """Describe an item: its question, and each option with who chose it; the right one is marked."""
    right = names[0] if item.right[0] else names[1]
    lines = [f"item {item.number}: only {right} got it right", *([item.question] if item.question else [])]
    for place, option in enumerate(item.options):
        chose = [name for name, chosen in zip(names, item.chosen, strict=True) if chosen == place]
        by = f"  ({' and '.join(chose)} chose it)" if chose else ""
        lines.append(f"{'✓' if place == item.gold else '·'} {clipped(option, most)}{by}")
    return [clipped(line, most) for line in lines[:2]] + lines[2:]


def clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters)"


def pieces(place: Place) -> Iterator[tuple[int, str]]:
    """Yield the pieces of a text that have one colour, with its depth: negative where the second needs fewer bits.

    Marks go with their letter, and control characters are shown as their pictures.
    """
    more = np.nan_to_num(place.more)  # a model that diverged has no bits
    largest = abs(more).max(initial=0.0) or 1.0
    deep = np.digitize(abs(more), largest * np.array(STEPS)) * np.sign(more).astype(int)
    depths: list[int] = []
    for character, depth in zip(place.text, deep.tolist(), strict=True):
        depths.append(depths[-1] if depths and class_of(character) == FOLLOWS else depth)
    for depth, found in groupby(zip(depths, visible(place.text), strict=True), lambda one: one[0]):
        yield depth, "".join(character for _, character in found)


def terminal_style(depth: int) -> str:
    if not depth:
        return ""
    return f"black on {(WORSE if depth > 0 else BETTER)[abs(depth)]}"


def span(depth: int, text: str) -> str:
    if not depth:
        return text
    return f'<b class="{"w" if depth > 0 else "v"}{abs(depth)}">{text}</b>'
