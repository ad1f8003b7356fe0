"""Texts of all files as packed rows, split into those that are trained on and those that are held out. What a text is,
a conversation, a pair of answers or a text with a label, its reader knows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.core.pinned_files import PinnedFile
from data_pipeline.discards import by_reason
from data_pipeline.stage import Metrics
from data_pipeline.tokenize.flat import Split
from llm.data.packed import Conversation, lay_out, pack, write_rows
from llm.finetune.config import DataFile, RowsConfig

REJECTED = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("content", pa.string())]
)
"""Columns of ``rejected.parquet``."""
LONGEST_CONTENT = 1000
"""Characters of a rejected row that are kept."""
HASH_BITS = 64


@dataclass(frozen=True)
class Item:
    """A row of a file, as it is trained on."""

    number: int
    """From 1."""
    parts: Sequence[Conversation] = ()
    """Tokens, in as many parts as every item of its reader has, which stand in one row."""
    asked: Any = None
    """The question (JSON), which decides whether it is held out: items that have the same are in the same split."""
    whole: Any = None
    """The whole item (JSON): those that have the same are one."""
    dropped: str = ""
    """Why it is left out, though it could be trained on."""
    rejected: str = ""
    """Why it can't be trained on."""
    content: str = ""
    """A rejected row as it stands, so that it can be looked at."""

    @property
    def length(self) -> int:
        """Number of positions."""
        return sum(part.length for part in self.parts)


class Reader(Protocol):
    """Items of files."""

    def items(self, one: DataFile, file: PinnedFile) -> Iterator[Item]:
        """Read the rows of a file, which a config says ``one`` of.

        Raises:
            UserError: it can't be read.
        """
        ...

    def cut(self, parts: Sequence[Conversation], room: int) -> Sequence[Conversation]:
        """Return what fits into so many positions; nothing where too little is left."""
        ...

    def show(self, item: Item) -> str:
        """Return an item as text, with marks around what counts in the loss."""
        ...


