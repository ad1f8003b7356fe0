"""The line, in one table: each stage's body, its config, what it reads, and its version.

The recipe, the plan, the pipeline and its deployments are generated from ``STAGES``. Bump a stage's
version when its output for the same config and inputs changes: every artifact from there on is then rebuilt.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.discards import is_discard
from data_pipeline.stage import Metrics, StageConfig, StageContext

Body = Callable[[Any, Mapping[str, Path], Path, StageContext], Metrics]


@dataclass(frozen=True)
class Stage:
    """One step of the line."""

    name: str
    body_at: str
    """``module:function``. It is imported when it runs: to plan, or to reuse, no body's libraries are needed."""
    config_at: str
    """``module:class``, imported when a recipe is read."""
    inputs: tuple[str, ...]
    version: int
    headline: tuple[str, ...]
    """The metrics that sum the stage up on one line, and stand on the parent run in MLflow. Whatever it discards
    (`data_pipeline.discards`) stands behind them, and need not be named."""
    trains: bool = False
    """Whether its work is a GPU's, where there is one: `llmill deploy --gpu-pool` has it done elsewhere."""

    @cached_property
    def body(self) -> Body:
        """The plain function on folders."""
        return load(self.body_at)

    @cached_property
    def config(self) -> type[StageConfig]:
        """What a recipe may say of the stage."""
        return load(self.config_at)

    def shown(self, metrics: Mapping[str, float]) -> list[str]:
        """Name those of ``metrics`` that people see first: the headline and what was discarded."""
        return [*(name for name in self.headline if name in metrics), *filter(is_discard, metrics)]


def load(place: str) -> Any:
    """What ``module:name`` names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


STAGES: tuple[Stage, ...] = (
    Stage(
        name="download",
        body_at="data_pipeline.download.stage:download",
        config_at="data_pipeline.download.stage:DownloadConfig",
        inputs=(),
        version=3,
        headline=("documents", "bytes"),
    ),
    Stage(
        name="clean",
        body_at="data_pipeline.clean.stage:clean",
        config_at="data_pipeline.clean.stage:CleanConfig",
        inputs=("download",),
        version=3,
        headline=("kept", "documents"),
    ),
    Stage(
        name="dedup",
        body_at="data_pipeline.dedup.stage:dedup",
        config_at="data_pipeline.dedup.config:DedupConfig",
        inputs=("clean",),
        version=4,
        headline=("kept", "spans/cut"),
    ),
    Stage(
        name="train_tokenizer",
        body_at="data_pipeline.train_tokenizer.stage:train_tokenizer",
        config_at="data_pipeline.train_tokenizer.stage:TokenizerConfig",
        inputs=("dedup",),
        version=3,
        headline=("vocab_size", "sample_bytes_per_token"),
    ),
    Stage(
        name="tokenize",
        body_at="data_pipeline.tokenize.stage:tokenize",
        config_at="data_pipeline.tokenize.stage:TokenizeConfig",
        inputs=("dedup", "train_tokenizer"),
        version=2,
        headline=("train_tokens", "val_tokens"),
    ),
    Stage(
        name="pretrain",
        body_at="llm.pretrain.stage:pretrain",
        config_at="llm.pretrain.config:PretrainConfig",
        inputs=("tokenize", "train_tokenizer"),
        version=2,
        headline=("val_bits_per_byte", "loss"),
        trains=True,
    ),
    Stage(
        name="evaluate",
        body_at="llm.evaluate.stage:evaluate",
        config_at="llm.evaluate.config:EvaluateConfig",
        inputs=("pretrain", "tokenize", "train_tokenizer"),
        version=2,
        headline=("bits_per_byte", "perplexity"),
        trains=True,
    ),
    Stage(
        name="export",
        body_at="llm.export.stage:export",
        config_at="llm.export.config:ExportConfig",
        inputs=("download", "clean", "dedup", "train_tokenizer", "tokenize", "pretrain", "evaluate"),
        version=2,
        headline=("parameters", "logits_max_abs_difference"),
    ),
)

BY_NAME: dict[str, Stage] = {stage.name: stage for stage in STAGES}
WITH_TEXTS = frozenset({"download", "clean", "dedup", "tokenize", "evaluate"})
"""The stages whose artifacts hold documents, or parts of them."""
