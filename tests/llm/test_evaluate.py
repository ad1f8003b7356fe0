from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data_pipeline.stage import LocalContext
from data_pipeline.tokenize.shards import TokenShards
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer, token_bytes
from llm.evaluate.config import EvaluateConfig
from llm.evaluate.stage import choose, evaluate, read
from llm.model.config import ModelConfig
from llm.model.transformer import Transformer, load_model
from llm.score import documents as module
from llm.score.documents import Document, batched, cut, score_documents
from llm.score.replicas import Replicas
from llm.score.statistics import interval

Make = Callable[..., ModelConfig]
Save = Callable[..., Path]


def by_hand(model: Transformer, tokens: np.ndarray, end: int, sizes: np.ndarray) -> dict[str, float]:
    """A document's figures, a token at a time: each from the window it lies in, by the definition."""
    sequence = [end, *tokens.tolist()]
    nats = text_nats = 0.0
    for place in range(1, len(sequence)):
        start = (place - 1) // model.config.context * model.config.context
        with torch.inference_mode():
            logits = model(torch.tensor([sequence[start:place]]))[0, -1].double()
        loss = -logits.log_softmax(-1)[sequence[place]].item()
        nats += loss
        text_nats += loss if sizes[sequence[place]] else 0.0
    size = int(sizes[tokens].sum())
    return {"nats": nats, "text_nats": text_nats, "bits_per_byte": text_nats / size / math.log(2)}


def test_every_document_has_the_figures_that_the_definition_gives(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path
) -> None:
    folder = saved_model(tiny())
    out = tmp_path / "out"
    metrics = evaluate(
        EvaluateConfig(max_documents=None, prompts=()), {**corpus, "model": folder}, out, LocalContext()
    )
    rows = pq.read_table(out / "documents.parquet").to_pylist()
    documents = dict(read(TokenShards(corpus["tokens"], "val")))
    assert [row["id"] for row in rows] == sorted(documents)
    model, sizes = load_model(folder), token_bytes(corpus["tokenizer"])
    end = end_of_text(load_tokenizer(corpus["tokenizer"]))
    shortest = min(rows, key=lambda row: row["tokens"])
    assert shortest["tokens"] > 24, "should be longer than one window"
    for key, value in by_hand(model, documents[shortest["id"]], end, sizes).items():
        assert shortest[key] == pytest.approx(value, rel=1e-6)
    assert all(row["tokens"] == len(documents[row["id"]]) for row in rows)
    assert metrics["loss"] == pytest.approx(
        sum(row["nats"] for row in rows) / sum(row["tokens"] for row in rows)
    )
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    total = sum(row["bits_per_byte"] * row["bytes"] for row in rows)
    assert metrics["bits_per_byte"] == pytest.approx(total / sum(row["bytes"] for row in rows))
    assert {row["source"] for row in rows} == {"stdlib", "email"}
    for source in ("stdlib", "email"):
        its = [row for row in rows if row["source"] == source]
        value = sum(row["bits_per_byte"] * row["bytes"] for row in its) / sum(row["bytes"] for row in its)
        assert metrics[f"bits_per_byte/{source}"] == pytest.approx(value)
        assert json.loads((out / "sources.json").read_text())[source]["documents"] == len(its)


def test_bytes_are_those_of_the_text(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path
) -> None:
    config = EvaluateConfig(max_documents=3, prompts=())
    inputs = {**corpus, "model": saved_model(tiny())}
    metrics = evaluate(config, inputs, tmp_path / "out", LocalContext())
    held_out = len(list(read(TokenShards(corpus["tokens"], "val"))))
    assert metrics["left_out/max_documents"] == held_out - 3 > 0
    texts = pq.read_table(corpus["documents"] / "documents-00000.parquet").to_pylist()
    lengths = {row["id"]: len(row["text"].encode()) for row in texts}
    rows = pq.read_table(tmp_path / "out" / "documents.parquet").to_pylist()
    assert [row["bytes"] for row in rows] == [lengths[row["id"]] for row in rows]


def test_evaluating_twice_writes_the_same_bytes(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path
) -> None:
    inputs = {**corpus, "model": saved_model(tiny())}
    config = EvaluateConfig(max_documents=4, max_new_tokens=8)
    folders = [tmp_path / "one", tmp_path / "two"]
    metrics = [evaluate(config, inputs, folder, LocalContext()) for folder in folders]
    assert metrics[0] == metrics[1]
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()