@dataclass
class Read:
    """Findings in the files, counted and laid out."""

    noun: str
    """A word for the items."""
    items: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    """Split -> how many."""
    rows: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    """Positions of the training rows that hold text."""
    counted: int = 0
    """Targets among these that count in the loss."""
    places: int = 0
    """Positions of the training rows, those that fill them up too."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Reason -> rows."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> items."""
    cut: int = 0
    """Items whose end was cut off."""
    held_out: list[Any] = field(default_factory=list)
    """Items that are held out, whole (JSON)."""
    example: str = ""
    """An item as text, with marks around what counts."""

    @property
    def padding(self) -> float:
        """Share of the training positions that hold nothing."""
        return 1 - self.tokens / self.places if self.places else 0.0

    def metrics(self) -> Metrics:
        """The same as metrics."""
        found = {
            self.noun: float(self.items["train"]),
            f"held_out_{self.noun}": float(self.items["val"]),
            "rows": float(self.rows["train"]),
            "row_tokens": float(self.tokens),
            "counted_tokens": float(self.counted),
            "padding": self.padding,
            **by_reason("rejected", self.rejected),
            **by_reason("dropped", self.dropped),
        }
        return found | ({"cut/longer than a row": float(self.cut)} if self.cut else {})

    def lines(self) -> list[str]:
        """Describe it to a person."""
        lines = [
            f"{self.items['train']:,} {self.noun} in {self.rows['train']:,} rows, {self.padding:.1%} of "
            f"them padding; {self.counted / max(1, self.tokens):.1%} of the tokens count in the loss; "
            f"{self.items['val']:,} {self.noun} held out"
        ]
        for what, counts in (("rejected", self.rejected), ("dropped", self.dropped)):
            if counts:
                named = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))
                lines.append(f"{sum(counts.values()):,} {what}: {named}")
        if self.cut:
            lines.append(f"{self.cut:,} {self.noun} are longer than a row: their ends are cut off")
        return lines

    def drop(self, reason: str) -> None:
        """Count an item that is not trained on."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


def prepare_rows(config: RowsConfig, reader: Reader, *, room: int, out: Path, folder: Path) -> Read:
    """Read the files and write the rows into ``folder``, and what was rejected to ``out``.

    Raises:
        UserError: there is too little to train on, or to hold out.
    """
    read, rejected = Read(config.noun), list[dict[str, Any]]()
    splits: dict[Split, dict[str, list[Item]]] = {
        "train": {one.called: [] for one in config.data},
        "val": {one.called: [] for one in config.data},
    }
    seen: set[bytes] = set()
    for one, file in zip(config.data, config.files, strict=True):
        for item in reader.items(one, file):
            if item.rejected:
                read.rejected[item.rejected] = read.rejected.get(item.rejected, 0) + 1
                row = {"file": one.called, "row": item.number, "reason": item.rejected}
                rejected.append(row | {"content": item.content[:LONGEST_CONTENT]})
                continue
            kept = fitted(item, config, reader, room=room, seen=seen, read=read)
            if kept is None:
                continue
            split: Split = "val" if is_held_out(kept.asked, config) else "train"
            read.items[split] += 1
            if split == "val":
                read.held_out.append(kept.whole)
            elif not read.example:
                read.example = reader.show(kept)
            splits[split][one.called].append(kept)
    require_some(read, config)
    with atomic_path(out / "rejected.parquet") as path:
        pq.write_table(pa.Table.from_pylist(rejected, REJECTED), path, compression="zstd")
    for split, sources in splits.items():
        write_split(split, sources, config, room=room, folder=folder, read=read)
    return read


def fitted(
    item: Item, config: RowsConfig, reader: Reader, *, room: int, seen: set[bytes], read: Read
) -> Item | None:
    """Return an item as it fits into a row; None where it is dropped. ``seen`` and ``read`` keep count."""
    digest = hashlib.sha256(json.dumps(item.whole, allow_nan=False).encode()).digest()
    if digest in seen:
        read.drop("the same again")
        return None
    seen.add(digest)
    if item.dropped:
        read.drop(item.dropped)
        return None
    if item.length <= room:
        return item
    if config.longer == "drop":
        read.drop("longer than a row")
        return None
    parts = reader.cut(item.parts, room)
    if not parts:
        read.drop("no answer within a row")
        return None
    read.cut += 1
    return Item(item.number, parts, asked=item.asked, whole=item.whole)


def write_split(
    split: Split,
    sources: dict[str, list[Item]],
    config: RowsConfig,
    *,
    room: int,
    folder: Path,
    read: Read,
) -> None:
    """Pack the items of each source and write their rows; ``read`` keeps count.

    Raises:
        UserError: a source that has a weight has nothing to train on.
    """
    laid = {}
    for name, items in sources.items():
        lengths = [item.length for item in items]
        rows = pack(lengths, room) if config.packing else [[number] for number in range(len(items))]
        parts = [part for item in items for part in item.parts]
        each = len(items[0].parts) if items else 1
        numbered = [[each * number + part for number in row for part in range(each)] for row in rows]
        laid[name] = lay_out(parts, numbered, room)
        if split == "train":
            read.places += len(rows) * room
            read.tokens += sum(lengths)
            read.counted += sum(sum(part.counted[1:]) for part in parts)
    read.rows[split] = sum(rows.shape[1] for rows in laid.values())
    empty = [name for name, rows in laid.items() if not rows.shape[1]]
    if empty and config.mixture and split == "train":
        raise UserError(
            f"{config.stage}.data: {', '.join(empty)} has a weight, but none of its {config.noun} to train on"
        )
    write_rows(folder, split, laid)


def is_held_out(asked: Any, config: RowsConfig) -> bool:
    """Return whether an item is held out, by a hash of what was asked and of the seed."""
    text = json.dumps([config.seed, asked], allow_nan=False)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[: HASH_BITS // 8], "big")
    return number < config.held_out * 2**HASH_BITS


def require_some(read: Read, config: RowsConfig) -> None:
    """Refuse to train on nothing, or without anything to check on.

    Raises:
        UserError: there is nothing.
    """
    if read.items["train"] and read.items["val"]:
        return
    lost = Counter(read.rejected) + Counter(read.dropped)
    why = ", ".join(f"{count:,} {reason}" for reason, count in lost.most_common(4)) or "none lost"
    what = "to train on" if not read.items["train"] else "held out"
    raise UserError(
        f"{config.stage}.data: there are no {config.noun} {what} ({why}):\n"
        f"give more of them, or change {config.stage}.held_out"
    )
