from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from data_pipeline.core.errors import UserError
from data_pipeline.download.stage import DownloadConfig
from data_pipeline.stage import LocalContext
from data_pipeline.train_tokenizer.tokenizer import load_tokenizer
from llm.export.config import ExportConfig
from llm.export.model_card import architecture as architecture_of
from llm.export.model_card import sources
from llm.export.stage import export, logits_difference
from llm.model.config import ModelConfig
from llm.model.generate import generate, generate_from_folder
from llm.model.layouts import load_folder, transformers_config
from llm.model.transformer import load_model

Make = Callable[..., ModelConfig]
Save = Callable[..., Path]


SHAPES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"kv_heads": 2},
    "Qwen3ForCausalLM": {"kv_heads": 2, "qk_norm": True, "head_dim": 12},
    "GPT2LMHeadModel": {"positions": "learned"},
}


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_loads_the_folder_and_computes_our_logits(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path, architecture: str, tied: bool
) -> None:
    config = tiny(tie_embeddings=tied, **SHAPES[architecture])
    folder, out = saved_model(config), tmp_path / "out"
    metrics = export(ExportConfig(), {**corpus, "model": folder}, out, LocalContext())
    model = load_model(folder)
    assert metrics == {
        "parameters": model.parameter_count(),
        "logits_max_abs_difference": pytest.approx(0, abs=1e-4),
    }
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert type(theirs).__name__ == architecture
    assert theirs.num_parameters() == model.parameter_count()
    text = "def main(path):\n    return None<|endoftext|>"
    ids = AutoTokenizer.from_pretrained(out)(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == load_tokenizer(corpus["tokenizer"]).encode(text).ids
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, model(ids)[..., :500], atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", SHAPES)
def test_the_config_has_what_moved_between_versions_in_both_places(tiny: Make, architecture: str) -> None:
    config = tiny(rope_theta=777.0, **SHAPES[architecture])
    written = transformers_config(config, 0, "bfloat16")
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    if architecture != "GPT2LMHeadModel":
        assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 777.0


def test_a_batch_of_texts_is_padded_and_long_ones_are_cut(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(ExportConfig(), {**corpus, "model": saved_model(tiny())}, out, LocalContext())
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert (
        len(tokenizer("x = 1\n" * 500, truncation=True)["input_ids"]) == model.config.max_position_embeddings
    )
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    sampled = {"do_sample": False, "max_new_tokens": 4, "return_full_text": False}
    prompts = ["def main(path):\n    return", "import"]
    together = [texts[0]["generated_text"] for texts in writer(prompts, **sampled)]
    assert together == [writer(prompt, **sampled)[0]["generated_text"] for prompt in prompts]


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("LlamaForCausalLM", ["| layout | Llama ", "| hidden width (SwiGLU) |"]),
        ("Qwen3ForCausalLM", ["| layout | Qwen3 ", "| hidden width (SwiGLU) |"]),
        ("GPT2LMHeadModel", ["| layout | GPT-2 ", "| hidden width (GELU) |"]),
    ],
)
def test_the_card_names_the_layout(tiny: Make, architecture: str, said: list[str]) -> None:
    table = architecture_of(tiny(**SHAPES[architecture]))
    assert all(part in table for part in said)


def test_an_export_that_computes_otherwise_is_noticed(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path
) -> None:
    folder, out = saved_model(tiny()), tmp_path / "out"
    export(ExportConfig(), {**corpus, "model": folder}, out, LocalContext())
    weights = load_file(out / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][0] += 0.1
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    assert logits_difference(load_model(folder), out) > 1e-3


def test_a_model_that_no_layout_can_hold_is_not_exported(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path
) -> None:
    inputs = {**corpus, "model": saved_model(tiny(logit_softcap=15.0))}
    with pytest.raises(UserError, match="logit_softcap is set, but neither Llama"):
        export(ExportConfig(), inputs, tmp_path / "out", LocalContext())


