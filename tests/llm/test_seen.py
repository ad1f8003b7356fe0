"""Items and documents of an evaluation that the model was trained on: found, counted, and left out of second scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from corpora import prose, read_documents, write_documents
from scipy.stats import binomtest

from data_pipeline.stage import LocalContext, Metrics
from data_pipeline.tokenize.shards import TokenShards
from data_pipeline.tokenize.stage import TokenizeConfig, tokenize
from llm.evaluate.config import EvaluateConfig
from llm.evaluate.stage import evaluate, read
from llm.evaluate.trained_on import trained_on
from llm.model.config import ModelConfig
from llm.score.config import ScoreConfig
from llm.score.stage import score
from llm.score.statistics import interval

Inputs = dict[str, Path]
SPLIT = TokenizeConfig(val_fraction=0.4)


def describe(folder: Path, stage: str, inputs: dict[str, str], config: dict[str, Any]) -> Path:
    """Write the part of a manifest by which what was made from what is found."""
    named = {type_: {"stage": one, "fingerprint": f"of {one}"} for type_, one in inputs.items()}
    manifest = {"stage": stage, "fingerprint": f"of {stage}", "inputs": named, "config": config}
    (folder / "manifest.json").write_text(json.dumps(manifest, allow_nan=False))
    return folder


@pytest.fixture
def inputs(
    tiny: Callable[..., ModelConfig], saved_model: Callable[..., Path], corpus: Inputs, tmp_path: Path
) -> Inputs:
    """The folders of a run that trained on documents of ours."""
    texts = {f"s/{number}": prose(number, 60) for number in range(30)}
    folders = {**corpus, "documents": write_documents(tmp_path / "documents", texts)}
    tokenize(SPLIT, folders, tmp_path / "tokens", LocalContext())
    tokens = describe(tmp_path / "tokens", "tokenize", {"documents": "dedup"}, SPLIT.identity())
    model = describe(saved_model(tiny(context=64)), "pretrain", {"tokens": "tokenize"}, {})
    dedup = describe(folders["documents"], "dedup", {}, {})
    return {"model": model, "tokens": tokens, "tokenizer": corpus["tokenizer"], "dedup": dedup}


def texts_of(inputs: Inputs, split: str) -> list[str]:
    names = [name for name, _ in read(TokenShards(inputs["tokens"], split))]  # type: ignore[arg-type]
    return [read_documents(inputs["dedup"])[name] for name in names]


@pytest.fixture
def config(inputs: Inputs, tmp_path: Path) -> EvaluateConfig:
    """Items and set documents, every other one from a training document and the rest from held-out or no document."""
    trained, held_out = texts_of(inputs, "train"), texts_of(inputs, "val")
    assert min(len(trained), len(held_out)) > 5
    queries = []
    for number in range(5):
        queries += [
            " ".join(trained[number].split()[3:20]),
            " ".join(held_out[number].split()[3:20]),
            " ".join([*trained[number].split()[:12], "chlorophyll", *trained[number].split()[13:24]]),
        ]
    queries[-1] = "too short"
    items = [{"query": text, "choices": ["a", "b"], "gold": n % 2} for n, text in enumerate(queries)]
    own = prose(77, 60).split()
    half = [" ".join([*trained[n].split()[: 10 + 4 * n], *own[: 46 - 4 * n]]) for n in range(11)]
    texts = [*trained[:11], *held_out[:5], *half, "ordinary", *(prose(500 + n, 50) for n in range(9))]
    files = {"items": items, "texts": [{"text": text} for text in texts]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvaluateConfig.model_validate(
        {
            "max_documents": 3,
            "prompts": (),
            "tasks": [{"name": "quiz", "path": tmp_path / "items.jsonl", "kind": "choice", "shots": 1}],
            "sets": [{"name": "prose", "path": tmp_path / "texts.jsonl"}],
        }
    )


def test_what_was_trained_on_is_found_and_scores_are_given_without_it(
    config: EvaluateConfig, inputs: Inputs, tmp_path: Path
) -> None:
    out, context = tmp_path / "out", LocalContext()
    metrics = evaluate(config, inputs, out, context)
    items = pq.read_table(out / "items.parquet").to_pylist()
    # 17 words of a document, alone and before each option: 5 + 6 + 6 n-grams, of which 15 stand in the document.
    assert [row["seen"] for row in items[:-1]] == [0 if n % 3 else 15 / 17 for n in range(14)]
    assert items[-1]["seen"] is None
    assert (metrics["quiz/seen"], metrics["quiz/too_short"]) == (5, 1)
    unseen = [row for n, row in enumerate(items) if n % 3]
    right = sum(row["right"] for row in unseen)
    ends = binomtest(right, 10).proportion_ci(method="wilson")
    assert metrics["quiz/accuracy_unseen"] == right / 10
    assert (metrics["quiz/accuracy_unseen_low"], metrics["quiz/accuracy_unseen_high"]) == (
        ends.low,
        ends.high,
    )
    nats = sum(row["nats"][row["gold"]] for row in unseen)
    size = sum(row["bytes"][row["gold"]] for row in unseen)
    assert metrics["quiz/gold_bits_per_byte_unseen"] == pytest.approx(nats / size / math.log(2))

    rows = pq.read_table(out / "set_documents.parquet").to_pylist()
    shares = [row["seen"] for row in rows]
    assert shares[:16] == [1.0] * 11 + [0.0] * 5
    assert shares[16:27] == sorted(shares[16:27])
    assert shares[16] == 0 < shares[17] < 0.5 < shares[26] < 1
    assert shares[27] is None
    left = [row for row in rows if (row["seen"] or 0) < 0.5]
    assert metrics["prose/seen"] == len(rows) - len(left)
    bits = sum(row["text_nats"] for row in left) / math.log(2) / sum(row["bytes"] for row in left)
    assert metrics["prose/bits_per_byte_unseen"] == pytest.approx(bits)
    assert metrics["prose/bits_per_byte_unseen_low"] == interval(left)["bits_per_byte_low"]
    assert metrics["searched_bytes"] == sum(len(text.encode()) for text in texts_of(inputs, "train"))
    [said] = [note for note in context.notes if note.startswith("quiz: 5 of 15 items")]
    shown = f"accuracy {metrics['quiz/accuracy']:.1%}, without them {right / 10:.1%}"
    assert said == f"quiz: 5 of 15 items occur in the training documents (1 too short to tell); {shown}"
    assert (
        f"| quiz | 15 | 5 | 1 | {metrics['quiz/accuracy']:.1%} | {right / 10:.1%} ("
        in (out / "report.md").read_text()
    )


def test_a_killed_look_goes_on_and_gives_the_same_bytes(
    config: EvaluateConfig, inputs: Inputs, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    class Context(LocalContext):
        def map(self, fn, items, *, names=None):  # type: ignore[no-untyped-def]
            fn(items[1])
            raise Killed

    whole = evaluate(config, inputs, tmp_path / "whole", LocalContext())
    with pytest.raises(Killed):
        evaluate(config, inputs, tmp_path / "killed", Context())
    assert evaluate(config, inputs, tmp_path / "killed", LocalContext()) == whole
    for name in ("items.parquet", "set_documents.parquet", "report.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def unsought(metrics: Metrics, context: LocalContext, out: Path, why: str) -> None:
    assert not [name for name in metrics if "seen" in name]
    assert f"sets and tasks were not looked for in the training documents: {why}" in context.notes
    assert f"Not looked for: {why}." in (out / "report.md").read_text()
    assert set(pq.read_table(out / "items.parquet").column("seen").to_pylist()) == {None}


def test_where_the_corpus_is_not_here_it_is_said_that_nothing_was_looked_for(
    config: EvaluateConfig, inputs: Inputs, tmp_path: Path
) -> None:
    describe(inputs["model"], "adopt", {}, {})
    context = LocalContext()
    unsought(
        evaluate(config, inputs, tmp_path / "a", context), context, tmp_path / "a", "the corpus is not here"
    )
    describe(inputs["model"], "pretrain", {"tokens": "tokenize"}, {})
    context, off = LocalContext(), config.model_copy(update={"contamination": False})
    metrics = evaluate(off, inputs, tmp_path / "b", context)
    unsought(metrics, context, tmp_path / "b", "evaluate.contamination is false")
    context, only = LocalContext(), ScoreConfig(sets=config.sets, tasks=config.tasks)
    metrics = score(only, inputs, tmp_path / "c", context)
    unsought(metrics, context, tmp_path / "c", "the corpus is not here")


def test_a_model_was_trained_on_what_it_and_the_model_before_it_were(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    (tmp_path / "adopted").mkdir()
    made = {"model": "pretrain", "tokenizer": "train_tokenizer"}
    tuned = describe(tmp_path / "tuned", "finetune", {**made, "tokens": "tokenize"}, {})
    corpora, complete = trained_on(tuned, {**inputs, "model": tuned, "pretrain": inputs["model"]})
    assert [one.documents for one in corpora] == [inputs["dedup"]] * 2
    assert complete
    adopted = describe(tmp_path / "adopted", "pretrain", {}, {})
    corpora, complete = trained_on(tuned, {**inputs, "model": tuned, "pretrain": adopted})
    assert [one.documents for one in corpora] == [inputs["dedup"]]
    assert not complete
    describe(inputs["model"], "pretrain", {"tokens": "tokenize"}, {"init_sha256": "0"})
    assert not trained_on(inputs["model"], inputs)[1]
    describe(inputs["model"], "pretrain", {"tokens": "adopt"}, {})
    assert trained_on(inputs["model"], inputs) == ([], False)


def test_a_short_question_is_found_before_another_answer(inputs: Inputs, tmp_path: Path) -> None:
    asked = texts_of(inputs, "train")[0].split()
    items = {
        "choice": {"query": " ".join(asked[4:13]), "choices": ["a", "b"], "gold": 0},
        "schema": {"context_options": [" ".join(asked[4:13]), "no"], "continuation": "x", "gold": 0},
        "continuation": {"context": " ".join(asked[4:13]), "continuation": "x"},
        "pairs": {"sentence_good": " ".join(asked[4:13]), "sentence_bad": "x"},
    }
    tasks = []
    for kind, item in items.items():
        (tmp_path / f"{kind}.jsonl").write_text(json.dumps(item))
        tasks.append({"name": kind, "path": tmp_path / f"{kind}.jsonl", "kind": kind})
    asked_config = EvaluateConfig.model_validate({"max_documents": 1, "prompts": (), "tasks": tasks})
    context = LocalContext()
    metrics = evaluate(asked_config, inputs, tmp_path / "out", context)
    assert [metrics[f"{kind}/seen"] for kind in items] == [1] * 4
    assert not [name for name in metrics if "_unseen" in name]
    assert sum(note.endswith("no others are left") for note in context.notes) == 4
