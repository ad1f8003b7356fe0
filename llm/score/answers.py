"""Answers that a model writes, and whether one is right: by exact match, as closed-book questions are scored.

An answer is what the model writes greedily behind the question, up to a stop.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence

from tokenizers import Tokenizer

from data_pipeline.train_tokenizer.tokenizer import end_of_text
from llm.model.foreign import ForeignModel, Scorable
from llm.model.generate import draw
from llm.score.encode import Option

AT_ONCE = 16
"""Questions answered together. Not a setting: the shape of a batch shows in the last bits of the results."""
AROUND = "\"'.,;:!?¿¡…·。、，；：！？｡､،؛؟।॥۔"
"""Marks that may stand around an answer, beside brackets and quotes of any script; signs of numbers are none."""


def write_answers(
    model: Scorable,
    tokenizer: Tokenizer,
    questions: Sequence[Option],
    *,
    most: int,
    stops: Sequence[str],
    progress: Callable[[int], None],
) -> list[str]:
    """Return what the model writes behind each question.

    Args:
        questions: sequences whose tokens before ``start`` are the question.
        most: tokens of an answer, at most.
        stops: texts that an answer ends before.
        progress: called with the number of questions answered.
    """
    answers, done = [""] * len(questions), 0
    for numbers in alike(questions):
        asked = [questions[number].tokens[: questions[number].start] for number in numbers]
        room = max(1, model.config.context - most)
        drawn = draw(
            model.next_logits if isinstance(model, ForeignModel) else model,
            [tokens[-room:] for tokens in asked],
            most=most,
            end=end_of_text(tokenizer),
            temperature=0.0,
            top_p=1.0,
            seeds=[0] * len(asked),
        )
        for number, tokens in zip(numbers, drawn, strict=True):
            answers[number] = before(tokenizer.decode(tokens, skip_special_tokens=True), stops)
        done += len(numbers)
        progress(done)
    return answers


def alike(questions: Sequence[Option]) -> Iterator[list[int]]:
    """Yield the numbers of questions of about the same length, the longest first."""
    order = sorted(range(len(questions)), key=lambda number: -questions[number].start)
    for start in range(0, len(order), AT_ONCE):
        yield order[start : start + AT_ONCE]


def before(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of some stops; one that it begins with, as a line break, is passed over."""
    text = text.lstrip()
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(places, default=len(text))].strip()


def matches(answer: str, right: Sequence[str]) -> bool:
    """Say whether an answer is one of the right ones, but for case, spaces, and marks around it."""
    return plain(answer) in {plain(one) for one in right}


def plain(text: str) -> str:
    """Bring a text to the form in which answers are compared: NFKC, without case, single spaces, no marks around it."""
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    start, end = 0, len(words)
    while start < end and is_around(words[start]):
        start += 1
    while end > start and is_around(words[end - 1]):
        end -= 1
    return words[start:end].strip()


def is_around(character: str) -> bool:
    return character in AROUND or unicodedata.category(character) in {"Ps", "Pe", "Pi", "Pf", "Zs"}
