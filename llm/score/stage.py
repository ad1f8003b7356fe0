"""The score stage: a model on fixed sets of texts and on tasks, whatever corpus it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from data_pipeline.core.files import atomic_path
from data_pipeline.stage import Metrics, StageContext
from data_pipeline.train_tokenizer.tokenizer import load_tokenizer
from llm.model.foreign import load_scorable
from llm.score.config import ScoreConfig
from llm.score.fixed import score_fixed, tables
from llm.score.replicas import Replicas
from llm.score.seen import not_sought


def score(config: ScoreConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> Metrics:
    """Score the model of ``inputs["model"]`` with the tokenizer of ``inputs["tokenizer"]``.

    Leaves ``report.md``, ``set_documents.parquet`` and ``set_tokens.parquet`` (`llm.score.sets.DOCUMENTS`, `TOKENS`)
    where there are sets, ``items.parquet`` (`llm.score.task.ITEMS`) where there are tasks, and ``harness.json``
    (`llm.score.harness.Result`) where there are tasks of lm-evaluation-harness.
    """
    config = config.resolve()
    replicas = Replicas.everywhere(load_scorable(inputs["model"]))
    tokenizer = load_tokenizer(inputs["tokenizer"])
    by_harness: Metrics = {}
    report = ["# Scores on sets and tasks\n"]
    if config.harness:
        from llm.score.harness import run_harness  # lm-evaluation-harness, an extra

        found = run_harness(config.harness, replicas.models[0], inputs["tokenizer"], out=out, context=context)
        by_harness, report = found.metrics(), [*report, found.table()]
    fixed = score_fixed(replicas, tokenizer, config, folder=inputs["tokenizer"], out=out, context=context)
    if config.sets or config.tasks:
        context.note(not_sought(fixed.unsought))
    fixed.write(out)
    with atomic_path(out / "report.md") as path:
        path.write_text("\n".join([*report, *tables(fixed)]), encoding="utf-8")
    return fixed.metrics() | by_harness
