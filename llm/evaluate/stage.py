"""The evaluate stage: how well the model predicts documents that it never saw, as loss in nats a token, perplexity and
bits per byte (by which models with different tokenizers can be compared), in all, by source and document by
document; and a few texts that it writes. Every document is read from its own start, after an end-of-text token, in
windows of the model's context that do not overlap.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.errors import UserError
from data_pipeline.core.files import atomic_path
from data_pipeline.core.text import duration, human_bytes
from data_pipeline.documents import count_rows
from data_pipeline.overlap import find_overlap
from data_pipeline.stage import Metrics, StageContext
from data_pipeline.tokenize.shards import TokenShards
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer, token_bytes
from llm.data.bits import bits_per_byte
from llm.evaluate.config import EvaluateConfig
from llm.evaluate.report import report
from llm.evaluate.trained_on import trained_on
from llm.model.generate import generate
from llm.model.transformer import load_model
from llm.score.documents import Document, score_documents
from llm.score.fixed import Fixed, score_fixed, tables
from llm.score.replicas import Replicas
from llm.score.seen import NOT_HERE, described, mark_seen, not_sought, scored_texts
from llm.score.statistics import interval


def evaluate(config: EvaluateConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Evaluate the model of ``inputs["model"]`` on the held-out split of ``inputs["tokens"]``.

    Leaves ``documents.parquet`` (id, source, tokens, bytes, nats, text_nats, bits_per_byte; in order of id),
    ``sources.json``, ``samples.jsonl``, ``report.md`` and, where sets and tasks are scored, ``set_documents.parquet``,
    ``set_tokens.parquet`` and ``items.parquet`` (`llm.score.sets.DOCUMENTS`, `TOKENS`, `llm.score.task.ITEMS`).
    """
    config = config.resolve()
    model = load_model(inputs["model"])
    replicas = Replicas.everywhere(model)  # `model` is the first
    tokenizer = load_tokenizer(inputs["tokenizer"])
    held_out = TokenShards(inputs["tokens"], "val")
    held_out.require_tokenizer(inputs["tokenizer"])
    documents = choose(read(held_out), config.max_documents)
    sizes = token_bytes(inputs["tokenizer"])
    rows = score_documents(
        replicas,
        documents,
        sizes=sizes,
        end=end_of_text(tokenizer),
        progress=lambda done, total: context.progress(done, total, "tokens"),
    )
    texts = generate(
        model,
        tokenizer,
        config.prompts,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seeds=range(config.seed, config.seed + len(config.prompts)),
    )
    samples = [{"prompt": prompt, "text": text} for prompt, text in zip(config.prompts, texts, strict=True)]
    unread = sum(map(count_rows, held_out.paths)) - len(documents)
    fixed = score_fixed(replicas, tokenizer, config, folder=inputs["tokenizer"], out=out, context=context)
    fixed = look_for(fixed, config, inputs, out / "scratch" / "seen", context)
    left_out = {"left_out/max_documents": float(unread)} if unread else {}
    return write(rows, samples, fixed, out=out) | left_out


def look_for(
    fixed: Fixed, config: EvaluateConfig, inputs: Mapping[str, Path], scratch: Path, context: StageContext
) -> Fixed:
    """Look for what was scored in the documents that the model was trained on; its rows then know what was seen."""
    if not (fixed.sets or fixed.tasks):
        return fixed
    corpora, complete = trained_on(inputs["model"], inputs)
    off = "evaluate.contamination is false"
    if unsought := off if not config.contamination else NOT_HERE if not corpora else "":
        context.note(not_sought(unsought))
        return replace(fixed, unsought=unsought)
    if not complete:
        context.note("some of what the model was trained on is not here, and was not looked at", warning=True)
    clock = time.monotonic()
    rows, texts = zip(*scored_texts(config, fixed.sets, fixed.tasks), strict=True)
    overlap = find_overlap(texts, corpora, scratch, context)
    mark_seen(rows, overlap)
    seconds = time.monotonic() - clock
    context.note(f"looked through {human_bytes(overlap.size)} of training documents in {duration(seconds)}")
    fixed = replace(fixed, unsought="", searched=overlap.size)
    for name, metrics in {**fixed.metrics_of_sets, **fixed.metrics_of_tasks}.items():
        context.note(described(name, metrics))
    return fixed


def read(shards: TokenShards) -> Iterator[Document]:
    """Yield (id, tokens) of every document. Tokens are copies, so that keeping some does not keep their row group."""
    for batch in shards:
        for row, name in enumerate(batch.ids):
            yield name, batch.tokens[batch.offsets[row] : batch.offsets[row + 1]].copy()


def choose(documents: Iterable[Document], most: int | None) -> list[Document]:
    """Choose the documents whose ids hash lowest, at most ``most``, in order of id. No others stay in memory."""
    if most is not None:
        documents = heapq.nsmallest(
            most, documents, key=lambda document: hashlib.sha256(document[0].encode()).digest()
        )
    return sorted(documents, key=lambda document: document[0])


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute loss (nats a token), perplexity and bits per byte over some documents.

    Raises:
        UserError: they are no numbers.
    """
    tokens, size = sum(row["tokens"] for row in rows), sum(row["bytes"] for row in rows)
    loss = math.fsum(row["nats"] for row in rows) / tokens
    if not math.isfinite(loss):
        raise UserError(
            "the model's loss on held-out documents is not finite: its training diverged; lower pretrain.lr"
        )
    return {
        "documents": float(len(rows)),
        "tokens": float(tokens),
        "bytes": float(size),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # the largest that a double holds
        "bits_per_byte": bits_per_byte(math.fsum(row["text_nats"] for row in rows), max(1, size)),
    }


def write(
    rows: list[dict[str, Any]],
    samples: list[dict[str, str]],
    fixed: Fixed,
    *,
    out: Path,
) -> Metrics:
    """Write the artifact's files, and return the headline metrics."""
    sources = {
        source: summarise([row for row in rows if row["source"] == source])
        for source in sorted({row["source"] for row in rows})
    }
    metrics = summarise(rows)
    with atomic_path(out / "documents.parquet") as path:
        pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
    with atomic_path(out / "sources.json") as path:
        path.write_text(json.dumps(sources, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(out / "samples.jsonl") as path:
        lines = (json.dumps(sample, ensure_ascii=False, allow_nan=False) + "\n" for sample in samples)
        path.write_text("".join(lines), encoding="utf-8")
    fixed.write(out)
    with atomic_path(out / "report.md") as path:
        parts = [report(metrics, sources, rows, samples), *tables(fixed)]
        path.write_text("\n".join(parts), encoding="utf-8")
    by_source = {f"bits_per_byte/{source}": scores["bits_per_byte"] for source, scores in sources.items()}
    return metrics | interval(rows) | by_source | fixed.metrics()
