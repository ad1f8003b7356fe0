"""Conversations of all files as packed rows, split into those that are trained on and those that are held out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.discards import by_reason
from data_pipeline.stage import Metrics
from data_pipeline.tokenize.flat import Split
from llm.chat.conversations import Messages, Rejected, Row, read_conversations
from llm.chat.template import Chat
from llm.data.packed import Conversation, lay_out, pack, write_rows
from llm.finetune.config import FinetuneConfig

REJECTED = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("content", pa.string())]
)
"""Columns of ``rejected.parquet``."""
LONGEST_CONTENT = 1000
"""Characters of a rejected row that are kept."""
SHOWN = 8
"""Held-out conversations that are kept as text, at least."""
HASH_BITS = 64


@dataclass
class Read:
    """Findings in the files, counted and laid out."""

    conversations: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
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
    """Reason -> conversations."""
    cut: int = 0
    """Conversations whose end was cut off."""
    held_out: list[list[dict[str, str]]] = field(default_factory=list)
    """Some conversations that are held out, as messages."""
    example: str = ""
    """A conversation as text, with marks around what counts."""

    @property
    def padding(self) -> float:
        """Share of the training positions that hold nothing."""
        return 1 - self.tokens / self.places if self.places else 0.0

    def metrics(self) -> Metrics:
        """The same as metrics."""
        found = {
            "conversations": float(self.conversations["train"]),
            "held_out_conversations": float(self.conversations["val"]),
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
            f"{self.conversations['train']:,} conversations in {self.rows['train']:,} rows, {self.padding:.1%} of "
            f"them padding; {self.counted / max(1, self.tokens):.1%} of the tokens count in the loss; "
            f"{self.conversations['val']:,} conversations held out"
        ]
        for what, counts in (("rejected", self.rejected), ("dropped", self.dropped)):
            if counts:
                named = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))
                lines.append(f"{sum(counts.values()):,} {what}: {named}")
        if self.cut:
            lines.append(f"{self.cut:,} conversations are longer than a row: their ends are cut off")
        return lines


def prepare_rows(config: FinetuneConfig, chat: Chat, room: int, out: Path, folder: Path) -> Read:
    """Read the conversations and write the rows into ``folder``, and what was rejected to ``out``.

    Raises:
        UserError: there are too few to train on, or to hold out.
    """
    read, rejected = Read(), list[dict[str, Any]]()
    splits: dict[Split, dict[str, list[Conversation]]] = {
        "train": {one.called: [] for one in config.data},
        "val": {one.called: [] for one in config.data},
    }
    seen: set[bytes] = set()
    for one, file in zip(config.data, config.files, strict=True):
        for row in read_conversations(file):
            try:
                split, conversation = taken(row, config, chat, room=room, seen=seen, read=read)
            except Rejected as error:
                read.rejected[str(error)] = read.rejected.get(str(error), 0) + 1
                content = row.content or json.dumps(list(row.messages), ensure_ascii=False, allow_nan=False)
                rejected.append(
                    {
                        "file": one.called,
                        "row": row.number,
                        "reason": str(error),
                        "content": content[:LONGEST_CONTENT],
                    }
                )
                continue
            if conversation is not None:
                splits[split][one.called].append(conversation)
    require_some(read, config)
    with atomic_path(out / "rejected.parquet") as path:
        pq.write_table(pa.Table.from_pylist(rejected, REJECTED), path, compression="zstd")
    for split, sources in splits.items():
        laid = {}
        for name, found in sources.items():
            lengths = [conversation.length for conversation in found]
            rows = pack(lengths, room) if config.packing else [[item] for item in range(len(found))]
            laid[name] = lay_out(found, rows, room)
            if split == "train":
                read.places += len(rows) * room
                read.tokens += sum(lengths)
                read.counted += sum(sum(conversation.counted[1:]) for conversation in found)
        read.rows[split] = sum(rows.shape[1] for rows in laid.values())
        if empty := [
            name for name, rows in laid.items() if config.mixture and split == "train" and not rows.shape[1]
        ]:
            raise UserError(
                f"finetune.data: {', '.join(empty)} has a weight, but no conversation to train on"
            )
        write_rows(folder, split, laid)
    return read


def taken(
    row: Row, config: FinetuneConfig, chat: Chat, *, room: int, seen: set[bytes], read: Read
) -> tuple[Split, Conversation | None]:
    """Return a row's split and its tokens; None where it is dropped. ``seen`` and ``read`` keep count.

    Raises:
        Rejected: it is no conversation.
    """
    if row.rejected:
        raise Rejected(row.rejected)
    conversation = chat.encode(row.messages)
    digest = hashlib.sha256(
        json.dumps([dict(one) for one in row.messages], allow_nan=False).encode()
    ).digest()
    if digest in seen:
        read.dropped["the same again"] = read.dropped.get("the same again", 0) + 1
        return "train", None
    seen.add(digest)
    if conversation.length > room:
        if config.longer == "drop":
            read.dropped["longer than a row"] = read.dropped.get("longer than a row", 0) + 1
            return "train", None
        conversation = Conversation(conversation.tokens[: room + 1], conversation.counted[: room + 1])
        if not any(conversation.counted[1:]):
            read.dropped["no answer within a row"] = read.dropped.get("no answer within a row", 0) + 1
            return "train", None
        read.cut += 1
    split: Split = "val" if is_held_out(row.messages, config) else "train"
    read.conversations[split] += 1
    if split == "val" and len(read.held_out) < max(SHOWN, config.answers):
        read.held_out.append([dict(message) for message in row.messages])
    if split == "train" and not read.example:
        read.example = chat.marked(conversation)
    return split, conversation


def is_held_out(messages: Messages, config: FinetuneConfig) -> bool:
    """Return whether a conversation is held out, by a hash of all that the assistant did not say and of the seed."""
    asked = [[one["role"], one["content"]] for one in messages if one["role"] != "assistant"]
    text = json.dumps([config.seed, asked], allow_nan=False)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[: HASH_BITS // 8], "big")
    return number < config.held_out * 2**HASH_BITS


def require_some(read: Read, config: FinetuneConfig) -> None:
    """Refuse to train on nothing, or without anything to check on.

    Raises:
        UserError: there is nothing.
    """
    if read.conversations["train"] and read.conversations["val"]:
        return
    lost = Counter(read.rejected) + Counter(read.dropped)
    why = ", ".join(f"{count:,} {reason}" for reason, count in lost.most_common(4)) or "none lost"
    what = "to train on" if not read.conversations["train"] else "held out"
    raise UserError(
        f"finetune.data: there are no conversations {what} ({why}):\ngive more of them, or change finetune.held_out"
    )
