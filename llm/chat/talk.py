"""A conversation with a model: all that was said, and answers that come as they are drawn."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from data_pipeline.core.errors import UserError
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer
from llm.chat.conversations import Message, Rejected
from llm.chat.template import FILE, Chat
from llm.model.generate import draws, whole_characters
from llm.model.layouts import load_folder
from llm.model.transformer import Transformer, load_model


@dataclass(frozen=True)
class Speaker:
    """A model that can be talked to."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    chat: Chat | None
    """None of a model that was trained on no conversations: it goes on with a text."""
    fingerprint: str = ""
    """Name of the artifact that it is; empty where nobody asked for it."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    """Held by who has it answer, where several may: one answer at a time."""

    @classmethod
    def of(cls, name: str, model: Path, tokenizer: Path) -> Speaker:
        """Load a model from a folder of `transformers`' or of a stage, and the tokenizer of another or the same.

        Raises:
            UserError: there is none that we compute.
        """
        sealed = (model / "model.json").exists()
        loaded = load_model(model) if sealed else load_folder(model)
        own = model / FILE
        template = own.read_text(encoding="utf-8") if own.is_file() else None
        spoken = template is not None or (tokenizer / FILE).is_file()
        chat = Chat(tokenizer, template) if spoken else None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(name=name, model=loaded.to(device), tokenizer=load_tokenizer(tokenizer), chat=chat)

    def prompt(self, messages: Sequence[Message], room: int) -> tuple[list[int], int]:
        """Return the tokens before an answer to the last of the messages, and how many of the others are left out.

        The oldest are, in pairs, where all have no room; what the system says stays.

        Raises:
            UserError: a message spells a special token.
        """
        room = max(1, room)
        if self.chat is None:
            text = "".join(one["content"] for one in messages)
            return [end_of_text(self.tokenizer), *self.tokenizer.encode(text).ids][-room:], 0
        try:
            for message in messages:
                self.chat.require_plain(message)
        except Rejected as error:
            raise UserError(f"a message {error}, which no text may yield: write it otherwise") from None
        begin = [one for one in messages[:1] if one["role"] == "system"]
        said = messages[len(begin) :]
        for left_out in range(0, max(1, len(said)), 2):
            ids = self.chat.prompt([*begin, *said[left_out:]])
            if len(ids) <= room:
                break
        return ids[-room:], left_out


@dataclass
class Reply:
    """An answer as it is drawn: iterate over it once, for pieces that end with whole characters."""

    speaker: Speaker
    prompt: list[int]
    most: int
    """Tokens, at most."""
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    tokens: int = 0
    """Tokens until now."""
    seconds: float = 0.0
    """Time until the last token."""
    first_seconds: float = 0.0
    """Time until the first one."""
    finish: Literal["stop", "length"] = "length"
    """Whether the model ended it, or there was no more room."""

    def __iter__(self) -> Iterator[str]:
        return whole_characters(self.drawn(), self.speaker.tokenizer)

    def drawn(self) -> Iterator[int]:
        """Yield the tokens."""
        chat, end = self.speaker.chat, end_of_text(self.speaker.tokenizer)
        start = time.perf_counter()
        drawn = draws(
            self.speaker.model,
            [self.prompt],
            most=self.most,
            end=chat.stop if chat and chat.stop is not None else end,
            temperature=self.temperature,
            top_p=self.top_p,
            seeds=[self.seed],
        )
        for _, token in drawn:
            self.seconds = time.perf_counter() - start
            if not self.tokens:
                self.first_seconds = self.seconds
            if token == end:
                break
            self.tokens += 1
            yield token
        if self.tokens < self.most:
            self.finish = "stop"


@dataclass
class Talk:
    """All that was said with a model, and how it answers."""

    speaker: Speaker
    temperature: float = 0.7
    top_p: float = 0.95
    most: int = 512
    """Tokens of an answer, at most."""
    seed: int = 0
    system: str = ""
    said: list[Message] = field(default_factory=list)
    left_out: int = 0
    """Messages, the oldest ones, that the last answer was given without, for want of room in the context."""
    reply: Reply | None = None
    """The last answer."""

    def reset(self) -> None:
        """Forget what was said."""
        self.said.clear()

    def messages(self) -> list[Message]:
        """Return all that was said, with what the system says before it."""
        begin: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*begin, *self.said]

    def answer(self, text: str) -> Iterator[str]:
        """Say something; yield the answer in pieces that end with whole characters, as it is drawn.

        What was drawn when the iteration is ended early is kept as the answer.

        Raises:
            UserError: the text spells a special token.
        """
        asked: Message = {"role": "user", "content": text}
        room = self.speaker.model.config.context - self.most
        prompt, self.left_out = self.speaker.prompt([*self.messages(), asked], room)
        self.said.append(asked)
        seed = self.seed + len(self.said)
        self.reply = Reply(
            speaker=self.speaker,
            prompt=prompt,
            most=self.most,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )
        parts: list[str] = []
        try:
            for piece in self.reply:
                parts.append(piece)
                yield piece
        finally:
            self.said.append({"role": "assistant", "content": "".join(parts)})
