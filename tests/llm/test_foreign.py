"""Models of architectures that only `transformers` computes: scored with its numbers, and refused for all else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
)

from data_pipeline.core.errors import UserError
from data_pipeline.stage import LocalContext
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer
from llm.adopt.config import AdoptConfig
from llm.adopt.stage import adopt
from llm.evaluate.config import EvaluateConfig
from llm.evaluate.stage import evaluate
from llm.model.files import Unsupported
from llm.model.foreign import load_foreign
from llm.score.answers import before
from llm.score.config import ScoreConfig
from llm.score.stage import score

CONTEXT = 64
TEXTS = [
    "Guten Morgen, Welt!",
    "吾輩は猫である。名前はまだ無い。" * 5,
    "สวัสดีชาวโลก",
    "नमस्ते दुनिया",
    "مرحبا",
    "x 🦊\r\n",
]
CHOICES = [
    {"query": f"{n} 個の林檎", "choices": [f"と{n}", "は赤い", "🍎 ٣"], "gold": n % 3} for n in range(5)
]
QUESTIONS = [{"question": text, "answers": ["東京"]} for text in ("def f(", "首都は", "ما عاصمة")]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def neox(size: int) -> PreTrainedModel:
    config = GPTNeoXConfig(
        vocab_size=size, max_position_embeddings=CONTEXT, intermediate_size=64, rotary_pct=0.25, **SHAPE
    )
    return GPTNeoXForCausalLM(config)


def opt(size: int) -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=size,
            max_position_embeddings=CONTEXT,
            ffn_dim=64,
            word_embed_proj_dim=32,
            pad_token_id=1,
            **SHAPE,
        )
    )


def bloom(size: int) -> PreTrainedModel:
    """One that names no longest context."""
    return BloomForCausalLM(BloomConfig(vocab_size=size, hidden_size=32, n_layer=2, n_head=2))


def long_llama(size: int) -> PreTrainedModel:
    """A Llama that stretches its positions, as ours does not."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    config = LlamaConfig(
        vocab_size=size,
        max_position_embeddings=CONTEXT,
        intermediate_size=64,
        rope_parameters=rope,
        **SHAPE,
    )
    return LlamaForCausalLM(config)


MODELS: dict[str, Callable[[int], PreTrainedModel]] = {
    "gpt_neox": neox,
    "opt": opt,
    "bloom": bloom,
    "llama": long_llama,
}


@pytest.fixture
def folder_of(tmp_path: Path, corpus: dict[str, Path]) -> Callable[[Callable[[int], PreTrainedModel]], Path]:
    """Makes the folder of a model with weights drawn at random and the corpus's tokenizer."""

    def make(model: Callable[[int], PreTrainedModel], shard: str = "5GB") -> Path:
        torch.manual_seed(1)
        size = load_tokenizer(corpus["tokenizer"]).get_vocab_size()
        theirs = model(size)
        with torch.no_grad():  # far from even, so that a mistake shows
            for parameter in theirs.parameters():
                parameter.mul_(4)
        folder = tmp_path / "theirs"
        theirs.save_pretrained(folder, max_shard_size=shard)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(corpus["tokenizer"] / name, folder)
        return folder

    return make


