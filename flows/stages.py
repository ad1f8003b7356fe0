"""The line, in one table: each stage's body, its config, what it reads, and its version.

The pipeline, the plan and the command line are all generated from ``STAGES``. Bump a stage's
version when its output for the same config and inputs changes: every artifact from there on is then rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.clean import CleanConfig, clean
from data_pipeline.context import Metrics, StageConfig, StageContext
from data_pipeline.dedup import DedupConfig, dedup
from data_pipeline.discards import is_discard
from data_pipeline.download import DownloadConfig, download
from data_pipeline.token_shards import TokenizeConfig, tokenize
from data_pipeline.tokenizer import TokenizerConfig, train_tokenizer
from llm.evaluate import EvaluateConfig, evaluate
from llm.export import ExportConfig, export
from llm.pretrain import PretrainConfig, pretrain

Body = Callable[[Any, Mapping[str, Path], Path, StageContext], Metrics]


@dataclass(frozen=True)
class Stage:
    """One step of the line."""

    name: str
    body: Body
    config: type[StageConfig]
    inputs: tuple[str, ...]
    version: int
    headline: tuple[str, ...]
    """The metrics that sum the stage up on one line, and stand on the parent run in MLflow. Whatever it discards
    (`data_pipeline.discards`) stands behind them, and need not be named."""

    def shown(self, metrics: Mapping[str, float]) -> list[str]:
        """Name those of ``metrics`` that people see first: the headline and what was discarded."""
        return [*(name for name in self.headline if name in metrics), *filter(is_discard, metrics)]


STAGES: tuple[Stage, ...] = (
    Stage("download", download, DownloadConfig, (), 2, ("documents", "bytes")),
    Stage("clean", clean, CleanConfig, ("download",), 3, ("kept", "documents")),
    Stage("dedup", dedup, DedupConfig, ("clean",), 4, ("kept", "spans/cut")),
    Stage(
        "train_tokenizer",
        train_tokenizer,
        TokenizerConfig,
        ("dedup",),
        3,
        ("vocab_size", "sample_bytes_per_token"),
    ),
    Stage(
        "tokenize", tokenize, TokenizeConfig, ("dedup", "train_tokenizer"), 2, ("train_tokens", "val_tokens")
    ),
    Stage(
        "pretrain",
        pretrain,
        PretrainConfig,
        ("tokenize", "train_tokenizer"),
        2,
        ("val_bits_per_byte", "loss"),
    ),
    Stage(
        "evaluate",
        evaluate,
        EvaluateConfig,
        ("pretrain", "tokenize", "train_tokenizer"),
        1,
        ("bits_per_byte", "perplexity"),
    ),
    Stage(
        "export",
        export,
        ExportConfig,
        ("download", "clean", "dedup", "train_tokenizer", "tokenize", "pretrain", "evaluate"),
        2,
        ("parameters", "logits_max_abs_difference"),
    ),
)

BY_NAME: dict[str, Stage] = {stage.name: stage for stage in STAGES}
