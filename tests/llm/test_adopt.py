"""What was made elsewhere, adopted: the same ids, the same logits, and refusals of what we can't use."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from data_pipeline.core.errors import Unresolved, UserError
from data_pipeline.documents import read_shard, write_shard
from data_pipeline.stage import LocalContext
from data_pipeline.tokenize.encode import Unsupported, load_encoder
from data_pipeline.tokenize.shards import TokenShards
from data_pipeline.tokenize.stage import TokenizeConfig, tokenize
from data_pipeline.train_tokenizer.stage import PATTERNS
from data_pipeline.train_tokenizer.tokenizer import (
    end_of,
    end_of_text,
    load_tokenizer,
    token_bytes,
    vocab_size,
)
from llm.adopt.config import AdoptConfig
from llm.adopt.stage import adopt
from llm.evaluate.config import EvaluateConfig
from llm.evaluate.stage import evaluate
from llm.export.config import ExportConfig
from llm.export.stage import export
from llm.model.generate import generate_from_folder
from llm.model.layouts import load_folder
from llm.model.transformer import load_model
from llm.pretrain.config import PretrainConfig

TEXTS = (
    "我们在北京学习中文，天气很好。", "日本語のテキスト、カタカナとひらがな", "ภาษาไทยไม่มีช่องว่าง ระหว่างคำ",
    "مرحبا بالعالم، كيف حالك؟", "नमस्ते दुनिया, क्षत्रिय", "def f(x):\n\treturn x**2  # hi\n\n\n    if x: pass\r\n",
    "🙂👩\u200d👩\u200d👧\u200d👦🇫🇷 ✊🏽", "  a   b \n\n  c\t\t d   ", "I'M don't WE'LL 12345678 3.14", "",
    "<|endoftext|>", "a <|endoftext|> b<|im_end|><think>c</think>", "Cafe\u0301 ﬁ ① a\u00a0b",
)  # fmt: skip
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
QWEN = PATTERNS["cl100k"].replace(r"\p{N}{1,3}", r"\p{N}")


def cut_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTE_LEVEL])


def learnt(pre: Any, specials: list[str], normalizer: Any = None, ignore_merges: bool = False) -> Tokenizer:
    """A small byte-level BPE of the kind that a maker of models has."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, Path(__file__).read_text(encoding="utf-8")], trainer)
    return tokenizer


