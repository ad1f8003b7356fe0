"""Scores of tasks' items, held to a plain loop that reads one text after the other."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer
from llm.model.config import ModelConfig
from llm.model.transformer import Transformer
from llm.score.documents import token_nats
from llm.score.encode import Option, encode
from llm.score.prompts import Item, Kind, draw_shots, render
from llm.score.replicas import Replicas
from llm.score.scorer import Row, score

Make = Callable[..., ModelConfig]
CHOICES: list[Item] = [
    {"query": "def f(x):", "choices": ["return x", "return", "pass  # 何も"], "gold": 2},
    {"query": "日本の首都は", "choices": ["東京", "京都", "東"], "gold": 0},
    {"query": "भारत", "choices": ["में", "मैं 🍞", "में और"], "gold": 1},
    {"query": "", "choices": ["a", "b"], "gold": 0},
]
SCHEMAS: list[Item] = [
    {"context_options": ["The cat saw the cat", "The cat saw the dog"], "continuation": "run.", "gold": 1},
    {"context_options": ["قالت سارة", "قال عمر"], "continuation": "شكرا", "gold": 0},
]
PAIRS: list[Item] = [
    {"sentence_good": "import os, sys", "sentence_bad": "import sys os,"},
    {"sentence_good": "ภาษาไทย", "sentence_bad": "ไทยภาษา"},
]
CONTINUATIONS: list[Item] = [
    {"context": "25 - 759 = ", "continuation": " -734"},
    {"context": "  if x:\n", "continuation": "return None"},
]
ITEMS: dict[Kind, list[Item]] = {
    "choice": CHOICES,
    "schema": SCHEMAS,
    "pairs": PAIRS,
    "continuation": CONTINUATIONS,
}


@pytest.fixture(scope="module")
def tokenizer(corpus: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(corpus["tokenizer"])


@torch.inference_mode()
def alone(model: Transformer, option: Option) -> tuple[list[float], bool]:
    """An option's losses, from one forward pass over it alone, and whether each of its tokens is the likeliest."""
    [logits_TV] = model(torch.tensor([option.tokens]))
    logs_TV = logits_TV.double().log_softmax(-1)
    places = range(option.start, len(option.tokens))
    nats = [-logs_TV[place - 1, option.tokens[place]].item() for place in places]
    return nats, all(int(logits_TV[place - 1].argmax()) == option.tokens[place] for place in places)


@pytest.mark.parametrize("shape", [{}, {"kv_heads": 2, "qk_norm": True}, {"positions": "learned"}])
def test_options_laid_into_a_row_have_the_scores_that_each_has_alone(
    tiny: Make, tokenizer: Tokenizer, shape: dict[str, Any]
) -> None:
    model = Transformer(tiny(context=96, init_std=0.2, **shape)).eval()
    end = end_of_text(tokenizer)
    items = [encode(render(kind, item), tokenizer, end, 96) for kind in ITEMS for item in ITEMS[kind]]
    found = dict(score(Replicas([model]), items))
    assert sorted(found) == list(range(len(items)))
    greedy = []
    for number, options in enumerate(items):
        for option, scored in zip(options, found[number], strict=True):
            nats, likeliest = alone(model, option)
            assert scored.nats == pytest.approx(nats, abs=1e-4)
            assert scored.greedy == likeliest
            greedy.append(scored.greedy)
            assert len(scored.nats) == len(option.tokens) - option.start > 0
    assert any(len(Row(options).tokens) < sum(len(one.tokens) for one in options) for options in items)


