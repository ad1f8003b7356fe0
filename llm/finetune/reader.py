"""Conversations as items of packed rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.core.pinned_files import PinnedFile
from llm.chat.conversations import Rejected, read_conversations
from llm.chat.template import Chat
from llm.data.packed import Conversation
from llm.finetune.config import DataFile
from llm.finetune.rows import Item


@dataclass(frozen=True)
class Conversations:
    """Conversations as a chat template writes them, of which what the assistant says counts."""

    chat: Chat

    def items(self, one: DataFile, file: PinnedFile) -> Iterator[Item]:
        """Read the rows of a file.

        Raises:
            UserError: it can't be read.
        """
        for row in read_conversations(file):
            messages = [dict(message) for message in row.messages]
            if row.rejected:
                yield Item(row.number, rejected=row.rejected, content=row.content)
                continue
            try:
                parts = [self.chat.encode(row.messages)]
            except Rejected as error:
                content = json.dumps(messages, ensure_ascii=False, allow_nan=False)
                yield Item(row.number, rejected=str(error), content=content)
                continue
            asked = [[one["role"], one["content"]] for one in messages if one["role"] != "assistant"]
            yield Item(row.number, parts, asked=asked, whole=messages)

    def cut(self, parts: Sequence[Conversation], room: int) -> Sequence[Conversation]:
        """Return a conversation's beginning; nothing where it has no answer."""
        [only] = parts
        return kept if any((kept := [shortened(only, room)])[0].counted[1:]) else []

    def show(self, item: Item) -> str:
        """Return a conversation as text, with marks around what counts in the loss."""
        return self.chat.marked(item.parts[0])


def shortened(conversation: Conversation, room: int) -> Conversation:
    """Return as much of a conversation as fits into so many positions."""
    return Conversation(conversation.tokens[: room + 1], conversation.counted[: room + 1])
