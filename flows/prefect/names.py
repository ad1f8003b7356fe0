"""Names that deployments and runs share."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from flows.stages import BY_NAME

if TYPE_CHECKING:

    class StageName(StrEnum):
        """A stage of the table."""

else:
    StageName = StrEnum("StageName", {name: name for name in BY_NAME})
    StageName.__doc__ = "A stage of the table."

FLOW = "pipeline"
TIME = "%Y-%m-%d %H:%M:%S"
