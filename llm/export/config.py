"""Settings of the stage ``export`` that a recipe may give."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data_pipeline.stage import StageConfig


class ExportConfig(StageConfig):
    """How the model is exported."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored weights."""
    name: str = Field(default="llmill-model", min_length=1)
    """Title of the model card."""
