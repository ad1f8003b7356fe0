"""The pipeline, in one table: each stage's body, its config, the types that it takes and makes, and its version.

A *stage* is a kind of work; a *step* is a stage in a recipe (`flows.steps`). Recipes, the plan, the pipeline, its
deployments and the reference of settings are generated from ``STAGES``. Bump a stage's version when its output for the
same config and inputs changes: every artifact from there on is then rebuilt.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from data_pipeline.core.errors import UserError
from flows.stage import TYPES, Stage

PLUGINS = "llmill.stages"
"""The entry point group of users' stages: see docs/stages.md."""


OURS: tuple[Stage, ...] = (
    Stage(
        name="adopt",
        body_at="llm.adopt.stage:adopt",
        config_at="llm.adopt.config:AdoptConfig",
        takes=(),
        makes="",
        version=1,
        headline=("parameters", "vocab_size", "documents", "train_tokens"),
        texts=True,
    ),
    Stage(
        name="download",
        body_at="data_pipeline.download.stage:download",
        config_at="data_pipeline.download.stage:DownloadConfig",
        takes=(),
        makes="documents",
        version=3,
        headline=("documents", "bytes"),
        default=True,
        texts=True,
    ),
    Stage(
        name="clean",
        body_at="data_pipeline.clean.stage:clean",
        config_at="data_pipeline.clean.stage:CleanConfig",
        takes=("documents",),
        makes="documents",
        version=3,
        headline=("kept", "documents"),
        main=("min_chars", "max_chars", "language.allowed", "gopher.min_words"),
        default=True,
        texts=True,
    ),
    Stage(
        name="dedup",
        body_at="data_pipeline.dedup.stage:dedup",
        config_at="data_pipeline.dedup.config:DedupConfig",
        takes=("documents",),
        makes="documents",
        version=4,
        headline=("kept", "spans/cut"),
        main=("ngram", "threshold", "prefer"),
        default=True,
        texts=True,
    ),
    Stage(
        name="train_tokenizer",
        body_at="data_pipeline.train_tokenizer.stage:train_tokenizer",
        config_at="data_pipeline.train_tokenizer.stage:TokenizerConfig",
        takes=("documents",),
        makes="tokenizer",
        version=3,
        headline=("vocab_size", "sample_bytes_per_token"),
        main=("vocab_size",),
        default=True,
    ),
    Stage(
        name="tokenize",
        body_at="data_pipeline.tokenize.stage:tokenize",
        config_at="data_pipeline.tokenize.stage:TokenizeConfig",
        takes=("documents", "tokenizer"),
        makes="tokens",
        version=3,
        headline=("train_tokens", "val_tokens"),
        main=("val_fraction",),
        default=True,
        texts=True,
    ),
    Stage(
        name="pretrain",
        body_at="llm.pretrain.stage:pretrain",
        config_at="llm.pretrain.config:PretrainConfig",
        takes=("tokens", "tokenizer", "model?"),
        only_named=("model",),
        makes="model",
        version=2,
        headline=("val_bits_per_byte", "loss"),
        main=(
            *("depth", "model.layers", "model.width", "model.heads", "model.context"),
            *("tokens", "batch_tokens", "lr", "seed", "precision", "runtime.ranks", "runtime.micro_batch"),
        ),
        default=True,
        trains=True,
    ),
    Stage(
        name="finetune",
        body_at="llm.finetune.stage:finetune",
        config_at="llm.finetune.config:FinetuneConfig",
        takes=("model", "tokenizer"),
        makes="model",
        version=3,
        headline=("val_loss", "val_loss_before", "conversations", "padding"),
        main=("epochs", "lr", "context", "batch_rows", "packing", "runtime.ranks"),
        trains=True,
        texts=True,
    ),
    Stage(
        name="classify",
        body_at="llm.classify.stage:classify",
        config_at="llm.classify.config:ClassifyConfig",
        takes=("model", "tokenizer"),
        makes="model",
        version=2,
        headline=("accuracy", "accuracy_regression", "accuracy_commonest", "f1", "texts"),
        main=("epochs", "lr", "balance", "last_blocks", "batch_rows", "runtime.ranks"),
        trains=True,
        texts=True,
    ),
    Stage(
        name="align",
        body_at="llm.align.stage:align",
        config_at="llm.align.config:AlignConfig",
        takes=("model", "tokenizer"),
        makes="model",
        version=2,
        headline=("accuracy", "margin", "val_loss", "pairs", "divergence"),
        main=("beta", "loss", "epochs", "lr", "context", "batch_rows", "runtime.ranks"),
        trains=True,
        texts=True,
    ),
    Stage(
        name="evaluate",
        body_at="llm.evaluate.stage:evaluate",
        config_at="llm.evaluate.config:EvaluateConfig",
        takes=("model", "tokenizer", "tokens"),
        makes="scores",
        version=3,
        headline=("bits_per_byte", "perplexity", "*/bits_per_byte", "*/accuracy", "centred_mean"),
        main=("max_documents", "prompts"),
        default=True,
        trains=True,
        texts=True,
        lineage=True,
    ),
    Stage(
        name="score",
        body_at="llm.score.stage:score",
        config_at="llm.score.config:ScoreConfig",
        takes=("model", "tokenizer"),
        makes="table",
        version=2,
        headline=("*/bits_per_byte", "*/accuracy", "harness/*/acc", "centred_mean"),
        trains=True,
        texts=True,
    ),
    Stage(
        name="export",
        body_at="llm.export.stage:export",
        config_at="llm.export.config:ExportConfig",
        takes=("model", "tokenizer", "scores?"),
        makes="folder",
        version=2,
        headline=("parameters", "logits_max_abs_difference"),
        default=True,
        lineage=True,
    ),
)


def installed() -> tuple[Stage, ...]:
    """The stages that installed packages add: each entry point of the group names a `Stage`.

    Raises:
        UserError: one can't be loaded, or is not what it should be.
    """
    found: dict[str, Stage] = {}
    for point in sorted(entry_points(group=PLUGINS), key=lambda one: one.name):
        try:
            stage = point.load()
        except Exception as error:
            raise UserError(
                f"the stage {point.name} ({point.value}) can't be loaded: {type(error).__name__}: {error}"
            ) from error
        why_not = misfit(stage, {one.name for one in OURS} | found.keys())
        if why_not:
            raise UserError(f"the stage {point.name} ({point.value}): {why_not}")
        found[stage.name] = stage
    return tuple(found.values())


def misfit(stage: Any, names: set[str]) -> str:
    """Say why an installed object can be no stage beside those of ``names``; nothing where it can."""
    if not isinstance(stage, Stage):
        return f"it is no {Stage.__module__}.{Stage.__name__}"
    if stage.name in names or stage.name in TYPES:
        return f"the name {stage.name} is taken"
    unknown = {*(one.rstrip("?") for one in stage.takes), stage.makes} - {*TYPES, ""}
    if unknown:
        return f"there is no type {', '.join(sorted(unknown))}; there are {', '.join(TYPES)}"
    return ""


STAGES: tuple[Stage, ...] = (*OURS, *installed())
BY_NAME: dict[str, Stage] = {stage.name: stage for stage in STAGES}
DEFAULT: tuple[str, ...] = tuple(stage.name for stage in STAGES if stage.default)
"""The steps of a recipe that writes no others."""
WITH_TEXTS = frozenset(stage.name for stage in STAGES if stage.texts)
"""The stages whose artifacts hold documents, or parts of them."""