@pytest.fixture
def asked(tmp_path: Path) -> ScoreConfig:
    """A set, a task of options, and one of answers."""
    files = {"texts": [{"text": text} for text in TEXTS], "choices": CHOICES, "quiz": QUESTIONS}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ScoreConfig.model_validate(
        {
            "sets": [{"name": "texts", "path": tmp_path / "texts.jsonl", "stride": CONTEXT // 2}],
            "tasks": [
                {"name": "choices", "path": tmp_path / "choices.jsonl", "kind": "choice"},
                {
                    "name": "quiz",
                    "path": tmp_path / "quiz.jsonl",
                    "kind": "generation",
                    "max_new_tokens": 6,
                    "stop": [],
                },
            ],
        }
    )


def adopted(folder: Path, out: Path, **settings: Any) -> Path:
    out.mkdir()
    adopt(AdoptConfig.model_validate({"type": "model", "path": folder, **settings}), {}, out, LocalContext())
    return out


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Of each token but the first."""
    logits = model(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(dim=-1)
    return logits[range(len(tokens) - 1), tokens[1:]]


@torch.inference_mode()
def greedy(model: PreTrainedModel, tokens: list[int], end: int) -> list[int]:
    new: list[int] = []
    while (
        len(new) < 6 and (token := int(model(torch.tensor([[*tokens, *new]])).logits[0, -1].argmax())) != end
    ):
        new.append(token)
    return new


@pytest.mark.parametrize("name", MODELS)
def test_its_scores_are_those_of_a_loop_around_transformers(
    name: str, folder_of: Callable[..., Path], asked: ScoreConfig, tmp_path: Path
) -> None:
    folder = folder_of(MODELS[name])
    made = adopted(folder, tmp_path / "adopted", any_architecture=True)
    (tmp_path / "out").mkdir()
    score(asked, {"model": made, "tokenizer": made}, tmp_path / "out", LocalContext())

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(made)
    end = end_of_text(tokenizer)
    documents = pq.read_table(tmp_path / "out" / "set_documents.parquet").to_pylist()
    longest = 2048 if name == "bloom" else CONTEXT
    for text, row in zip(TEXTS, documents, strict=True):
        tokens = [end, *tokenizer.encode(text).ids]
        windows = [tokens[start : start + longest + 1] for start in range(0, len(tokens) - 1, longest)]
        nats = -sum(float(log_probabilities(model, window).sum()) for window in windows)
        assert row["text_nats"] == pytest.approx(nats, rel=1e-4), text
    items = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    for item, row in zip(CHOICES, items[: len(CHOICES)], strict=True):
        sequences = [[end, *tokenizer.encode(f"{item['query']} {choice}").ids] for choice in item["choices"]]
        start = next(place for place, column in enumerate(zip(*sequences)) if len(set(column)) > 1)  # noqa: B905
        nats = [-float(log_probabilities(model, one)[start - 1 :].sum()) for one in sequences]
        assert row["nats"] == pytest.approx(nats, rel=1e-4)
        assert row["chosen_by_sum"] == min(range(3), key=nats.__getitem__)
    for question, row in zip(QUESTIONS, items[len(CHOICES) :], strict=True):
        new = greedy(model, [end, *tokenizer.encode(question["question"]).ids], end)
        assert row["answer"] == before(tokenizer.decode(new), [])


def test_a_model_in_several_files_is_copied_whole(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = folder_of(neox, shard="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    made = adopted(folder, tmp_path / "adopted", any_architecture=True)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        assert torch.equal(load_foreign(made).logits(tokens), theirs)


def test_it_is_adopted_only_where_that_is_allowed_and_then_only_scored(
    folder_of: Callable[..., Path], corpus: dict[str, Path], tmp_path: Path
) -> None:
    folder = folder_of(neox)
    with pytest.raises(Unsupported, match=r"type 'gpt_neox'(.|\n)*any_architecture"):
        AdoptConfig(type="model", path=folder).resolve()
    made = adopted(folder, tmp_path / "adopted", any_architecture=True)
    with pytest.raises(UserError, match="it can be scored, no more"):
        evaluate(EvaluateConfig(prompts=()), {**corpus, "model": made}, tmp_path / "out", LocalContext())


def test_what_we_compute_is_ours_with_the_same_identity_whether_others_are_allowed(
    folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    def plain(size: int) -> PreTrainedModel:
        shape = {**SHAPE, "intermediate_size": 64}
        return LlamaForCausalLM(LlamaConfig(vocab_size=size, max_position_embeddings=CONTEXT, **shape))

    folder = folder_of(plain)
    assert (adopted(folder, tmp_path / "adopted", any_architecture=True) / "model.json").exists()
    one, other = (
        AdoptConfig(type="model", path=folder, any_architecture=allowed).resolve().identity()
        for allowed in (False, True)
    )
    assert one == other


def roberta(size: int) -> PreTrainedModel:
    """One whose positions count from 2, so that it reads fewer tokens than its config says."""
    config = RobertaConfig(
        vocab_size=size, max_position_embeddings=CONTEXT, intermediate_size=64, is_decoder=True, **SHAPE
    )
    return RobertaForCausalLM(config)


def test_a_model_that_reads_what_follows_or_less_than_it_says_is_refused(
    folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = folder_of(roberta)
    with pytest.raises(UserError, match="reads fewer than the 64 tokens"):
        adopted(folder, tmp_path / "less", any_architecture=True)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"is_decoder": true', '"is_decoder": false'))
    with pytest.raises(UserError, match="reads what follows a token"):
        adopted(folder, tmp_path / "not causal", any_architecture=True)


def test_a_damaged_one_or_one_with_code_of_its_own_is_refused(
    folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = folder_of(neox)
    weights = load_file(folder / "model.safetensors")
    missing = next(name for name in weights if name.endswith("dense.weight"))
    save_file({name: one for name, one in weights.items() if name != missing}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks weights: .*dense"):
        adopted(folder, tmp_path / "lacking", any_architecture=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('this must never be run')\n")
    with pytest.raises(UserError, match="can't load"):
        adopted(folder, tmp_path / "with code", any_architecture=True)
