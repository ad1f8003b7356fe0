"""Exports read by older versions of `transformers`, each in a folder of its own beside the environment's torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.stage import LocalContext
from llm.export.config import ExportConfig
from llm.export.stage import export
from llm.model.config import ModelConfig
from llm.model.transformer import load_model

pytestmark = pytest.mark.long

VERSIONS = {
    "4.51.3": ("huggingface_hub==0.36.0", "tokenizers==0.21.4"),
    "4.56.2": ("huggingface_hub==0.36.0", "tokenizers==0.22.1"),
}
SHAPES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"kv_heads": 2, "rope_theta": 777.0, "norm_eps": 1e-3},
    "Qwen3ForCausalLM": {"kv_heads": 2, "qk_norm": True, "head_dim": 12, "rope_theta": 5e5},
    "GPT2LMHeadModel": {"positions": "learned", "hidden": 48, "norm_eps": 1e-3},
}
SCRIPT = Path(__file__).parents[1] / "old_reader.py"


@pytest.fixture(scope="module", params=VERSIONS)
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A version, and the folder that holds it, to be put on the path."""
    version, site = request.param, tmp_path_factory.mktemp("site")
    wanted = [f"transformers=={version}", *VERSIONS[version]]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"transformers {version} can't be had here: {done.stderr.strip().splitlines()[-1:]}")
    return version, site


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_older_transformers_compute_our_logits_pad_and_truncate(
    tiny: Callable[..., ModelConfig],
    saved_model: Callable[..., Path],
    corpus: dict[str, Path],
    tmp_path: Path,
    old: tuple[str, Path],
    architecture: str,
    tied: bool,
) -> None:
    version, site = old
    folder, out = saved_model(tiny(tie_embeddings=tied, **SHAPES[architecture])), tmp_path / "out"
    export(ExportConfig(), {**corpus, "model": folder}, out, LocalContext())
    model, tokens = load_model(folder), torch.randint(500, (2, 24))
    found_in = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(out), json.dumps(tokens.tolist()), str(found_in)],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(found_in.read_text(encoding="utf-8"))
    assert (found["version"], found["architecture"]) == (version, architecture)
    with torch.inference_mode():
        expected = model(tokens)[..., :500]
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, atol=1e-4, rtol=0)
    assert found["together"] == found["alone"]
    assert found["longest"] == model.config.context
    assert sorted(map(sum, found["padded"]))[0] < len(found["padded"][0])
