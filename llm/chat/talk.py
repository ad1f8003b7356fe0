"""A conversation with a model: what was said, and answers that come as they are drawn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

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
    tokens: int = 0
    """Tokens of the last answer."""
    seconds: float = 0.0
    """Time that it took, and of this until its first token."""
    first_seconds: float = 0.0

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
        self.said.append({"role": "user", "content": text})
        try:
            prompt = self.prompt()
        except Rejected as error:
            self.said.pop()
            raise UserError(f"this message {error}, which no text may yield: write it otherwise") from None
        parts: list[str] = []
        try:
            for piece in whole_characters(self.drawn(prompt), self.speaker.tokenizer):
                parts.append(piece)
                yield piece
        finally:
            self.said.append({"role": "assistant", "content": "".join(parts)})

    def drawn(self, prompt: list[int]) -> Iterator[int]:
        """Yield the tokens of an answer, and keep its length and speed."""
        chat, tokenizer = self.speaker.chat, self.speaker.tokenizer
        end = end_of_text(tokenizer)
        start, self.tokens = time.perf_counter(), 0
        tokens = draws(
            self.speaker.model,
            [prompt],
            most=self.most,
            end=chat.stop if chat and chat.stop is not None else end,
            temperature=self.temperature,
            top_p=self.top_p,
            seeds=[self.seed + len(self.said)],
        )
        for _, token in tokens:
            self.seconds = time.perf_counter() - start
            if not self.tokens:
                self.first_seconds = self.seconds
            if token == end:
                break
            self.tokens += 1
            yield token

    def prompt(self) -> list[int]:
        """Return the tokens before the next answer: what was said, less the oldest where the context is full."""
        chat, tokenizer = self.speaker.chat, self.speaker.tokenizer
        room = self.speaker.model.config.context - self.most
        if chat is None:
            ids = [
                end_of_text(tokenizer),
                *tokenizer.encode("".join(one["content"] for one in self.said)).ids,
            ]
            self.left_out = 0
            return ids[-max(1, room) :]
        for message in self.messages():
            chat.require_plain(message)
        begin = self.messages()[: len(self.messages()) - len(self.said)]
        for first in range(0, len(self.said), 2):
            ids = chat.prompt([*begin, *self.said[first:]])
            self.left_out = first
            if len(ids) <= room:
                break
        return ids[-max(1, room) :]