def test_the_size_of_a_batch_changes_results_by_rounding_only(
    tiny: Make, saved_model: Save, corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {**corpus, "model": saved_model(tiny())}
    config = EvaluateConfig(max_documents=4, prompts=())
    whole = evaluate(config, inputs, tmp_path / "whole", LocalContext())
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    one_by_one = evaluate(config, inputs, tmp_path / "one", LocalContext())
    assert one_by_one == pytest.approx(whole, rel=1e-5)


def test_documents_are_chosen_by_their_ids_alone() -> None:
    documents = [(f"books/{number}", np.zeros(3, np.uint16)) for number in range(50)]
    few, more = choose(documents, 10), choose(reversed(documents), 20)
    assert len(few) == 10
    assert [name for name, _ in few] == sorted(name for name, _ in few)
    assert {name for name, _ in few} < {name for name, _ in more}
    assert len(choose(documents, None)) == 50


def test_only_the_documents_chosen_stay_in_memory() -> None:
    freed: list[int] = []
    most_alive = 0

    def documents() -> Iterator[Document]:
        nonlocal most_alive
        for number in range(500):
            tokens = np.zeros(3, np.uint16)
            weakref.finalize(tokens, freed.append, number)
            most_alive = max(most_alive, number + 1 - len(freed))
            yield f"books/{number}", tokens

    assert len(choose(documents(), 10)) == 10
    assert most_alive < 15


def test_a_document_does_not_hold_the_row_group_it_was_read_from(corpus: dict[str, Path]) -> None:
    for _, tokens in read(TokenShards(corpus["tokens"], "val")):
        assert tokens.base is None


def test_windows_make_every_token_a_target_once() -> None:
    documents = [(str(size), np.arange(1, size + 1, dtype=np.uint16)) for size in (1, 7, 8, 9, 30)]
    for stride in (None, 1, 3, 8):
        windows = cut(documents, end=0, context=8, stride=stride)
        for index, (_, tokens) in enumerate(documents):
            parts = sorted((one for one in windows if one.owner == index), key=lambda one: one.tokens[-1])
            assert parts[0].tokens[0] == 0
            scored = [part.tokens[len(part.tokens) - part.counted :] for part in parts]
            assert np.concatenate(scored).tolist() == tokens.tolist()
            assert all(0 < part.counted < len(part.tokens) <= 9 for part in parts)
            if stride is None:
                assert all(part.counted == len(part.tokens) - 1 for part in parts), "they lie end to end"
            else:
                assert all(len(part.tokens) == 9 for part in parts[1:]), "the context is full"
        lengths = [len(window.tokens) for window in windows]
        assert lengths == sorted(lengths, reverse=True)
        assert [window for batch in batched(windows) for window in batch] == windows


def test_with_a_stride_each_token_is_scored_behind_all_that_its_window_has(tiny: Make) -> None:
    model, context, stride = Transformer(tiny(init_std=0.2)).eval(), 24, 5
    tokens = np.random.default_rng(0).integers(1, 90, 61).astype(np.uint16)
    sizes = np.ones(256, np.int32)
    [row] = score_documents(
        Replicas([model]),
        [("a/1", tokens)],
        sizes=sizes,
        end=0,
        stride=stride,
        progress=lambda done, total: None,
    )
    sequence, nats = [0, *tokens.tolist()], 0.0
    for place in range(1, len(sequence)):
        until = context if place <= context else context + stride * math.ceil((place - context) / stride)
        start = max(0, min(until, len(sequence) - 1) - context)
        with torch.inference_mode():
            logits = model(torch.tensor([sequence[start:place]]))[0, -1].double()
        nats -= logits.log_softmax(-1)[sequence[place]].item()
    assert row["nats"] == pytest.approx(nats, rel=1e-6)


def test_the_interval_of_bits_per_byte_holds_the_truth_as_often_as_it_promises() -> None:
    """Over documents of lengths that differ by orders of magnitude, of which one in so many is hard."""
    draw = np.random.default_rng(7)

    def documents(count: int) -> list[dict[str, float]]:
        sizes = np.exp(draw.normal(6, 1, count)).round() + 1
        rates = np.where(draw.random(count) < 0.1, 3.0, 1.0) + draw.normal(0, 0.1, count)
        return [
            {"bytes": size, "text_nats": size * rate * math.log(2)}
            for size, rate in zip(sizes.tolist(), rates.tolist(), strict=True)
        ]

    population = documents(200_000)
    truth = (
        sum(one["text_nats"] for one in population) / sum(one["bytes"] for one in population) / math.log(2)
    )
    found = [interval(documents(100)) for _ in range(120)]
    held = sum(one["bits_per_byte_low"] <= truth <= one["bits_per_byte_high"] for one in found)
    assert 105 <= held <= 120
    assert interval(documents(9)) == {}
