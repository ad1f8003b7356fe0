"""A row of the table of stages (`flows.stages`). Packages that add stages of their own import it from here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.discards import is_discard
from data_pipeline.stage import Metrics, StageConfig, StageContext

Body = Callable[[Any, Mapping[str, Path], Path, StageContext], Metrics]
TYPES = ("documents", "tokenizer", "tokens", "model", "scores", "table", "folder")
"""Types of artifacts: what a step makes, and the steps after it take."""


@dataclass(frozen=True)
class Stage:
    """A kind of work, as recipes name it."""

    name: str
    body_at: str
    """``module:function``. It is imported when it runs: to plan, or to reuse, no body's libraries are needed."""
    config_at: str
    """``module:class``, imported when a recipe is read."""
    takes: tuple[str, ...]
    """Types of its inputs, by which the body finds their folders. Those with a ``?`` at the end may be missing."""
    makes: str
    """The type of its output; empty where the config says it (`StageConfig.makes`)."""
    version: int
    headline: tuple[str, ...]
    """The metrics that sum a step up on one line, and stand on the parent run in MLflow; ``*/name`` stands for all that
    end so. Whatever it discards (`data_pipeline.discards`) stands behind them, and need not be named."""
    default: bool = False
    """Whether each recipe has it, written out or not."""
    trains: bool = False
    """Whether its work is a GPU's, where there is one: `llmill deploy --gpu-pool` has it done elsewhere."""
    texts: bool = False
    """Whether its artifacts hold documents, or parts of them."""
    main: tuple[str, ...] = ()
    """The settings that people change most, which Prefect's form shows at once; all, where none is named."""
    only_named: tuple[str, ...] = ()
    """Types among those that may be missing which are there only where a recipe's ``inputs`` name them."""
    lineage: bool = False
    """Whether its body is also given the folders of all that its inputs were made from, each by its step's name."""

    @cached_property
    def body(self) -> Body:
        """The plain function on folders."""
        return load(self.body_at)

    @cached_property
    def config(self) -> type[StageConfig]:
        """Config of the stage: what a recipe may say of it."""
        return load(self.config_at)

    def named(self, metrics: Mapping[str, float]) -> list[str]:
        """Name those of ``metrics`` that are in the headline."""
        return [name for pattern in self.headline for name in metrics if fnmatchcase(name, pattern)]

    def shown(self, metrics: Mapping[str, float]) -> list[str]:
        """Name those of ``metrics`` that people see first: the headline and what was discarded."""
        return [*self.named(metrics), *filter(is_discard, metrics)]


def load(place: str) -> Any:
    """Import what ``module:name`` names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