def test_several_copies_share_the_batches_and_find_the_same_bits(
    tiny: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.score.scorer.BATCH_TOKENS", 256)
    monkeypatch.setattr("llm.score.documents.BATCH_TOKENS", 256)
    model = Transformer(tiny(context=96, init_std=0.2)).eval()
    copies = Replicas([model, *(copy.deepcopy(model) for _ in range(2))])
    worked: Counter[int] = Counter()
    together = Barrier(3)  # all are at work at once

    def count(module: Transformer, *_: Any) -> None:
        worked[id(module)] += 1
        if worked[id(module)] == 1:
            together.wait(60)

    for one in copies.models:
        one.embed_tokens.register_forward_hook(lambda *_, one=one: count(one))
    items = [encode(render(kind, item), tokenizer, 0, 96) for kind in ITEMS for item in ITEMS[kind]] * 9
    documents = [(str(size), np.arange(size) % 90) for size in range(40, 400, 7)]

    def found(replicas: Replicas) -> tuple[Any, Any]:
        scored = {
            number: [(one.nats.tobytes(), one.greedy) for one in options]
            for number, options in score(replicas, items)
        }
        nats = token_nats(replicas, documents, end=0, progress=lambda *_: None)
        return scored, [one.tobytes() for one in nats]

    by_three = found(copies)
    assert len(worked) == 3
    assert found(Replicas([model])) == by_three


def test_the_likeliest_continuation_is_found_to_be_that(tiny: Make) -> None:
    model = Transformer(tiny(init_std=0.2)).eval()
    tokens = [1, 2, 3]
    for _ in range(4):
        with torch.inference_mode():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    worst = [*tokens[:-1], (tokens[-1] + 1) % 100]
    [(_, found)] = score(Replicas([model]), [[Option(tokens, 3), Option(worst, 3)]])
    assert [one.greedy for one in found] == [True, False]


def choose_as_core(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], gold: int, *, at_the_end: bool
) -> tuple[int, bool]:
    """Choose as nanochat's core_eval does: by the mean loss of what is not common; and whether that is right."""
    rows = [[end_of_text(tokenizer), *tokenizer.encode(text).ids] for text in texts]
    same = 0
    if at_the_end:
        while same < min(map(len, rows)) and len({row[-1 - same] for row in rows}) == 1:
            same += 1
        starts = [len(row) - same for row in rows]
    else:
        while same < min(map(len, rows)) and len({row[same] for row in rows}) == 1:
            same += 1
        starts = [same] * len(rows)
    means = []
    for row, start in zip(rows, starts, strict=True):
        with torch.inference_mode():
            logs = model(torch.tensor([row]))[0].double().log_softmax(-1)
        means.append(-logs[range(start - 1, len(row) - 1), row[start:]].mean().item())
    chosen = means.index(min(means))
    return chosen, chosen == gold


@pytest.mark.parametrize("shots", [0, 2])
def test_what_is_chosen_is_what_the_rule_of_core_chooses(
    tiny: Make, tokenizer: Tokenizer, shots: int
) -> None:
    model = Transformer(tiny(context=256, init_std=0.3), seed=3).eval()
    items = [
        {"query": f"question {number}:", "choices": [f"{word} {number}" for word in ("one", "två", "三", "أربعة")],
         "gold": number % 4}
        for number in range(12)
    ]  # fmt: skip
    chosen = set()
    for place, item in enumerate(items):
        solved = draw_shots(items, place, shots, seed=1234)
        assert item not in solved
        prompt = render("choice", item, solved, "\nAnswer: ")
        before = "".join(f"{one['query']}\nAnswer: {one['choices'][one['gold']]}\n\n" for one in solved)
        texts = [f"{before}{item['query']}\nAnswer: {choice}" for choice in item["choices"]]
        assert prompt.texts == tuple(texts)
        [(_, found)] = score(Replicas([model]), [encode(prompt, tokenizer, end_of_text(tokenizer), 256)])
        ours = int(np.argmin([one.nats.mean() for one in found]))
        chosen.add(ours)
        expected = choose_as_core(model, tokenizer, texts, item["gold"], at_the_end=False)
        assert (ours, ours == prompt.gold) == expected
    assert len(chosen) > 1


def test_shots_are_those_that_nanochat_draws() -> None:
    items = [{"context": str(number), "continuation": "x"} for number in range(50)]
    assert [one["context"] for one in draw_shots(items, 7, 3, seed=1234)] == ["39", "32", "49"]
    assert draw_shots(items, 7, 0, seed=1234) == []


def test_what_has_no_room_is_cut_off_at_the_left_and_what_counts_stays(tokenizer: Tokenizer) -> None:
    item = {"query": "x = 1\n" * 200, "choices": ["alpha beta", "gamma"], "gold": 0}
    whole = encode(render("choice", item), tokenizer, 0, 10_000)
    short = encode(render("choice", item), tokenizer, 0, 16)
    for long, cut in zip(whole, short, strict=True):
        assert len(cut.tokens) == 16
        assert long.tokens[long.start :] == cut.tokens[cut.start :]
        assert cut.cut == len(long.tokens) - 16
    assert {option.cut for option in whole} == {0}


@pytest.mark.parametrize(
    "texts", [["same", "same"], ["東", "東京"], ["a", "a b"]], ids=["equal", "beginning", "word"]
)
def test_options_that_begin_alike_or_are_alike_have_something_that_counts(
    tokenizer: Tokenizer, texts: list[str]
) -> None:
    item = {"query": "q", "choices": texts, "gold": 0}
    for options in (
        encode(render("choice", item), tokenizer, 0, 99),
        encode(
            render("schema", {"context_options": texts, "continuation": "x", "gold": 0}), tokenizer, 0, 99
        ),
    ):
        assert all(1 <= option.start < len(option.tokens) for option in options)


def test_a_token_across_the_seam_counts(tokenizer: Tokenizer) -> None:
    prompt = render("continuation", {"context": "self", "continuation": ".x = 1"}, delimiter="")
    [option] = encode(prompt, tokenizer, 0, 99)
    text = tokenizer.decode(option.tokens[option.start :])
    assert "self.x = 1".endswith(text)
    assert text.endswith(".x = 1")