def gpt2() -> tuple[Tokenizer, dict[str, Any]]:
    return learnt(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"]), {}


def llama3() -> tuple[Tokenizer, dict[str, Any]]:
    """One that puts a token before each text, unless it is told not to."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = learnt(cut_by(PATTERNS["cl100k"]), specials, ignore_merges=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    return tokenizer, {"eos_token": {"__type": "AddedToken", "content": "<|eot_id|>", "special": True}}


def qwen() -> tuple[Tokenizer, dict[str, Any]]:
    """One that normalises, and with added tokens that a text may yield."""
    tokenizer = learnt(cut_by(QWEN), ["<|endoftext|>", "<|im_end|>"], normalizers.NFC())
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return tokenizer, {"eos_token": "<|im_end|>"}


def smollm() -> tuple[Tokenizer, dict[str, Any]]:
    digits = pre_tokenizers.Digits(individual_digits=True)
    pre = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return learnt(pre, ["<|endoftext|>", "<|im_end|>"]), {"eos_token": "<|endoftext|>"}


KINDS = {"gpt2": gpt2, "llama3": llama3, "qwen": qwen, "smollm": smollm}
ENDS = {
    "gpt2": "<|endoftext|>",
    "llama3": "<|end_of_text|>",
    "qwen": "<|endoftext|>",
    "smollm": "<|endoftext|>",
}


def save(kind: str, folder: Path) -> Tokenizer:
    """Write a tokenizer of one kind as its maker would."""
    tokenizer, config = KINDS[kind]()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return tokenizer


def adopted(out: Path, **values: Any) -> tuple[dict[str, float], LocalContext]:
    context = LocalContext()
    return adopt(AdoptConfig.model_validate(values), {}, out, context), context


def ids_of(name: Any, folder: Path) -> list[list[int]]:
    offsets, ids = load_encoder(name, folder)(pa.array(TEXTS))
    return [ids[start:end].tolist() for start, end in pairwise(offsets)]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers_on_any_script_and_no_text_yields_a_special_token(
    tmp_path: Path, kind: str
) -> None:
    save(kind, tmp_path / "theirs")
    out = tmp_path / "out"
    metrics, context = adopted(out, type="tokenizer", path=tmp_path / "theirs")
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "theirs" / "tokenizer.json").read_bytes()
    loaded = load_tokenizer(out)
    assert end_of(loaded) == ENDS[kind]
    assert context.notes[0].startswith(f"{ENDS[kind]} ends a document")
    assert metrics["vocab_size"] == vocab_size(loaded)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    expected = [
        theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in TEXTS
    ]
    assert ids_of("tokenizers", out) == expected
    sizes = token_bytes(out)
    normal = [loaded.normalizer.normalize_str(text) if loaded.normalizer else text for text in TEXTS]
    assert [int(sizes[ids].sum()) for ids in expected] == [len(text.encode()) for text in normal]
    assert sizes[end_of_text(loaded)] == 0
    if kind in ("gpt2", "llama3"):
        assert ids_of("gigatoken", out) == expected
    else:
        with pytest.raises(Unsupported, match="gigatoken can't use this tokenizer"):
            load_encoder("gigatoken", out)


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2_s_two_files_are_a_tokenizer(tmp_path: Path, names: tuple[str, str]) -> None:
    tokenizer = save("gpt2", tmp_path / "whole")
    described = json.loads(tokenizer.to_str())["model"]
    (tmp_path / "two").mkdir()
    entries, merges = (tmp_path / "two" / name for name in names)
    entries.write_text(json.dumps(described["vocab"]))
    merges.write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in described["merges"]), encoding="utf-8"
    )
    for name in ("whole", "two"):
        adopted(tmp_path / "out" / name, type="tokenizer", path=tmp_path / name)
    assert ids_of("tokenizers", tmp_path / "out" / "two") == ids_of("tokenizers", tmp_path / "out" / "whole")
    assert load_tokenizer(tmp_path / "out" / "two").get_added_tokens_decoder()[0].special


def test_the_end_of_text_can_be_set_and_stays_when_it_is_adopted_again(tmp_path: Path) -> None:
    save("qwen", tmp_path / "theirs")
    adopted(tmp_path / "first", type="tokenizer", path=tmp_path / "theirs", end_of_text="<|im_end|>")
    _, context = adopted(tmp_path / "second", type="tokenizer", path=tmp_path / "first")
    assert end_of(load_tokenizer(tmp_path / "second")) == "<|im_end|>"
    assert context.notes[0] == "<|im_end|> ends a document: tokenizer_config.json names it"


def test_tokenize_says_that_it_falls_back_and_ends_documents_with_the_tokenizer_s_own_token(
    tmp_path: Path, corpus: dict[str, Path]
) -> None:
    save("smollm", tmp_path / "theirs")
    adopted(tmp_path / "tokenizer", type="tokenizer", path=tmp_path / "theirs", end_of_text="<|im_end|>")
    inputs, context = {**corpus, "tokenizer": tmp_path / "tokenizer"}, LocalContext()
    tokenize(TokenizeConfig(val_fraction=0.2), inputs, tmp_path / "tokens", context)
    assert any("encoding with tokenizers (slower): gigatoken can't use" in note for note in context.notes)
    shards = TokenShards(tmp_path / "tokens", "val")
    assert all(batch.tokens[batch.offsets[1:] - 1].tolist() == [1] * len(batch.ids) for batch in shards)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    save("qwen", folder)
    return folder


def make(kind: str, folder: Path, tokenizer: Path, rows: int = 640, **fields: Any) -> PreTrainedModel:
    """Write a small model of theirs with a tokenizer beside it, its vocabulary padded, as Qwen's is."""
    torch.manual_seed(0)
    llama = {
        "vocab_size": rows, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    shape = {
        "vocab_size": rows,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.3,
    }
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**llama, **fields})),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**{**llama, "head_dim": 12, **fields})),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**{**shape, **fields})),
    }[kind]()
    model.eval().save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return model.eval()


