"""Talking with a model: what it is given, how answers come, and what becomes of those that are stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.core.errors import UserError
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer
from llm.chat.talk import Speaker, Talk
from llm.chat.template import CHATML, FILE
from llm.model.config import ModelConfig
from llm.model.generate import generate

LINES = ["Was ist 🍞?", "日本語で。", "ไทย", "العربية", "हिन्दी", "def f(x):"]


@pytest.fixture
def base(
    tiny: Callable[..., ModelConfig], saved_model: Callable[..., Path], corpus: dict[str, Path]
) -> Speaker:
    return Speaker.of("base", saved_model(tiny(context=128)), corpus["tokenizer"])


@pytest.fixture
def tuned(
    tiny: Callable[..., ModelConfig], saved_model: Callable[..., Path], corpus: dict[str, Path]
) -> Speaker:
    folder = saved_model(tiny(context=128), seed=1)
    (folder / FILE).write_text(CHATML, encoding="utf-8")
    return Speaker.of("tuned", folder, corpus["tokenizer"])


@torch.inference_mode()
def greedy(speaker: Speaker, tokens: list[int], most: int, ends: set[int]) -> list[int]:
    """The likeliest tokens one by one, each by a pass over all before it."""
    new: list[int] = []
    while len(new) < most:
        token = int(speaker.model(torch.tensor([[*tokens, *new]]))[0, -1].argmax())
        if token in ends:
            break
        new.append(token)
    return new


def test_an_answer_is_what_follows_all_that_was_said_by_the_template(tuned: Speaker) -> None:
    assert tuned.chat is not None
    talk = Talk(tuned, temperature=0.0, most=8, system="Be brief. 短く。")
    asked: list[dict[str, str]] = [{"role": "system", "content": talk.system}]
    ends = {tuned.chat.stop or -1, end_of_text(tuned.tokenizer)}
    for line in LINES[:2]:
        asked.append({"role": "user", "content": line})
        wanted = greedy(tuned, tuned.chat.prompt(asked), 8, ends)
        pieces = list(talk.answer(line))
        text = tuned.tokenizer.decode(wanted, skip_special_tokens=True)
        assert "".join(pieces) == text
        assert talk.reply is not None
        assert talk.reply.tokens == len(wanted)
        asked.append({"role": "assistant", "content": text})
    assert [dict(one) for one in talk.messages()] == asked
    talk.reset()
    assert talk.messages() == asked[:1]


def test_a_base_model_goes_on_with_the_text(base: Speaker) -> None:
    assert base.chat is None
    talk = Talk(base, temperature=0.0, most=10)
    [wanted] = generate(
        base.model, base.tokenizer, ["import os"], max_new_tokens=10, temperature=0.0, seeds=[0]
    )
    assert "".join(talk.answer("import os")) == wanted


def test_pieces_end_with_whole_characters_whatever_is_drawn(tuned: Speaker) -> None:
    for line in LINES:
        talk = Talk(tuned, temperature=5.0, most=40)
        pieces = list(talk.answer(line))
        assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])
        assert talk.reply is not None
        tokens = list(replace(talk.reply, tokens=0).drawn())
        assert "".join(pieces) == tuned.tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_stopped_answer_stays_as_far_as_it_came(tuned: Speaker) -> None:
    talk = Talk(tuned, temperature=3.0, most=40)
    coming = talk.answer(LINES[0])
    first = next(coming)
    coming.close()
    assert [dict(one) for one in talk.said] == [
        {"role": "user", "content": LINES[0]},
        {"role": "assistant", "content": first},
    ]
    assert talk.reply is not None
    assert talk.reply.tokens >= 1


def test_the_oldest_is_left_out_where_the_context_is_full(tuned: Speaker) -> None:
    assert tuned.chat is not None
    talk = Talk(tuned, temperature=0.0, most=8, system="Be brief.")
    for number in range(6):
        list(talk.answer(f"{number} 日本語 {'x' * 10}"))
    assert talk.left_out > 0
    assert talk.left_out % 2 == 0
    assert talk.reply is not None
    prompt = tuned.tokenizer.decode(talk.reply.prompt, skip_special_tokens=False)
    assert len(talk.reply.prompt) <= 128 - 8
    assert "Be brief." in prompt, "what the system says stays"
    assert "0 日本語" not in prompt
    assert len(talk.said) == 12, "nothing is forgotten"


def test_what_spells_a_special_token_is_refused_and_not_said(tuned: Speaker) -> None:
    talk = Talk(tuned)
    with pytest.raises(UserError, match="spells a special token"):
        list(talk.answer("a<|reserved_1|>b"))
    assert not talk.said


def test_an_exported_folder_can_be_talked_to(tuned: Speaker, corpus: dict[str, Path], tmp_path: Path) -> None:
    from llm.export.stage import write_loadable

    folder = tmp_path / "exported"
    folder.mkdir()
    write_loadable(tuned.model, corpus["tokenizer"], folder, "float32", template=CHATML)
    exported = Speaker.of("exported", folder, folder)
    assert exported.chat is not None
    answers = ["".join(Talk(one, temperature=0.0, most=8).answer(LINES[0])) for one in (tuned, exported)]
    assert answers[0] == answers[1]
    assert load_tokenizer(folder).get_vocab_size() == 500
    assert json.loads((folder / "tokenizer_config.json").read_text())["split_special_tokens"] is False
