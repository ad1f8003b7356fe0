"""Fixed sets of texts in an evaluation: bits per byte of the texts as they are, whatever a tokenizer makes of them."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, normalizers

from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import pin
from data_pipeline.stage import LocalContext
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer, token_bytes
from llm.evaluate.config import EvaluateConfig
from llm.evaluate.stage import evaluate
from llm.model.config import ModelConfig
from llm.model.transformer import load_model
from llm.score.config import SetConfig
from llm.score.fixed import score_fixed
from llm.score.replicas import Replicas
from llm.score.sets import read_texts

Make = Callable[..., ModelConfig]
Save = Callable[..., Path]
TEXTS = [
    "def f(x):\r\n    return x\r\n",
    "日本語のテキスト。",
    "ภาษาไทยไม่มีช่องว่าง",
    "نص عربي ‏مع علامات",
    "हिन्दी में लिखा हुआ",
    "👩‍👩‍👧‍👦 🍞 e\u0301 é \u0000 \ufffd \ufeff",
    "a long English text. " * 12,
    "<|endoftext|> is text here",
    *(f"number {number}" for number in range(4)),
]


def lines_of(texts: list[str], path: Path) -> Path:
    """Texts as JSON lines, of which every second one has a name."""
    rows = [{"words": text, **({"id": f"t{place}"} if place % 2 else {})} for place, text in enumerate(texts)]
    content = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def config_of(**fields: Any) -> EvaluateConfig:
    chosen = {"name": "fixed", "text": "words", **fields}
    return EvaluateConfig.model_validate({"max_documents": 2, "prompts": (), "sets": [chosen]})


def test_each_text_has_the_bits_that_a_token_at_a_time_gives_over_its_own_bytes(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path
) -> None:
    inputs = {**corpus, "model": saved_model(tiny(context=48))}
    path = lines_of(TEXTS, tmp_path / "set.jsonl.gz")
    metrics = evaluate(config_of(path=path, stride=16), inputs, tmp_path / "out", LocalContext())
    rows = pq.read_table(tmp_path / "out" / "set_documents.parquet").to_pylist()
    assert [row["id"] for row in rows[:2]] == ["fixed/1", "t1"]
    assert [row["bytes"] for row in rows] == [len(text.encode()) for text in TEXTS]
    assert all(row["as_it_is"] for row in rows)

    model, tokenizer = load_model(inputs["model"]), load_tokenizer(inputs["tokenizer"])
    sizes = token_bytes(inputs["tokenizer"])
    assert [int(sizes[tokenizer.encode(text).ids].sum()) for text in TEXTS] == [row["bytes"] for row in rows]
    by_token = pq.read_table(tmp_path / "out" / "set_tokens.parquet").to_pylist()
    assert [(row["set"], row["id"], row["text"]) for row in by_token] == [
        (row["set"], row["id"], text) for row, text in zip(rows, TEXTS, strict=True)
    ]
    total = 0.0
    for document, row, text in zip(by_token, rows, TEXTS, strict=True):
        sequence, nats = [end_of_text(tokenizer), *tokenizer.encode(text).ids], 0.0
        for place in range(1, len(sequence)):
            start = (place - 1) // 48 * 48
            with torch.inference_mode():
                logits = model(torch.tensor([sequence[start:place]]))[0, -1].double()
            nats -= logits.log_softmax(-1)[sequence[place]].item()
            assert sum(document["token_nats"][:place]) == pytest.approx(nats, rel=1e-4)
        assert row["text_nats"] == pytest.approx(nats, rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
        short = len(sequence) <= 49
        assert (row["sliding_nats"] == pytest.approx(nats, rel=1e-5)) is short
        total += nats
    size = sum(len(text.encode()) for text in TEXTS)
    for document, row in zip(by_token, rows, strict=True):
        assert document["token_bytes"] == sizes[tokenizer.encode(document["text"]).ids].tolist()
        assert len(document["token_nats"]) == row["tokens"]
        assert math.fsum(document["token_nats"]) == pytest.approx(row["text_nats"], rel=1e-12)
    assert metrics["fixed/bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert (
        metrics["fixed/bits_per_byte_low"]
        < metrics["fixed/bits_per_byte"]
        < metrics["fixed/bits_per_byte_high"]
    )
    assert "| fixed | 12 |" in (tmp_path / "out" / "report.md").read_text()


def test_a_tokenizer_that_changes_texts_is_said_and_the_bytes_stay_those_of_the_text(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(corpus["tokenizer"] / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    context = LocalContext()
    config = config_of(path=lines_of(["plain", "e\u0301"], tmp_path / "set.jsonl")).resolve()
    fixed = score_fixed(
        Replicas([load_model(saved_model(tiny()))]), load_tokenizer(folder), config,
        folder=folder, out=tmp_path / "out", context=context,
    )  # fmt: skip
    assert [(row["bytes"], row["as_it_is"]) for row in fixed.sets["fixed"]] == [(5, True), (3, False)]
    assert [one is None for one in fixed.tokens[0]["token_nats"].to_pylist()] == [False, True]
    assert context.notes == ["fixed: the tokenizer changes 1 of its texts"]


def test_a_set_is_read_from_each_format_and_known_by_its_checksum(tmp_path: Path) -> None:
    table = pa.table({"id": ["a", "b", "c"], "words": ["一", "", "two"], "other": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\r\nwhole text\n"))
    found = {}
    for name in ("a.parquet", "a.txt.gz"):
        chosen = SetConfig(name="s", path=tmp_path / name, text="words")
        found[name] = list(read_texts(chosen, *pin([chosen.path], "evaluate.sets")))
    assert found == {
        "a.parquet": [("a", "一"), ("c", "two")],
        "a.txt.gz": [("s/1", "one\r\nwhole text\n")],
    }
    right = hashlib.sha256((tmp_path / "a.txt.gz").read_bytes()).hexdigest()
    named = config_of(path=tmp_path / "a.txt.gz", sha256=right).resolve().identity()
    assert named == config_of(path=tmp_path / "a.txt.gz").resolve().identity()
    with pytest.raises(UserError, match=f"has the sha256 {right}, not {'0' * 64}"):
        config_of(path=tmp_path / "a.txt.gz", sha256="0" * 64).resolve()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"words": "a"}\n\n{"text": "b"}\n', "row 3: it has no text in the field words"),
        ("a.jsonl", '{"words": 3}\n', "row 1: it has no text in the field words"),
        ("a.jsonl", '["a"]\n', "row 1: it has no text in the field words"),
        ("a.jsonl", '{"words": "\\ud800"}\n', "row 1: half of a surrogate pair is no text"),
        ("a.jsonl", '{"words": \n', "line 1: no JSON"),
        ("a.jsonl", '{"words": ""}\n', "the set fixed has no text"),
        ("a.parquet", "no table", "can't be read"),
        ("a.csv", "a,b\n", "a set is a file of .jsonl, .parquet or .txt"),
    ],
)
def test_what_is_no_set_is_refused_with_the_row_that_is_wrong(
    tiny: Make,
    saved_model: Save,
    corpus: dict[str, Path],
    tmp_path: Path,
    name: str,
    content: str,
    message: str,
) -> None:
    (tmp_path / name).write_text(content)
    inputs = {**corpus, "model": saved_model(tiny())}
    with pytest.raises(UserError) as refused:
        evaluate(config_of(path=tmp_path / name), inputs, tmp_path / "out", LocalContext())
    assert message in str(refused.value)