def test_our_own_model_comes_back_from_the_folder_and_writes_the_same_text(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path
) -> None:
    folder, out = saved_model(tiny(qk_norm=True, rope_theta=777.0)), tmp_path / "out"
    export(ExportConfig(), {**corpus, "model": folder}, out, LocalContext())
    ours, back = load_model(folder), load_folder(out)
    tokens = torch.randint(500, (2, 24))
    with torch.inference_mode():
        assert torch.equal(ours(tokens), back(tokens))
    tokenizer = load_tokenizer(corpus["tokenizer"])
    [expected] = generate(ours, tokenizer, ["import "], max_new_tokens=20, seeds=[5])
    assert generate_from_folder(out, "import ", max_new_tokens=20, seed=5) == expected


def test_bfloat16_weights_are_stored_rounded(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path
) -> None:
    folder, out = saved_model(tiny()), tmp_path / "out"
    metrics = export(ExportConfig(dtype="bfloat16"), {**corpus, "model": folder}, out, LocalContext())
    assert metrics["logits_max_abs_difference"] <= 1e-4
    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def write_manifest(folder: Path, config: dict[str, Any], metrics: dict[str, float]) -> Path:
    """A manifest of a stage, with things in it that no card may hold."""
    folder.mkdir()
    manifest = {
        "stage": folder.name,
        "fingerprint": "0123456789abcdef" * 4,
        "config": config,
        "metrics": metrics,
    }
    (folder / "manifest.json").write_text(json.dumps({**manifest, "started": "2026", "host": "h"}))
    return folder


def test_the_model_card_tells_what_the_manifests_hold_and_exporting_twice_writes_the_same_bytes(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "novel.txt").write_text("It was a dark night.\n" * 60)
    download = DownloadConfig.model_validate(
        {
            "sources": [
                {
                    "kind": "local",
                    "name": "novels",
                    "path": str(tmp_path / "novel.txt"),
                    "license": "CC0 | MIT",
                },
                {
                    "kind": "installed-python",
                    "name": "python",
                    "url": "https://python.org",
                    "max_bytes": 10_000,
                },
            ]
        }
    )
    found = download.resolve().identity()
    inputs = {
        **corpus,
        "download": write_manifest(tmp_path / "download", found, {"documents": 12.0}),
        "model": saved_model(tiny()),
        "evaluate": write_manifest(tmp_path / "evaluate", {}, {"bits_per_byte": 1.23456, "tokens": 12345.0}),
    }
    for name in ("one", "two"):
        export(ExportConfig(name="a-name"), inputs, tmp_path / name, LocalContext())
    card = (tmp_path / "one" / "README.md").read_text()
    python = found["sources"][1]
    for expected in (
        "# a-name",
        "| bits_per_byte | 1.235 |",
        "| novels | local |  | CC0 \\| MIT | 1 | 1.3 kB |",
        f"| python | installed-python | https://python.org | not stated | {python['files']} |",
        "`0123456789ab`",
        "12,345",
        "split_special_tokens=False",
    ):
        assert expected in card
    assert str(tmp_path) not in card
    assert "2026" not in card
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_card_names_data_set_commit_and_addresses() -> None:
    hub = {
        "name": "web", "kind": "huggingface", "dataset": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT",
        "split": "train", "revision": "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", "license": "odc-by",
        "url": None, "files": 1, "bytes": 0,
    }  # fmt: skip
    http = {
        "name": "books", "kind": "http", "urls": ["https://a.org/1.txt", "https://a.org/2.txt"],
        "license": None, "url": None, "files": 2, "bytes": 2_500_000,
    }  # fmt: skip
    assert sources({"config": {"sources": [hub, http]}}).splitlines()[2:] == [
        "| web | huggingface | HuggingFaceFW/fineweb-edu, config sample-10BT, split train, revision "
        "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9 | odc-by | 1 | unknown |",
        "| books | http | https://a.org/1.txt, https://a.org/2.txt | not stated | 2 | 2.5 MB |",
    ]


def test_the_report_says_how_near_the_logits_are_and_what_was_written(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(ExportConfig(), {**corpus, "model": saved_model(tiny(qk_norm=True))}, out, LocalContext())
    report = (out / "report.md").read_text()
    assert "Qwen3ForCausalLM, weights in float32" in report
    for path in out.iterdir():
        assert path.name == "report.md" or f"| {path.name} | {path.stat().st_size:,} |" in report
