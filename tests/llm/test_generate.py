from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.tokenizer import END_OF_TEXT, end_of_text, load_tokenizer
from llm.generate import draw, generate, nucleus, pick
from llm.model import ModelConfig, Transformer

Make = Callable[..., ModelConfig]


def test_the_seed_fixes_the_text(tiny: Make, corpus: dict[str, Path]) -> None:
    model, tokenizer = Transformer(tiny(init_std=0.2)).eval(), load_tokenizer(corpus["train_tokenizer"])
    texts = [generate(model, tokenizer, "def ", max_new_tokens=40, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0]


def test_text_ends_where_the_model_ends_it(tiny: Make, corpus: dict[str, Path]) -> None:
    model, tokenizer = Transformer(tiny()).eval(), load_tokenizer(corpus["train_tokenizer"])
    end = end_of_text(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.norm.weight.zero_()
    tokens = list(islice(draw(model, [end], temperature=1.0, top_p=1.0, seed=14), 100))
    assert end in tokens, "every token is as likely as any; with this seed the end of text comes early"
    before = tokens[: tokens.index(end)]
    text = generate(model, tokenizer, "", max_new_tokens=100, temperature=1.0, top_p=1.0, seed=14)
    assert text == tokenizer.decode(before, skip_special_tokens=True)
    cut = generate(model, tokenizer, "", max_new_tokens=5, temperature=1.0, top_p=1.0, seed=14)
    assert cut == tokenizer.decode(before[:5], skip_special_tokens=True)
    assert END_OF_TEXT not in text


def test_temperature_zero_takes_the_likeliest_token_and_a_full_context_slides(tiny: Make) -> None:
    model = Transformer(tiny(init_std=0.3)).eval()
    tokens = [1, 2, 3]
    for token in islice(draw(model, tokens, temperature=0, top_p=0.5, seed=0), 40):
        assert token == int(model(torch.tensor([tokens[-24:]]))[0, -1].argmax())
        tokens.append(token)


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=30),
    top_p=st.floats(0.01, 1),
)
def test_the_nucleus_is_the_fewest_likeliest_tokens_of_enough_mass(
    weights: list[float], top_p: float
) -> None:
    probabilities = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    kept = nucleus(probabilities.log(), top_p)
    assert kept.sum().item() == pytest.approx(1.0)
    inside = kept > 0
    mass = probabilities[inside].sum().item()
    assert mass >= top_p - 1e-9
    assert mass - probabilities[inside].min().item() < top_p + 1e-9  # one fewer would not be enough
    if not inside.all():
        assert probabilities[~inside].max() <= probabilities[inside].min() + 1e-12
    torch.testing.assert_close(kept[inside], probabilities[inside] / mass)


def test_draws_follow_the_probabilities_and_never_pad(tiny: Make) -> None:
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([pick(logits, 1.0, 1.0, generator) for _ in range(4000)])
    counts = torch.bincount(drawn, minlength=4).tolist()
    assert counts[3] == 0
    assert counts[:3] == pytest.approx([2000, 1200, 800], abs=4 * 32)  # 4 standard deviations
