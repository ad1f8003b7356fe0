"""GGUF files: what `transformers` reads out of them, how text is cut, and which tokenizers are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf_files import PATTERNS, SHAPES, changed, exported, trained
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from data_pipeline.core.errors import UserError
from data_pipeline.stage import LocalContext
from data_pipeline.train_tokenizer.stage import TokenizerConfig
from llm.export.config import ExportConfig
from llm.export.gguf import compare_tensors, interleaved, write_gguf
from llm.export.llama_cpp import CUTS, TRIALS, choose_pre_tokenizer, require_reproducible, words
from llm.export.stage import export
from llm.model.config import ModelConfig
from llm.model.layouts import read_config
from llm.model.transformer import load_model

Make = Callable[..., ModelConfig]
Save = Callable[..., Path]
KINDS = ["F32", "F16", "Q8_0"]
CHAT = "{% for m in messages %}{{ m['content'] }}<|reserved_1|>{% endfor %}"


@pytest.fixture(scope="module")
def cl100k(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(corpus["documents"], "cl100k", tmp_path_factory.mktemp("cl100k"))


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", SHAPES)
def test_transformers_reads_the_same_model_out_of_each_kind(
    tiny: Make, saved_model: Save, cl100k: Path, tmp_path: Path, layout: str, tied: bool
) -> None:
    folder = saved_model(tiny(tie_embeddings=tied, **SHAPES[layout]))
    out, notes = exported({"tokenizer": cl100k, "model": folder}, tmp_path / "out", gguf=KINDS)
    assert notes == []
    tokens = torch.randint(500, (2, 24))
    with torch.inference_mode():
        ours = load_model(folder)(tokens)[..., :500]
        for kind, tolerance in (("F32", 1e-4), ("F16", 0.03), ("Q8_0", 0.6)):
            theirs = AutoModelForCausalLM.from_pretrained(
                out,
                gguf_file=f"model-{kind}.gguf",
                config=AutoConfig.from_pretrained(out),
                dtype=torch.float32,
            )
            torch.testing.assert_close(theirs(tokens).logits, ours, atol=tolerance, rtol=0)
    assert "Those of model-F32.gguf differ by at most " in (out / "report.md").read_text()
    for kind in KINDS:
        tensors = {tensor.name: tensor for tensor in GGUFReader(out / f"model-{kind}.gguf").tensors}
        assert ("output.weight" in tensors) is not tied
        assert tensors["blk.0.ffn_up.weight"].tensor_type == GGMLQuantizationType[kind]
        assert tensors["output_norm.weight"].tensor_type == GGMLQuantizationType.F32


def test_the_file_says_what_the_config_says(
    tiny: Make, saved_model: Save, cl100k: Path, tmp_path: Path
) -> None:
    folder = saved_model(tiny(**SHAPES["qwen3"]))
    out, _ = exported({"tokenizer": cl100k, "model": folder}, tmp_path / "out", gguf=["F16"], name="名前 🙂")
    found = fields(out / "model-F16.gguf")
    expected = {
        "general.architecture": "qwen3", "general.name": "名前 🙂", "general.file_type": 1,
        "qwen3.context_length": 24, "qwen3.embedding_length": 32, "qwen3.block_count": 2,
        "qwen3.feed_forward_length": 128, "qwen3.attention.head_count": 4, "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 16, "qwen3.attention.value_length": 16, "qwen3.rope.dimension_count": 16,
        "qwen3.rope.freq_base": 777.0, "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(1e-3),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "dbrx", "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert not {"tokenizer.chat_template", "tokenizer.ggml.eot_token_id"} & found.keys()
    tokenizer = Tokenizer.from_file(str(cl100k / "tokenizer.json"))
    assert found["tokenizer.ggml.tokens"] == [tokenizer.id_to_token(id) for id in range(500)]
    assert found["tokenizer.ggml.token_type"] == [3] * 8 + [1] * 492


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_else(
    tiny: Make, saved_model: Save, cl100k: Path, tmp_path: Path
) -> None:
    inputs = {"tokenizer": cl100k, "model": saved_model(tiny())}
    outs = [exported(inputs, tmp_path / name, gguf=KINDS)[0] for name in ("one", "two")]
    without, _ = exported(inputs, tmp_path / "three")
    for kind in KINDS:
        one, two = (out / f"model-{kind}.gguf" for out in outs)
        assert one.read_bytes() == two.read_bytes()
    names = {path.name for path in outs[0].iterdir()} - {path.name for path in without.iterdir()}
    assert names == {f"model-{kind}.gguf" for kind in KINDS}


def test_what_turns_together_is_together() -> None:
    rows = torch.arange(16.0)[:, None].expand(16, 3)
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_rows_that_are_no_blocks_are_kept_in_16_bits_which_is_said(
    tiny: Make, saved_model: Save, cl100k: Path, tmp_path: Path
) -> None:
    inputs = {"tokenizer": cl100k, "model": saved_model(tiny(head_dim=12))}
    _, notes = exported(inputs, tmp_path / "out", gguf=["Q8_0"])
    assert notes == [
        "model-Q8_0.gguf: 2 matrices (blk.0.attn_output.weight ...) are F16, for rows must be blocks of 32"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_other_weights_is_noticed(
    tiny: Make, saved_model: Save, cl100k: Path, tmp_path: Path, kind: Any
) -> None:
    inputs = {"tokenizer": cl100k, "model": saved_model(tiny())}
    out, _ = exported(inputs, tmp_path / "out", gguf=[kind])
    path = out / f"model-{kind}.gguf"
    compare_tensors(path, out, read_config(out), kind)
    tensor = next(one for one in GGUFReader(path, "r+").tensors if one.name == "blk.1.attn_k.weight")
    tensor.data[0] = tensor.data[1]
    with pytest.raises(RuntimeError, match=r"holds other weights than .* in blk\.1\.attn_k\.weight"):
        compare_tensors(path, out, read_config(out), kind)


def test_weights_that_a_kind_cannot_hold_are_refused(
    tiny: Make, saved_model: Save, cl100k: Path, tmp_path: Path
) -> None:
    inputs = {"tokenizer": cl100k, "model": saved_model(tiny())}
    out, _ = exported(inputs, tmp_path / "out", gguf=["F32"])
    weights = load_file(out / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with (
        np.errstate(over="ignore"),
        pytest.raises(UserError, match=r"F16 can't hold numbers as large as those of blk\.0\.ffn_up"),
    ):
        write_gguf(out, "F16", name="x")
    assert write_gguf(out, "F32", name="x") == write_gguf(out, "Q8_0", name="x") == []


def test_a_write_that_fails_leaves_no_file(
    tiny: Make, saved_model: Save, cl100k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"tokenizer": cl100k, "model": saved_model(tiny())}

    def full(writer: GGUFWriter, **_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space left"):
        exported(inputs, tmp_path / "out", gguf=["F32"])
    assert not [path.name for path in (tmp_path / "out").iterdir() if "gguf" in path.name]


@pytest.mark.parametrize(("pattern", "name"), PATTERNS.items(), ids=PATTERNS.values())
def test_a_pattern_has_the_name_of_what_cuts_alike(pattern: str, name: str) -> None:
    assert choose_pre_tokenizer(TokenizerConfig(pattern=pattern).pre_tokenizer(), ignore_merges=False) == name


def test_the_trials_tell_all_names_apart() -> None:
    cuts = {name: patterns for (name, whole), patterns in CUTS.items() if not whole}
    assert len({*cuts.values()}) == len(cuts)
    cut = [[words(TokenizerConfig(pattern=one).pre_tokenizer(), text) for text in TRIALS] for one in PATTERNS]
    assert all(one != other for place, one in enumerate(cut) for other in cut[:place])


DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
"""How SmolLM's tokenizer cuts text."""


