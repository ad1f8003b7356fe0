"""The classify stage: a model and texts with labels to a model that gives texts labels, beside what needs no model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.files import atomic_path
from data_pipeline.stage import Metrics, StageContext
from data_pipeline.train_tokenizer.tokenizer import load_tokenizer
from llm.classify.config import ClassifyConfig
from llm.classify.found import find
from llm.classify.labels import Texts, find_labels
from llm.classify.report import report
from llm.finetune.training import check_adapters, course, read_rows, read_start, train_on_rows
from llm.training.objective import Labels

PREDICTIONS = pa.schema(
    {
        "text_sha256": pa.string(),
        "text": pa.string(),
        "labels": pa.list_(pa.string()),
        "given": pa.list_(pa.string()),
        "right": pa.bool_(),
        "probabilities": pa.list_(pa.float64()),
        "by_regression": pa.list_(pa.string()),
    }
)
"""Columns of ``predictions.parquet``, a row a held-out text; probabilities in the order of ``labels.json``."""


def classify(config: ClassifyConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Train the model of ``inputs["model"]`` to give texts labels, with a new head, read at the last token.

    Leaves ``model.safetensors``, ``model.json``, ``labels.json``, ``losses.parquet``, ``validation.parquet``,
    ``predictions.parquet``, ``rejected.parquet`` and ``report.md``; with `lora`, ``adapter`` as PEFT reads it.

    Raises:
        UserError: there are too few texts, or labels; the model reads fewer tokens than a row has.
    """
    config = config.resolve()
    base = read_start(inputs["model"])
    labels = find_labels(config)
    room = config.row_length(base)
    texts = Texts(config, labels, load_tokenizer(inputs["tokenizer"]))
    read = read_rows(config, texts, room, out, context)
    if config.longer == "cut" and read.cut:
        context.note(f"of a longer text the first {room:,} tokens are read: raise classify.context for more")
    check_adapters(config, base)
    weights = labels.weights() if config.balance == "weights" else None
    train_on_rows(
        config,
        base.model_copy(update={"labels": len(labels.names), "tie_embeddings": False}),
        read,
        context,
        inputs=inputs,
        out=out,
        objective=Labels(several=config.several, weights=weights),
        last_blocks=config.last_blocks,
    )
    labels.write(out)
    found = find(config, texts, read.held_out, room, out=out, tokenizer=inputs["tokenizer"])
    with atomic_path(out / "predictions.parquet") as path:
        pq.write_table(pa.Table.from_pylist(found.rows(labels), PREDICTIONS), path, compression="zstd")
    metrics, checks = course(config, read, room, out)
    metrics |= found.metrics(labels)
    with atomic_path(out / "report.md") as path:
        path.write_text(report(config, metrics, checks, found, labels), encoding="utf-8")
    return metrics
