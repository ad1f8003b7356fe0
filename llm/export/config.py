"""Settings of the stage ``export`` that a recipe may give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from data_pipeline.stage import StageConfig
from data_pipeline.train_tokenizer.stage import TokenizerConfig
from llm.export.llama_cpp import choose_pre_tokenizer, require_reproducible

Kind = Literal["F32", "F16", "Q8_0"]
"""A type in which a GGUF file stores matrices: 32, 16 or about 8.5 bits a weight."""
RENAMED = ("phi-3", "phi3", "modern-bert")
"""Parts of a model's name by which llama.cpp reads the special tokens of any GGUF file in another way."""


class ExportConfig(StageConfig):
    """How the model is exported."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored weights."""
    name: str = Field(default="llmill-model", min_length=1)
    """Title of the model card."""
    gguf: tuple[Kind, ...] = ()
    """Files for llama.cpp that are written beside it, ``model-F16.gguf`` and so on: see docs/gguf.md."""

    @field_validator("gguf")
    @classmethod
    def _each_once(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        return tuple(kind for kind in get_args(Kind) if kind in kinds)

    @model_validator(mode="after")
    def _is_read_as_named(self) -> Self:
        if self.gguf and (found := next((part for part in RENAMED if part in self.name.lower()), None)):
            raise ValueError(
                f"name holds {found!r}, by which llama.cpp reads special tokens otherwise: choose another name"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """As for any stage, without `gguf` where there is none: older exports are what they were."""
        identity = super().identity()
        if not self.gguf:
            del identity["gguf"]
        return identity

    def check_inputs(self, configs: Mapping[str, StageConfig], made: Mapping[str, Path]) -> None:
        """Refuse `gguf` of a tokenizer that llama.cpp does not reproduce, as far as that is known."""
        if not self.gguf:
            return
        planned = configs.get("tokenizer")
        if "tokenizer" in made:
            require_reproducible(made["tokenizer"])
        elif isinstance(planned, TokenizerConfig):
            choose_pre_tokenizer(planned.pre_tokenizer(), ignore_merges=False)
