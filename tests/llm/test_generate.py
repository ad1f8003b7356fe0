from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from data_pipeline.core.errors import UserError
from data_pipeline.train_tokenizer.tokenizer import END_OF_TEXT, end_of_text, load_tokenizer
from llm.model.config import ModelConfig
from llm.model.generate import draw, generate, nucleus, open_folder, pick, stream
from llm.model.transformer import Transformer

Make = Callable[..., ModelConfig]


def uncached(
    model: Transformer, tokens: list[int], most: int, temperature: float, top_p: float, seed: int
) -> list[int]:
    """The tokens after ``tokens``, with the whole window read anew for each of them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = list(tokens)
    for _ in range(most):
        with torch.inference_mode():
            logits = model(torch.tensor([tokens[-model.config.context :]]))[0, -1]
        tokens.append(pick(logits, temperature, top_p, generator))
    return tokens[-most:]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "shape",
    [{"kv_heads": 2}, {"qk_norm": True, "tie_embeddings": True}, {"positions": "learned"}],
    ids=["llama", "qwen3", "gpt2"],
)
def test_prompts_of_any_length_go_on_together_as_each_would_alone_without_a_cache(
    tiny: Make, shape: dict[str, Any], temperature: float
) -> None:
    """From within the context, up to it, over it while going on, and from beyond it."""
    model = Transformer(tiny(init_std=0.3, **shape)).eval()
    prompts = [torch.randint(500, (length,)).tolist() for length in (1, 7, 20, 24, 25, 40)]
    seeds = range(3, 9)
    drawn = draw(model, prompts, most=12, end=None, temperature=temperature, top_p=0.9, seeds=seeds)
    for prompt, seed, tokens in zip(prompts, seeds, drawn, strict=True):
        assert tokens == uncached(model, prompt, 12, temperature, 0.9, seed)
    assert len({tuple(tokens) for tokens in drawn}) == len(drawn)


def test_a_sequence_that_ends_leaves_the_others_as_they_were(tiny: Make) -> None:
    model = Transformer(tiny(init_std=0.3)).eval()
    prompts = [[1], [2, 3], [4, 5, 6]]
    free = draw(model, prompts, most=20, end=None, temperature=1.0, top_p=1.0, seeds=(0, 1, 2))
    end = free[1][4]
    ended = draw(model, prompts, most=20, end=end, temperature=1.0, top_p=1.0, seeds=(0, 1, 2))
    assert len(ended[1]) <= 4
    for tokens, its in zip(free, ended, strict=True):
        assert its == tokens[: tokens.index(end) if end in tokens else None]


def test_a_token_costs_one_position(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(tiny()).eval()
    read: list[tuple[int, ...]] = []
    embed = model.embed_tokens.forward

    def watched(tokens: torch.Tensor) -> torch.Tensor:
        read.append(tuple(tokens.shape))
        return embed(tokens)

    monkeypatch.setattr(model.embed_tokens, "forward", watched)
    draw(model, [[1, 2, 3], [4]], most=4, end=None, temperature=0, top_p=1.0, seeds=(0, 0))
    assert read == [(2, 3), (2, 1), (2, 1), (2, 1)]


def test_the_seed_fixes_the_text(tiny: Make, corpus: dict[str, Path]) -> None:
    model, tokenizer = Transformer(tiny(init_std=0.2)).eval(), load_tokenizer(corpus["tokenizer"])
    texts = generate(model, tokenizer, ["def "] * 3, max_new_tokens=40, seeds=(1, 1, 2))
    assert texts[0] == texts[1] != texts[2]
    assert texts[0]
    assert generate(model, tokenizer, [], seeds=()) == []


def test_text_ends_where_the_model_ends_it(tiny: Make, corpus: dict[str, Path]) -> None:
    model, tokenizer = Transformer(tiny()).eval(), load_tokenizer(corpus["tokenizer"])
    end = end_of_text(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.norm.weight.zero_()
    settings: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "seeds": [14]}
    tokens = draw(model, [[end]], most=100, end=None, **settings)[0]
    assert end in tokens, "every token is as likely as any; with this seed the end of text comes early"
    before = tokens[: tokens.index(end)]
    [text] = generate(model, tokenizer, [""], max_new_tokens=100, **settings)
    assert text == tokenizer.decode(before, skip_special_tokens=True)
    [cut] = generate(model, tokenizer, [""], max_new_tokens=5, **settings)
    assert cut == tokenizer.decode(before[:5], skip_special_tokens=True)
    assert END_OF_TEXT not in text


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


def test_a_stream_gives_the_text_in_whole_characters_as_it_is_drawn(
    tiny: Make, corpus: dict[str, Path]
) -> None:
    """From a model with random weights: most bytes are no characters, or parts of some."""
    model, tokenizer = Transformer(tiny(init_std=0.3)).eval(), load_tokenizer(corpus["tokenizer"])
    settings: dict[str, Any] = {"max_new_tokens": 60, "temperature": 1.5, "top_p": 1.0}
    for seed in range(6):
        [expected] = generate(model, tokenizer, ["ö def "], seeds=[seed], **settings)
        pieces = stream(model, tokenizer, "ö def ", seed=seed, **settings)
        read = list(pieces)
        assert "".join(read) == expected
        assert len(read) > 1
    few = {**settings, "max_new_tokens": 10**9}
    assert next(stream(model, tokenizer, "def ", seed=0, **few)), "the rest is not drawn first"


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
def test_the_lower_the_temperature_the_likelier_the_token(tiny: Make, temperature: float) -> None:
    model = Transformer(tiny(init_std=0.3)).eval()
    likeliest = draw(model, [[1, 2]], most=8, end=None, temperature=0, top_p=1.0, seeds=[0])
    assert draw(model, [[1, 2]], most=8, end=None, temperature=temperature, top_p=0.9, seeds=[7]) == likeliest
    assert pick(torch.tensor([1.0, 2.0, -torch.inf]), 1e300, 1.0, torch.Generator()) in (0, 1)


def foreign(folder: Path, tokenizer: Path, change: str) -> None:
    """A folder of a Llama as `transformers` saves one, in which one thing is not as in an export of ours."""
    config = LlamaConfig(
        vocab_size=400 if change == "vocabulary" else 500, hidden_size=32, intermediate_size=40,
        num_hidden_layers=1, num_attention_heads=4, attention_bias=change == "bias",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    if change != "tokenizer":
        text = (tokenizer / "tokenizer.json").read_text()
        text = text.replace(END_OF_TEXT, "</s>") if change == "end" else text
        (folder / "tokenizer.json").write_text(text)
    if change == "weights":
        (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    if change in ("config", "heads", "list"):
        raw = json.loads((folder / "config.json").read_text()) | {"num_attention_heads": 5}
        text = {"config": "{", "heads": json.dumps(raw), "list": "[]"}[change]
        (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tokenizer", "has no tokenizer.json: name a folder that llmill exported"),
        ("end", "did not export: its tokenizer has no"),
        ("vocabulary", r"or more entries than the model \(400\)"),
        ("bias", "asks for what our model does not compute: attention_bias = True"),
        ("weights", r"model\.safetensors can't be read"),
        ("config", r"config\.json can't be read"),
        ("list", r"config\.json holds no JSON object"),
        ("heads", "transformers can't read .*multiple of the number of attention heads"),
    ],
)
def test_a_folder_that_is_no_export_of_ours_is_refused_with_the_reason(
    corpus: dict[str, Path], tmp_path: Path, change: str, said: str
) -> None:
    foreign(tmp_path, corpus["tokenizer"], change)
    with pytest.raises(UserError, match=said):
        open_folder(tmp_path)
