"""A tokenizer's chat template: conversations as text and tokens, and which of the tokens count in the loss.

The template is Jinja: that of the tokenizer's folder, or one like ChatML on the tokens that our vocabularies reserve.
It is rendered by `transformers`, so that ``tokenizer.apply_chat_template`` of an exported folder gives the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from data_pipeline.core.errors import UserError
from data_pipeline.core.text import first_line
from data_pipeline.train_tokenizer.tokenizer import (
    CONFIG,
    content_of,
    load_tokenizer,
    read_object,
    special_tokens,
)
from llm.chat.conversations import Message, Messages, Rejected
from llm.data.packed import Conversation

FILE = "chat_template.jinja"
BEGIN, END = "<|reserved_0|>", "<|reserved_1|>"
"""Tokens around a turn, in vocabularies that we learn."""
CHATML = (
    "{% for message in messages %}{{ '"
    + BEGIN
    + "' + message['role'] + '\\n' + message['content'] + '"
    + END
    + "\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + BEGIN + "assistant\\n' }}{% endif %}"
)
"""The form of ChatML (OpenAI 2023) on our tokens."""
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
"""Tokens that a template may name."""
PROBE: tuple[Message, ...] = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def chat_template(folder: Path) -> str | None:
    """Return the chat template of a tokenizer's folder; None where there is none, nor tokens reserved for one."""
    if (folder / FILE).is_file():
        return (folder / FILE).read_text(encoding="utf-8")
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if isinstance(config.get("chat_template"), str):
        return str(config["chat_template"])
    return CHATML if {BEGIN, END} <= {*special_tokens(folder)} else None


class Chat:
    """Conversations by the template and the tokenizer in a folder."""

    def __init__(self, folder: Path, template: str | None = None) -> None:
        """Read them; ``template`` stands in place of the folder's.

        Raises:
            UserError: there is no template, or it can't be rendered as one.
        """
        found = template or chat_template(folder)
        if found is None:
            raise UserError(
                f"{folder} has no chat template, and its vocabulary reserves no tokens for one:\n"
                "name one with finetune.template"
            )
        self.template = found
        self.plain = load_tokenizer(folder)
        self.reading = Tokenizer.from_str(self.plain.to_str())
        """The tokenizer as it reads special tokens out of a template's text."""
        self.reading.encode_special_tokens = False
        self.special = [token for token in special_tokens(folder) if token]
        config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        self.names = {name: content for name in NAMED if (content := content_of(config.get(name)))}
        try:
            begun = self.render(PROBE[:1], ask=True)
            whole = self.render(PROBE)
        except Exception as error:  # whatever Jinja and the template itself raise
            raise UserError(f"the chat template of {folder} can't be rendered: {first_line(error)}") from None
        if not whole.startswith(begun) or "b" not in whole[len(begun) :]:
            raise UserError(
                f"the chat template of {folder} does not put an answer behind the text that asks for it:\n"
                "name another with finetune.template"
            )

    def render(self, messages: Messages, *, ask: bool = False) -> str:
        """Return a conversation as the template writes it; with ``ask`` up to where an answer begins."""
        from transformers.utils.chat_template_utils import render_jinja_template

        [[text]] = [
            render_jinja_template(
                [[dict(message) for message in messages]],
                chat_template=self.template,
                add_generation_prompt=ask,
                **self.names,
            )[0]
        ]
        return str(text)

    def encode(self, messages: Messages, first: int = 0) -> Conversation:
        """Return a conversation as tokens, of which those of the assistant and the ends of its turns count, from
        message ``first`` on.

        Raises:
            Rejected: a message spells a special token, which no text may yield; the template changes what stands
                before an answer.
        """
        for message in messages:
            self.require_plain(message)
        text = self.render(messages)
        spans = list(self.answers(messages, text, first))
        encoding = self.reading.encode(text, add_special_tokens=False)
        counted = [
            any(start <= first and last <= end for start, end in spans) for first, last in encoding.offsets
        ]
        return Conversation(encoding.ids, counted)

    def require_plain(self, message: Message) -> None:
        """See that a message spells no special token.

        Raises:
            Rejected: it does.
        """
        if any(token in message["content"] for token in self.special):
            raise Rejected("spells a special token")

    def answers(self, messages: Messages, text: str, first: int) -> Iterator[tuple[int, int]]:
        """Yield where each answer with the end of its turn begins and ends in a conversation's text."""
        for place, message in enumerate(messages):
            if message["role"] != "assistant" or place < first:
                continue
            begun = self.render(messages[:place], ask=True)
            until = self.render(messages[: place + 1])
            if not (text.startswith(begun) and text.startswith(until) and until.startswith(begun)):
                raise Rejected("the template changes what stands before an answer")
            yield len(begun), len(begun) + self.end_of_turn(until[len(begun) :])

    def end_of_turn(self, answer: str) -> int:
        """Return where a turn ends in the text behind the beginning of an answer: behind its last special token, where
        there is one."""
        ends = [answer.rfind(token) + len(token) for token in self.special if token in answer]
        return max(ends, default=len(answer))

    @cached_property
    def stop(self) -> int | None:
        """The token that ends an answer; None where the template ends it with a text."""
        begun, whole = self.render(PROBE[:1], ask=True), self.render(PROBE)
        turn = whole[len(begun) :]
        last = next((token for token in self.special if turn[: self.end_of_turn(turn)].endswith(token)), None)
        return None if last is None else self.plain.token_to_id(last)

    def prompt(self, messages: Messages) -> list[int]:
        """Return the tokens before an answer."""
        ids: list[int] = self.reading.encode(self.render(messages, ask=True), add_special_tokens=False).ids
        return ids

    def marked(self, conversation: Conversation) -> str:
        """Return a conversation as text in which what counts stands between ⟦ and ⟧."""
        parts: list[str] = []
        run: list[int] = []
        for place, (token, counts) in enumerate(zip(*conversation, strict=True)):
            run.append(token)
            following = conversation.counted[place + 1] if place + 1 < len(conversation.tokens) else None
            if following != counts:
                text = self.plain.decode(run, skip_special_tokens=False)
                parts.append(f"⟦{text}⟧" if counts else text)
                run = []
        return "".join(parts)
