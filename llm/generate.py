"""Text from a model: one token at a time, drawn from the distribution sharpened by a temperature and cut to its
nucleus (Holtzman et al. 2019, arXiv:1904.09751). The seed fixes the draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data_pipeline.tokenizer import end_of_text, load_tokenizer
from llm.model import Transformer


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """The continuation of ``prompt`` (not itself included), up to the end of text or ``max_new_tokens``.

    The prompt stands at the start of a document, as in training. Temperature 0 takes the likeliest token.
    """
    end = end_of_text(tokenizer)
    tokens = [end, *tokenizer.encode(prompt).ids]
    drawn = draw(model, tokens, temperature=temperature, top_p=top_p, seed=seed)
    new: list[int] = []
    for token in drawn:
        if token == end or len(new) == max_new_tokens:
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True)


def generate_from_folder(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """`generate` with the model and the tokenizer of an exported folder."""
    from llm.layouts import load_folder

    return generate(
        load_folder(folder),
        load_tokenizer(folder),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )


@torch.inference_mode()
def draw(
    model: Transformer, tokens: list[int], *, temperature: float, top_p: float, seed: int
) -> Iterator[int]:
    """Tokens after ``tokens``, without end. The model sees the last ``context`` of them."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    tokens = list(tokens)
    while True:
        seen_1T = torch.tensor([tokens[-model.config.context :]], device=device)
        logits_V = model(seen_1T)[0, -1].cpu()
        tokens.append(pick(logits_V, temperature, top_p, generator))
        yield tokens[-1]


def pick(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token id: the likeliest at temperature 0, else a draw from the nucleus of mass ``top_p``."""
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(nucleus(logits_V / temperature, top_p), 1, generator=generator))


def nucleus(logits_V: Tensor, top_p: float) -> Tensor:
    """Probabilities of the fewest likeliest tokens that together have at least ``top_p``; all others are 0."""
    sorted_V, order_V = logits_V.double().softmax(dim=-1).sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(dim=-1) - sorted_V
    kept_V = sorted_V.masked_fill(before_V >= top_p, 0.0)
    return torch.zeros_like(kept_V).scatter_(0, order_V, kept_V / kept_V.sum())
