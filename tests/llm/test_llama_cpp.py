"""llama.cpp itself, as the package llama-cpp-python builds it, reads our GGUF files: ids, logits, continuations."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import PATTERNS, SHAPES, changed, exported, texts, trained
from transformers import AutoTokenizer

from data_pipeline.train_tokenizer.tokenizer import load_tokenizer
from llm.model.config import ModelConfig
from llm.model.transformer import Transformer, load_model

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"),
]
Make = Callable[..., ModelConfig]
Save = Callable[..., Path]
TEXTS = 1000
CHAT = (
    "{% for m in messages %}<|reserved_0|>{{ m['role'] }}\n{{ m['content'] }}<|reserved_1|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|reserved_0|>assistant\n{% endif %}"
)


def loaded(path: Path, **settings: Any) -> Any:
    """Load a file with keys and values of attention in fp32; llama.cpp's default is fp16."""
    from llama_cpp import Llama

    kept = {"type_k": 0, "type_v": 0, "n_threads": 1, "n_threads_batch": 1}
    return Llama(str(path), n_ctx=0, logits_all=True, verbose=False, **kept, **settings)


def ids_of(llama: Any, text: str, *, special: bool = False) -> list[int]:
    """Return a text's ids, with what the file says to put around it."""
    return list(llama.tokenize(text.encode(), add_bos=True, special=special))


def logits_of(llama: Any, tokens: list[int]) -> np.ndarray:
    """Return logits ``(T, V)`` after each of the tokens."""
    llama.reset()
    llama.eval(tokens)
    return np.array(llama.scores[: len(tokens)])


def take(llama: Any, tokens: list[int], count: int) -> list[int]:
    """Return llama.cpp's likeliest continuation, whatever ends texts."""
    llama.reset()
    return [int(token) for token in islice(llama.generate(tokens, temp=0.0, repeat_penalty=1.0), count)]


@torch.inference_mode()
def shortfall(model: Transformer, tokens: list[int], continuation: list[int]) -> float:
    """Return how far logits of a continuation are below those of the likeliest tokens, at most: 0 if it is greedy."""
    logits_TV = model(torch.tensor([tokens + continuation]))[0, len(tokens) - 1 : -1]
    taken_T = logits_TV.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    return float((logits_TV.max(1).values - taken_T).max())


@pytest.fixture(scope="module")
def tokenizers(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tokenizers by llama.cpp's name for how they cut text."""
    root = tmp_path_factory.mktemp("tokenizers")
    found = {name: trained(corpus["documents"], pattern, root / name) for pattern, name in PATTERNS.items()}
    digits = {"type": "Digits", "individual_digits": True}
    cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    smollm = {"type": "Sequence", "pretokenizers": [digits, cut]}
    rules = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)

    def change(it: dict[str, Any]) -> None:
        it.update(pre_tokenizer=smollm)
        it["added_tokens"].append({"id": 500, "content": "<think>", **rules})

    found["smollm"] = changed(found["gpt-2"], root / "smollm", change)
    found["llama-bpe"] = changed(
        found["dbrx"], root / "llama-bpe", lambda it: it["model"].update(ignore_merges=True)
    )
    return found


@pytest.mark.parametrize("name", [*PATTERNS.values(), "smollm", "llama-bpe"])
def test_ids_are_equal_on_a_thousand_texts(
    tiny: Make, saved_model: Save, tokenizers: dict[str, Path], tmp_path: Path, name: str
) -> None:
    inputs = {"tokenizer": tokenizers[name], "model": saved_model(tiny(vocab_size=503))}
    out, _ = exported(inputs, tmp_path / "out", gguf=["F16"])
    llama, tokenizer = loaded(out / "model-F16.gguf"), load_tokenizer(tokenizers[name])
    assert llama.metadata["tokenizer.ggml.pre"] == name
    tried = [*texts(TEXTS), "a<|endoftext|>b <think>c</think>", "<|reserved_1|>", ""]
    wrong = [text for text in tried if ids_of(llama, text) != tokenizer.encode(text).ids]
    assert wrong == []
    other = loaded(out / "model-F16.gguf", kv_overrides={"tokenizer.ggml.pre": "default"})
    assert any(ids_of(other, text) != ids_of(llama, text) for text in tried)
    plain = AutoTokenizer.from_pretrained(out)
    read = "日本<|endoftext|>\n<|reserved_1|> x<think>"
    assert ids_of(llama, read, special=True) == plain(read, split_special_tokens=False)["input_ids"]
    assert llama.token_eos() == tokenizer.token_to_id("<|endoftext|>")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", SHAPES)
def test_logits_and_greedy_continuations_are_ours(
    tiny: Make, saved_model: Save, tokenizers: dict[str, Path], tmp_path: Path, layout: str, tied: bool
) -> None:
    folder = saved_model(tiny(context=64, tie_embeddings=tied, **SHAPES[layout]))
    inputs = {"tokenizer": tokenizers["dbrx"], "model": folder}
    out, _ = exported(inputs, tmp_path / "out", gguf=["F32", "F16", "Q8_0"])
    model, tokenizer = load_model(folder), load_tokenizer(tokenizers["dbrx"])
    prompts = [tokenizer.encode(text).ids[:24] for text in texts(20)]
    tokens = torch.randint(500, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = model(tokens)[0, :, :500].numpy()
    exact = 0.01 if layout == "gpt2" else 5e-4  # llama.cpp looks GELU up in a table of 16 bits
    for kind, tolerance in (("F32", exact), ("F16", 0.05), ("Q8_0", 0.8)):
        llama = loaded(out / f"model-{kind}.gguf")
        np.testing.assert_allclose(logits_of(llama, tokens[0].tolist()), ours, atol=tolerance, rtol=0)
        if kind == "F32":
            short = [shortfall(model, prompt, take(llama, prompt, 32)) for prompt in prompts]
            assert max(short) <= (2 * exact if layout == "gpt2" else 0)


def test_a_conversation_is_the_same_tokens_and_its_turn_ends_there(
    tiny: Make, saved_model: Save, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    from llama_cpp import llama_vocab_eot, llama_vocab_is_eog
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    model = saved_model(tiny())
    (model / "chat_template.jinja").write_text(CHAT)
    out, _ = exported({"tokenizer": tokenizers["qwen35"], "model": model}, tmp_path / "out", gguf=["F16"])
    llama, theirs = loaded(out / "model-F16.gguf"), AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": text} for text in ("สวัสดี नमस्ते 🙂", "x = 1\n\n", "你好，世界")]
    render = Jinja2ChatFormatter(
        template=llama.metadata["tokenizer.chat_template"],
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
    )
    prompt = render(messages=messages).prompt
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids_of(llama, prompt, special=True) == wanted
    vocabulary = llama._model.vocab
    assert [id for id in range(500) if llama_vocab_is_eog(vocabulary, id)] == [0, 2]
    assert llama_vocab_eot(vocabulary) == 2
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