def bits_by_hand(model: PreTrainedModel, folder: Path, texts: list[str]) -> float:
    """Bits per byte of texts that each fit into one sequence, by `transformers` alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats, size = 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        sequence = torch.tensor([[tokenizer.convert_tokens_to_ids("<|endoftext|>"), *ids]])
        with torch.inference_mode():
            logits = model(sequence).logits[0, :-1].double()
        nats += float(torch.nn.functional.cross_entropy(logits, sequence[0, 1:], reduction="sum"))
        size += len(text.encode())
    return nats / (math.log(2) * size)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_an_adopted_model_is_evaluated_as_transformers_computes_it_and_exported_with_its_origin(
    tmp_path: Path, tokenizer: Path, kind: str
) -> None:
    theirs = make(kind, tmp_path / "theirs", tokenizer)
    artifact, documents = tmp_path / "model", tmp_path / "documents"
    metrics, _ = adopted(
        artifact, type="model", path=tmp_path / "theirs", license="MIT", origin="made by a test"
    )
    assert metrics["parameters"] == theirs.num_parameters()
    ours, sequence = load_model(artifact), torch.randint(600, (2, 40))
    with torch.inference_mode():
        torch.testing.assert_close(ours(sequence)[..., :640], theirs(sequence).logits, atol=1e-4, rtol=1e-5)
    with write_shard(documents / "documents-00000.parquet") as shard:
        for number in range(40):
            shard.add(f"s/{number}", f"{number} def f(x):\n    return x <think>", "s", "{}")
    inputs = {"model": artifact, "tokenizer": artifact, "documents": documents, "tokens": tmp_path / "tokens"}
    tokenize(TokenizeConfig(val_fraction=0.5), inputs, inputs["tokens"], LocalContext())
    scores = evaluate(EvaluateConfig(max_new_tokens=4), inputs, tmp_path / "scores", LocalContext())
    held_out = {id for batch in TokenShards(inputs["tokens"], "val") for id in batch.ids}
    rows = [row for batch in read_shard(documents / "documents-00000.parquet") for row in batch.to_pylist()]
    texts = [row["text"] for row in rows if row["id"] in held_out]
    assert scores["bits_per_byte"] == pytest.approx(
        bits_by_hand(theirs, tmp_path / "theirs", texts), abs=1e-4
    )
    manifest = {
        "stage": "adopt", "fingerprint": "0123456789abcdef", "metrics": metrics,
        "config": AdoptConfig(type="model", path=tmp_path / "theirs", license="MIT", origin="made by a test")
        .resolve().identity(),
    }  # fmt: skip
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    export(ExportConfig(), inputs, tmp_path / "out", LocalContext())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| model | made by a test | MIT | `{manifest['config']['content_sha256']}` |" in card
    assert "It was made elsewhere" in card
    assert str(tmp_path) not in card
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        torch.testing.assert_close(back(sequence).logits, theirs(sequence).logits, atol=1e-4, rtol=1e-5)
    chat = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert chat("a<|im_end|>")["input_ids"][-1] == chat.eos_token_id == 1
    assert back.generation_config.eos_token_id == [1, 0]
    assert isinstance(generate_from_folder(tmp_path / "out", "def ", max_new_tokens=5), str)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_kept_without_loss_and_written_alike_each_time(
    tmp_path: Path, tokenizer: Path, dtype: torch.dtype
) -> None:
    make("llama", tmp_path / "theirs", tokenizer, rows=610).to(dtype).save_pretrained(tmp_path / "theirs")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        adopted(tmp_path / name, type="model", path=tmp_path / "theirs")
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    expected = load_folder(tmp_path / "theirs").state_dict()
    weights = load_file(first)
    assert torch.equal(weights["norm.weight"], expected["norm.weight"])
    assert torch.equal(weights["embed_tokens.weight"][:610], expected["embed_tokens.weight"][:610])


def test_a_killed_adoption_goes_on_and_ends_with_the_same_files(tmp_path: Path, tokenizer: Path) -> None:
    make("llama", tmp_path / "theirs", tokenizer)
    metrics, _ = adopted(tmp_path / "out", type="model", path=tmp_path / "theirs")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "out" / "report.md").unlink()
    again, _ = adopted(tmp_path / "out", type="model", path=tmp_path / "theirs")
    assert again == metrics
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_content_licence_and_origin_are_identity_and_the_place_is_not(
    tmp_path: Path, tokenizer: Path
) -> None:
    for name in ("here", "there"):
        shutil.copytree(tokenizer, tmp_path / name)
    here, there = (
        AdoptConfig(type="tokenizer", path=tmp_path / name).resolve() for name in ("here", "there")
    )
    assert here.identity() == there.identity()
    assert str(tmp_path) not in json.dumps(here.identity())
    for changed in ({"license": "MIT"}, {"origin": "x"}, {"revision": "1"}, {"end_of_text": "<|im_end|>"}):
        config = AdoptConfig.model_validate({"type": "tokenizer", "path": tmp_path / "here", **changed})
        assert config.resolve().identity() != here.identity()
    (tmp_path / "here" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="changed since the run was planned"):
        here.resolve()


def test_the_hub_is_asked_for_a_commit_unless_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Unresolved, match="can't be asked for the revision of nobody/nothing"):
        AdoptConfig(type="model", hub="nobody/nothing").resolve()
    commit = "0123456789" * 4
    resolved = AdoptConfig(type="model", hub="nobody/nothing", revision=commit).resolve()
    assert resolved.identity()["revision"] == commit


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"type": "model"}, "say where it is"),
        ({"type": "model", "path": "x", "hub": "a/b"}, "say where it is"),
        ({"type": "documents", "path": "x", "end_of_text": "</s>"}, "documents have none"),
        ({"type": "scores", "path": "x"}, "'tokenizer', 'model', 'documents' or 'tokens'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AdoptConfig.model_validate(values)


def refusal(folder: Path, out: Path, kind: str = "tokenizer", **more: Any) -> str:
    """What is said when a folder is adopted that can't be: one or two lines."""
    with pytest.raises(UserError) as refused:
        adopted(out, type=kind, path=folder, **more)
    said = str(refused.value)
    assert len(said.splitlines()) <= 2
    return said


