"""Pairs of answers out of files, whichever of the usual forms their rows have, as items of packed rows.

- ``prompt``, ``chosen``, ``rejected``: texts, or lists of messages;
- ``instruction``, ``input`` (may be missing), ``chosen``, ``rejected``: texts;
- ``chosen``, ``rejected``: whole conversations, whose beginnings are alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_pipeline.core.pinned_files import PinnedFile
from llm.chat.conversations import Message, Rejected, asked_of, rows_of, said, written
from llm.chat.template import Chat
from llm.data.packed import Conversation
from llm.finetune.config import DataFile
from llm.finetune.reader import shortened
from llm.finetune.rows import Item


class Pair(NamedTuple):
    """Two answers to the same, as messages."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def pair_of(row: Any) -> Pair:
    """Return the pair in a row.

    Raises:
        Rejected: there is none.
    """
    if not isinstance(row, dict):
        raise Rejected("no JSON object")
    if row.get("chosen") is None or row.get("rejected") is None:
        raise Rejected("without chosen and rejected")
    prompt = asked_of(row)
    chosen, rejected = said(row["chosen"], "assistant"), said(row["rejected"], "assistant")
    if any(one["role"] == "user" for one in (*chosen, *rejected)):
        alike = 0
        while alike < min(len(chosen), len(rejected)) and chosen[alike] == rejected[alike]:
            alike += 1
        prompt, chosen, rejected = chosen[:alike], chosen[alike:], rejected[alike:]
    if not any(one["role"] == "user" for one in prompt):
        raise Rejected("answers to no question")
    if chosen == rejected:
        raise Rejected("chosen and rejected are the same")
    for answer in (chosen, rejected):
        if not answer or any(one["role"] != "assistant" for one in answer):
            raise Rejected("not the same question of both")
    if not all(one["content"].strip() for one in chosen):
        raise Rejected("empty answer")
    return Pair(list(prompt), list(chosen), list(rejected))


@dataclass(frozen=True)
class Pairs:
    """Pairs as a chat template writes them: two conversations, of which only the answers count."""

    chat: Chat

    def items(self, one: DataFile, file: PinnedFile) -> Iterator[Item]:
        """Read the rows of a file.

        Raises:
            UserError: it can't be read.
        """
        for number, row in enumerate(rows_of(file), 1):
            try:
                pair = pair_of(row)
                parts = self.encode(pair)
            except Rejected as error:
                yield Item(number, rejected=str(error), content=written(row))
                continue
            whole = {name: [dict(one) for one in messages] for name, messages in pair._asdict().items()}
            yield Item(number, parts, asked=whole["prompt"], whole=whole)

    def encode(self, pair: Pair) -> list[Conversation]:
        """Return both answers, each behind the question.

        Raises:
            Rejected: a message can't be written by the template.
        """
        begun = len(pair.prompt)
        return [
            self.chat.encode([*pair.prompt, *answer], first=begun) for answer in (pair.chosen, pair.rejected)
        ]

    def fitted(self, whole: Mapping[str, list[Message]], room: int) -> Sequence[Conversation]:
        """Return both answers of an item that is trained on, as they fit into a row."""
        parts = self.encode(Pair(**whole))
        return parts if sum(part.length for part in parts) <= room else self.cut(parts, room)

    def cut(self, parts: Sequence[Conversation], room: int) -> Sequence[Conversation]:
        """Return the beginnings of both answers, each of which has half of the room, and what the other leaves of
        its own; nothing where one has no answer there."""
        lengths, half = [part.length for part in parts], room // 2
        kept = [
            shortened(part, max(half, room - other))
            for part, other in zip(parts, reversed(lengths), strict=True)
        ]
        return kept if all(any(part.counted[1:]) for part in kept) else []

    def show(self, item: Item) -> str:
        """Return a pair as text, with marks around what counts in the loss."""
        chosen, rejected = item.parts
        return f"{self.chat.marked(chosen)}\n--- rejected ---\n{self.chat.marked(rejected)}"
