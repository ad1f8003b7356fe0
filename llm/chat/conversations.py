"""Conversations out of files, whichever of the usual forms their rows have; a row that is none is rejected with why.

- ``messages``: a list of ``role`` and ``content``, as OpenAI's and `transformers` have it;
- ``conversations``: a list of ``from`` and ``value``, as ShareGPT has it;
- ``prompt`` and ``completion``: texts, or lists of messages;
- ``instruction``, ``input`` (may be missing) and ``output``, as Alpaca has it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import PinnedFile
from data_pipeline.core.text import finite, first_line

Message = Mapping[str, str]
"""``role`` and ``content``."""
Messages = Sequence[Message]
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user", "tool": "tool",
    "function": "tool", "observation": "tool", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bot": "assistant",
}  # fmt: skip
"""Role as data sets call it -> as chat templates do."""


class Rejected(Exception):
    """A row that is no conversation; the message is the reason, a few words that rows have in common."""


@dataclass(frozen=True)
class Row:
    """A row of a file."""

    number: int
    """From 1."""
    messages: Messages = ()
    rejected: str = ""
    """Why it is no conversation."""
    content: str = ""
    """A rejected row as it stands, so that it can be looked at."""


def read_conversations(file: PinnedFile) -> Iterator[Row]:
    """Read the rows of a file: JSON lines, a JSON array, or Parquet.

    Raises:
        UserError: it can't be read.
    """
    for number, value in enumerate(rows_of(file), 1):
        try:
            yield Row(number, messages_of(value))
        except Rejected as error:
            yield Row(number, rejected=str(error), content=written(value))


def written(value: Any) -> str:
    """Return a row as text; halves of surrogate pairs as JSON writes them."""
    text = (
        value
        if isinstance(value, str)
        else json.dumps(finite(value), ensure_ascii=False, default=str, allow_nan=False)
    )
    return text.encode("utf-8", "backslashreplace").decode()


def rows_of(file: PinnedFile) -> Iterator[Any]:
    """Yield the values in a file; a line that is no JSON as its text."""
    name = file.path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        try:
            yield from pq.read_table(io.BytesIO(file.read())).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file.path} can't be read: {first_line(error)}") from None
        return
    if not name.endswith((".jsonl", ".json", ".ndjson")):
        raise UserError(f"{file.path}: conversations are a file of .jsonl, .json or .parquet")
    text = file.text()
    if text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
            return
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file.path} is no JSON array: {first_line(error)}") from None
    for line in text.split("\n"):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield line


def messages_of(row: Any) -> Messages:
    """Return the messages of a row, up to the assistant's last one.

    Raises:
        Rejected: it is no conversation.
    """
    if not isinstance(row, dict):
        raise Rejected("no JSON object")
    if row.get("messages") is not None:
        messages = listed(row["messages"], "role", "content")
    elif row.get("conversations") is not None:
        messages = listed(row["conversations"], "from", "value")
    elif asked := asked_of(row):
        answer = row.get("completion") if row.get("prompt") is not None else row.get("output")
        messages = [*asked, *said(answer, "assistant")]
    else:
        raise Rejected("no known fields")
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise Rejected("no answer")
    if not all(messages[place]["content"].strip() for place in answers):
        raise Rejected("empty answer")
    if not any(message["role"] == "user" for message in messages[: answers[0]]):
        raise Rejected("answer before a question")
    return messages[: answers[-1] + 1]


def asked_of(row: Mapping[str, Any]) -> list[Message]:
    """Return the messages that a row asks with, in ``prompt``, or ``instruction`` and ``input``; none where it has
    neither."""
    if row.get("prompt") is not None:
        return said(row["prompt"], "user")
    if row.get("instruction") is None:
        return []
    return said("\n\n".join(text_of(one) for one in (row["instruction"], row.get("input")) if one), "user")


def listed(messages: Any, role: str, content: str) -> list[Message]:
    """Read a list of messages whose fields are called so."""
    if not isinstance(messages, list):
        raise Rejected("messages are no list")
    found: list[Message] = []
    for message in messages:
        if not isinstance(message, dict) or not {role, content} <= message.keys():
            raise Rejected(f"message without {role} and {content}")
        known = ROLES.get(str(message[role]).lower())
        if known is None:
            raise Rejected("unknown role")
        found.append({"role": known, "content": text_of(message[content])})
    return found


def said(value: Any, role: str) -> list[Message]:
    """Read a text that somebody of this role says, or a list of messages."""
    return (
        listed(value, "role", "content")
        if isinstance(value, list)
        else [{"role": role, "content": text_of(value)}]
    )


def text_of(value: Any) -> str:
    """Return the text of a message; of one in parts, all of them.

    Raises:
        Rejected: it has none, or other than text.
    """
    if isinstance(value, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
            raise Rejected("other than text")
        value = "".join(part["text"] for part in value)
    if value is None:
        raise Rejected("no answer")
    if not isinstance(value, str):
        raise Rejected("other than text")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise Rejected("half of a surrogate pair")
    return value