def other_tokenizers() -> Iterator[tuple[str, Tokenizer]]:
    vocab = {"[UNK]": 0, "a": 1, "b": 2}
    yield "WordPiece", Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    yield "Unigram", Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], 0))
    yield "with ByteFallback", Tokenizer(models.BPE({"a": 0, "<0x00>": 1}, [], byte_fallback=True))
    yield "has no ByteLevel", Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    yield "model.dropout = 0.1", dropping()


def dropping() -> Tokenizer:
    tokenizer, _ = gpt2()
    tokenizer.model.dropout = 0.1
    return tokenizer


def test_tokenizers_that_are_no_byte_level_bpe_are_refused_by_their_kind(tmp_path: Path) -> None:
    for said, tokenizer in other_tokenizers():
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        assert said in refusal(tmp_path, tmp_path / "out"), said
    (tmp_path / "tokenizer.json").unlink()
    for name, said in (("vocab.txt", "WordPiece"), ("tokenizer.model", "SentencePiece")):
        (tmp_path / name).write_text("x")
        assert said in refusal(tmp_path, tmp_path / "out")


def test_damaged_and_missing_files_of_a_tokenizer_are_named(tmp_path: Path) -> None:
    assert "there is nothing at" in refusal(tmp_path / "nowhere", tmp_path / "out")
    assert "there is nothing at" in refusal(tmp_path / ("w" * 300), tmp_path / "out")
    assert "has no tokenizer.json" in refusal(tmp_path, tmp_path / "out")
    save("qwen", tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    for wrong, said in (
        ("", "is empty"),
        (text[:1000], "can't be read"),
        ("[]", "holds no JSON object"),
        ("{}", "describes no tokenizer"),
        (text.replace('"Split"', '"Spilt"'), "can't be read"),
    ):
        (tmp_path / "tokenizer.json").write_text(wrong)
        assert said in refusal(tmp_path, tmp_path / "out")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json can't be read" in refusal(tmp_path, tmp_path / "out")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    said = refusal(tmp_path, tmp_path / "out", end_of_text="<|nothing|>")
    assert "has no <|nothing|>:\nset adopt.end_of_text to one of <|endoftext|>, <|im_end|>" in said
    learnt(pre_tokenizers.ByteLevel(), ["<x>"]).save(str(tmp_path / "tokenizer.json"))
    said = refusal(tmp_path, tmp_path / "out")
    assert "no token is known to end a text:\nset adopt.end_of_text to one of <x>" in said


def test_models_that_can_t_be_used_are_refused_with_the_reason(tmp_path: Path, tokenizer: Path) -> None:
    folder, out = tmp_path / "theirs", tmp_path / "out"
    folder.mkdir()
    assert "it has no config.json" in refusal(folder, out, "model")
    make("llama", folder, tokenizer, rows=200)
    assert "its tokenizer has 602 entries, its model 200" in refusal(folder, out, "model")
    make("llama", folder, tokenizer)
    weights = load_file(folder / "model.safetensors")
    wrong = {
        "is stored as I8, not as float32": {"model.norm.weight": torch.ones(32, dtype=torch.int8)},
        "is stored as F64": {"model.norm.weight": torch.ones(32, dtype=torch.float64)},
        "no finite numbers (norm.weight)": {"model.norm.weight": torch.full((32,), math.nan)},
        "norm.weight has shape [31]": {"model.norm.weight": torch.ones(31)},
    }
    for said, change in wrong.items():
        save_file({**weights, **change}, folder / "model.safetensors", {"format": "pt"})
        assert said in refusal(folder, out, "model")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "can't be read" in refusal(folder, out, "model")
    (folder / "model.safetensors").unlink()
    assert "weights are read from safetensors files only" in refusal(folder, out, "model")
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    assert "a model of type 'mamba', which llmill does not compute" in refusal(folder, out, "model")
    assert "is a file" in refusal(folder / "config.json", out, "model")


def test_documents_and_tokens_of_another_home_are_adopted_as_they_are(
    tmp_path: Path, corpus: dict[str, Path]
) -> None:
    metrics, _ = adopted(tmp_path / "documents", type="documents", path=corpus["documents"])
    name = "documents-00000.parquet"
    assert (tmp_path / "documents" / name).read_bytes() == (corpus["documents"] / name).read_bytes()
    assert metrics["documents"] == pq.read_metadata(corpus["documents"] / name).num_rows
    alone, _ = adopted(tmp_path / "alone", type="documents", path=corpus["documents"] / name)
    assert alone == metrics
    found, _ = adopted(tmp_path / "tokens", type="tokens", path=corpus["tokens"])
    assert found["documents"] == metrics["documents"]
    ours, theirs = (
        TokenShards(folder, "train").read_all() for folder in (tmp_path / "tokens", corpus["tokens"])
    )
    assert np.array_equal(ours, theirs)


def test_documents_and_tokens_that_are_not_ours_are_refused(
    tmp_path: Path, corpus: dict[str, Path], tokenizer: Path
) -> None:
    folder, out = tmp_path / "theirs", tmp_path / "out"
    folder.mkdir()
    assert "holds no documents-*.parquet" in refusal(folder, out, "documents")
    assert "holds no train-*.parquet" in refusal(folder, out, "tokens")
    path = folder / "documents-00000.parquet"
    for rows, said in (
        ({"text": ["a"]}, "has the columns text: string; documents have id, text, source and meta"),
        ({"id": ["a"], "text": [None], "source": ["s"], "meta": ["{}"]}, "has rows without text"),
    ):
        table = pa.table({name: pa.array(values, pa.string()) for name, values in rows.items()})
        pq.write_table(table, path)
        assert said in refusal(folder, out, "documents")
        shutil.rmtree(out, ignore_errors=True)
    path.write_bytes(b"no Parquet")
    assert "is no Parquet file" in refusal(folder, out, "documents")
    for name in ("train-00000.parquet", "val-00000.parquet"):
        pq.write_table(pa.table({"id": ["a"], "tokens": [[1]]}), folder / name)
    assert "no token shard: its metadata lacks" in refusal(folder, out, "tokens")
    adopted(tmp_path / "tokenizer", type="tokenizer", path=tokenizer)
    with pytest.raises(UserError, match="were made with another tokenizer"):
        TokenShards(corpus["tokens"], "val").require_tokenizer(tmp_path / "tokenizer")


def test_a_training_knows_an_adopted_tokenizer_once_it_is_made(tmp_path: Path, tokenizer: Path) -> None:
    make("llama", tmp_path / "start", tokenizer)
    adopted(tmp_path / "tokenizer", type="tokenizer", path=tokenizer)
    config = PretrainConfig.model_validate(
        {"tokens": 64, "batch_tokens": 64, "model": {"context": 64}, "init_from": tmp_path / "start"}
    )
    configs = {"tokenizer": AdoptConfig(type="tokenizer", path=tokenizer)}
    config.check_inputs(configs, {})
    with pytest.raises(UserError, match="a model of another shape"):
        config.check_inputs(configs, {"tokenizer": tmp_path / "tokenizer"})