def test_a_tokenizer_that_was_made_elsewhere_has_its_name(cl100k: Path, tmp_path: Path) -> None:
    smollm = changed(cl100k, tmp_path / "smollm", lambda it: it.update(pre_tokenizer=DIGITS))
    gpt2 = changed(cl100k, tmp_path / "gpt2", lambda it: it.update(pre_tokenizer=DIGITS["pretokenizers"][1]))
    llama3 = changed(cl100k, tmp_path / "llama3", lambda it: it["model"].update(ignore_merges=True))
    assert [require_reproducible(one) for one in (smollm, gpt2, llama3)] == ["smollm", "gpt-2", "llama-bpe"]


def test_a_pattern_that_llama_cpp_lacks_is_refused_when_planned_and_before_any_file(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path
) -> None:
    said = r"llama\.cpp has no rules that cut text as this tokenizer does \(qwen35, the nearest, differ on \d+ of"
    config = ExportConfig(gguf=("F16",))
    with pytest.raises(UserError, match=said) as error:
        config.check_inputs({"tokenizer": TokenizerConfig()}, {})
    assert "train_tokenizer.pattern=cl100k" in str(error.value)
    with pytest.raises(UserError, match=said):
        config.check_inputs({}, {"tokenizer": corpus["tokenizer"]})
    with pytest.raises(UserError, match=said):
        export(config, {**corpus, "model": saved_model(tiny())}, tmp_path / "out", LocalContext())
    assert not (tmp_path / "out").exists()
    config.check_inputs({"tokenizer": TokenizerConfig(pattern="cl100k")}, {})
    config.check_inputs({}, {})
    ExportConfig().check_inputs({"tokenizer": TokenizerConfig()}, {})


def added(content: str, **how: bool) -> Callable[[dict[str, Any]], None]:
    """Add a token to a ``tokenizer.json``."""
    rules = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)

    def add(description: dict[str, Any]) -> None:
        ids = [*description["model"]["vocab"].values(), *(one["id"] for one in description["added_tokens"])]
        description["added_tokens"].append({"id": max(ids) + 1, "content": content, **rules, **how})

    return add


