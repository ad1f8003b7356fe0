"""Answers of a model to held-out questions, before and after it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.train_tokenizer.tokenizer import end_of_text
from llm.chat.conversations import Messages
from llm.chat.template import Chat
from llm.model.generate import draw
from llm.model.transformer import load_model

AT_ONCE = 8
"""Questions answered together. Not a setting: the shape of a batch shows in the last bits of the results."""


def answer(
    folder: Path, chat: Chat, questions: Sequence[Sequence[dict[str, str]]], *, most: int
) -> list[str]:
    """Return what the model in a folder answers, greedily, to each conversation without its last message."""
    asked = [messages[:-1] for messages in questions]
    drawn = answer_tokens(folder, chat, asked, most=most)
    return [chat.plain.decode(tokens, skip_special_tokens=True) for tokens in drawn]


def end_of_answer(chat: Chat) -> int:
    """Return the token that ends an answer."""
    return end_of_text(chat.plain) if chat.stop is None else chat.stop


def answer_tokens(
    folder: Path, chat: Chat, asked: Sequence[Messages], *, most: int, temperature: float = 0.0
) -> list[list[int]]:
    """Return what the model in a folder answers to each of the conversations, without the token that ends it."""
    model = load_model(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    room = max(1, model.config.context - most)
    answers: list[list[int]] = []
    for start in range(0, len(asked), AT_ONCE):
        prompts = [chat.prompt(messages)[-room:] for messages in asked[start : start + AT_ONCE]]
        seeds = range(start, start + len(prompts))
        answers += draw(
            model,
            prompts,
            most=most,
            end=end_of_answer(chat),
            temperature=temperature,
            top_p=1.0,
            seeds=seeds,
        )
    return answers


def rows_of(
    questions: Sequence[Sequence[dict[str, str]]], before: Sequence[str], after: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a row a question: what was asked, the held-out answer, and the model's before and after."""
    return [
        {
            "messages": [dict(one) for one in messages[:-1]],
            "held_out": messages[-1]["content"],
            "before": b,
            "after": a,
        }
        for messages, b, a in zip(questions, before, after, strict=True)
    ]
