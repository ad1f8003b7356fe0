"""Prompts as tokens, and which of them count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from tokenizers import Tokenizer

from llm.score.prompts import Prompt


@dataclass(frozen=True)
class Option:
    """A sequence of which the tokens from ``start`` to the end count; the first token of all never does."""

    tokens: list[int]
    start: int
    cut: int = 0
    """Tokens that were cut off at the left, for want of room in the context."""


def encode(prompt: Prompt, tokenizer: Tokenizer, first: int, room: int) -> list[Option]:
    """Encode a prompt's texts, each behind the token ``first``, in at most ``room`` tokens.

    What does not fit is cut off at the left: never what counts, unless that alone has no room.
    """
    sequences = [[first, *encoding.ids] for encoding in tokenizer.encode_batch(list(prompt.texts))]
    starts = starts_of(prompt, sequences, tokenizer)
    return [fitted(tokens, start, room) for tokens, start in zip(sequences, starts, strict=True)]


def starts_of(prompt: Prompt, sequences: Sequence[list[int]], tokenizer: Tokenizer) -> list[int]:
    """Find where what counts begins in each sequence; at least one token counts."""
    most = min(map(len, sequences)) - 1  # so that something counts of each
    match prompt.counts:
        case "all":
            return [1] * len(sequences)
        case "after the common beginning":
            return [min(common(sequences), most)] * len(sequences)
        case "the common end":
            count = min(common([tokens[::-1] for tokens in sequences]), most)
            return [len(tokens) - count for tokens in sequences]
        case "after the context":
            context = [sequences[0][0], *tokenizer.encode(prompt.context).ids]
            # A token that reaches across the seam counts: no part of one can be scored.
            return [min(common([context, sequences[0]]), most)]


def common(sequences: Sequence[Sequence[int]]) -> int:
    """Count the tokens, or bytes, with which all sequences begin."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))


def fitted(tokens: list[int], start: int, room: int) -> Option:
    """Cut off at the left what is more than ``room`` tokens."""
    cut = max(0, len(tokens) - room)
    return Option(tokens[cut:], max(1, start - cut), cut)
