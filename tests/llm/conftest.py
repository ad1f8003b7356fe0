"""A small real corpus: some modules of Python's standard library, tokenized by the real stages."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.documents import write_shard
from data_pipeline.stage import LocalContext
from data_pipeline.tokenize.stage import TokenizeConfig, tokenize
from data_pipeline.train_tokenizer.stage import TokenizerConfig, train_tokenizer
from llm.model.config import ModelConfig
from llm.model.transformer import Transformer, save_model

VOCAB_SIZE = 500  # not a multiple of 64, so that padding is exercised


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random tokens in each run of a test, and whichever tests run before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Inputs of pretrain and evaluate: documents, their tokenizer and their tokens."""
    root = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_path("stdlib"))
    with write_shard(root / "documents" / "documents-00000.parquet") as shard:
        for path in sorted(library.glob("[a-f]*.py")):
            shard.add(f"stdlib/{path.name}", path.read_text(errors="replace")[:8000], "stdlib", "{}")
        for path in sorted((library / "email").glob("*.py")):
            shard.add(f"email/{path.name}", path.read_text(errors="replace")[:1000], "email", "{}")
    folders = {name: root / name for name in ("documents", "tokenizer", "tokens")}
    context = LocalContext()
    train_tokenizer(TokenizerConfig(vocab_size=VOCAB_SIZE), folders, folders["tokenizer"], context)
    tokenize(TokenizeConfig(val_fraction=0.2), folders, folders["tokens"], context)
    return folders


@pytest.fixture
def tiny() -> Callable[..., ModelConfig]:
    """A model config of two small layers, with whatever fields a test wants otherwise."""

    def make(**fields: object) -> ModelConfig:
        shape = {"layers": 2, "heads": 4, "width": 32, "context": 24, "vocab_size": VOCAB_SIZE, **fields}
        return ModelConfig.model_validate(shape)

    return make


@pytest.fixture
def saved_model(tmp_path: Path) -> Callable[..., Path]:
    """Save a model with lively weights as pretrain would, and give its folder."""

    def save(config: ModelConfig, seed: int = 0) -> Path:
        model = Transformer(config.model_copy(update={"init_std": 0.2}), seed=seed)
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        folder = tmp_path / f"model-{seed}"
        save_model(config, weights, folder)
        return folder

    return save


@pytest.fixture
def inputs(
    corpus: dict[str, Path], tiny: Callable[..., ModelConfig], saved_model: Callable[..., Path]
) -> dict[str, Path]:
    """Inputs of a training that goes on from a small model."""
    return {"tokenizer": corpus["tokenizer"], "model": saved_model(tiny(context=256))}