def both(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda description: [change(description) for change in changes] and None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda it: it.update(normalizer={"type": "NFC"}), r"it normalises text \(NFC\)"),
        (added("ใหม่", lstrip=True), r"its token 'ใหม่' is found by a rule of its own \(lstrip\)"),
        (added("<|新|>", special=True, rstrip=True), r"its token '<\|新\|>' is found .* \(rstrip\)"),
        (added("word", single_word=True), r"\(single_word\)"),
        (both(added("日本"), added("本語")), "its tokens '日本' and '本語' may overlap in a text"),
        (
            lambda it: (it["model"]["vocab"].pop("Ā"), it["model"].update(unk_token="<|reserved_2|>")),
            r"bytes that its vocabulary lacks become <\|reserved_2\|>",
        ),
        (
            lambda it: it["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
            "the nearest, differ on",
        ),
        (lambda it: it["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "the nearest, differ on"),
    ],
    ids=["normalizer", "lstrip", "rstrip", "word", "overlap", "unknown", "prefix", "removed"],
)  # fmt: skip
def test_what_llama_cpp_does_not_do_is_refused(
    cl100k: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    with pytest.raises(UserError, match=said) as error:
        require_reproducible(changed(cl100k, tmp_path / "changed", change))
    assert len(str(error.value).splitlines()) <= 2


def test_runs_of_white_space_may_be_tokens(cl100k: Path, tmp_path: Path) -> None:
    folder = changed(cl100k, tmp_path / "changed", both(*map(added, ("    ", "  ", "   "))))
    assert require_reproducible(folder) == "dbrx"


def test_tokens_that_were_added_are_marked_and_ids_without_an_entry_unused(
    tiny: Make, saved_model: Save, cl100k: Path, tmp_path: Path
) -> None:
    tokens = both(added("<think>"), added("<|ende 🙂|>", special=True))
    folder = changed(cl100k, tmp_path / "changed", tokens)
    inputs = {"tokenizer": folder, "model": saved_model(tiny(vocab_size=507))}
    out, _ = exported(inputs, tmp_path / "out", gguf=["F16"])
    found = fields(out / "model-F16.gguf")
    assert found["tokenizer.ggml.tokens"][500:] == [
        "<think>", "<|ende 🙂|>", *(f"[PAD{id}]" for id in range(502, 507))
    ]  # fmt: skip
    assert found["tokenizer.ggml.token_type"][500:] == [4, 3, 5, 5, 5, 5, 5]
    clash = changed(cl100k, tmp_path / "clash", added("[PAD501]"))
    with pytest.raises(UserError, match=r"has an entry like \[PAD1\]"):
        exported({**inputs, "tokenizer": clash}, tmp_path / "clashing", gguf=["F16"])


AROUND: dict[str, Any] = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|reserved_3|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|reserved_3|>": {"id": "<|reserved_3|>", "ids": [4], "tokens": ["<|reserved_3|>"]}},
}  # fmt: skip


def test_what_the_tokenizer_puts_around_a_text_is_said(
    tiny: Make, saved_model: Save, cl100k: Path, tmp_path: Path
) -> None:
    def change(it: dict[str, Any]) -> None:
        it.update(post_processor=AROUND)

    inputs = {"tokenizer": cl100k, "model": saved_model(tiny())}
    begins = changed(cl100k, tmp_path / "begins", change, bos_token="<|reserved_3|>")
    out, _ = exported({**inputs, "tokenizer": begins}, tmp_path / "out", gguf=["F16"])
    found = fields(out / "model-F16.gguf")
    assert found["tokenizer.ggml.bos_token_id"] == 4
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)
    other = changed(cl100k, tmp_path / "other", change)
    with pytest.raises(UserError, match=r"puts around a text what llama\.cpp does not"):
        exported({**inputs, "tokenizer": other}, tmp_path / "others", gguf=["F16"])


def test_the_chat_template_and_the_end_of_a_turn_are_in_the_file(
    tiny: Make, saved_model: Save, cl100k: Path, tmp_path: Path
) -> None:
    model = saved_model(tiny())
    (model / "chat_template.jinja").write_text(CHAT)
    out, _ = exported({"tokenizer": cl100k, "model": model}, tmp_path / "out", gguf=["F16"])
    found = fields(out / "model-F16.gguf")
    assert found["tokenizer.chat_template"] == CHAT
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (0, 2)


def test_kinds_are_identity_in_one_order_and_none_is_as_before() -> None:
    assert "gguf" not in ExportConfig().identity()
    assert ExportConfig.model_validate({"gguf": ["Q8_0", "F16", "Q8_0"]}).identity()["gguf"] == [
        "F16",
        "Q8_0",
    ]
    with pytest.raises(ValidationError, match="'F32', 'F16' or 'Q8_0'"):
        ExportConfig.model_validate({"gguf": ["Q4_K"]})
    with pytest.raises(ValidationError, match=r"name holds 'phi3', by which llama\.cpp reads special tokens"):
        ExportConfig.model_validate({"gguf": ["F16"], "name": "My-Phi3"})
    assert ExportConfig(name="My-Phi3").gguf == ()
