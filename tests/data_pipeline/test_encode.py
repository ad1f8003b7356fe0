from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from corpora import prose, write_documents

from data_pipeline.stage import LocalContext
from data_pipeline.tokenize import encode
from data_pipeline.tokenize.encode import CHECKED_CHARACTERS, find_fault, load_encoder
from data_pipeline.train_tokenizer.stage import TokenizerConfig, train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizer")
    documents = write_documents(root / "dedup", {f"s/{n}": prose(n) for n in range(60)})
    train_tokenizer(TokenizerConfig(vocab_size=600), {"documents": documents}, root / "out", LocalContext())
    return root / "out"


def random_words(seed: int, words: int) -> pa.Array:
    """A text of words of eight letters that hardly any two are alike."""
    letters = np.random.default_rng(seed).integers(97, 123, (words, 9), np.uint8)
    letters[:, 8] = ord(" ")
    return pa.array([letters.tobytes().decode()])


def test_new_words_without_end_do_not_fill_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """36 MB of them take gigatoken 350 MB unless its tokenizer is replaced."""
    monkeypatch.setattr(encode, "CACHE_BYTES", 1 << 25)
    encoder = load_encoder("gigatoken", folder)
    encoder(random_words(0, 1000))
    before = psutil.Process().memory_info().rss
    for seed in range(8):
        encoder(random_words(seed, 500_000))
    assert psutil.Process().memory_info().rss - before < 220_000_000  # 156 MB were seen


def test_a_replaced_tokenizer_gives_the_same_ids(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = pa.array([prose(n) for n in range(5)])
    expected = [part.tolist() for part in load_encoder("gigatoken", folder)(texts)]
    monkeypatch.setattr(encode, "CACHE_BYTES", -1)
    encoder = load_encoder("gigatoken", folder)
    for _ in range(3):
        assert [part.tolist() for part in encoder(texts)] == expected


def test_long_texts_are_compared_at_their_beginning_only(folder: Path) -> None:
    slow = load_encoder("tokenizers", folder)
    seen = []

    def watched(texts: pa.Array) -> encode.Encoded:
        seen.extend(texts.to_pylist())
        return slow(texts)

    assert find_fault(pa.array([prose(1, 20_000), "short"]), watched, slow) is None
    assert [len(text) for text in seen] == [CHECKED_CHARACTERS, 5]
