"""``prefect.engine`` with failures planted: a stage named in ``<home>/planted`` fails at its very end, once.

A work pool of the tests names this as its command. The body has done all of its work then, and nothing is sealed.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flows import stages

PLANTED = Path(os.environ["LLMILL_HOME"]) / "planted"


def failing(stage: stages.Stage) -> stages.Body:
    """The stage's body, and then the failure, if one is planted for it."""
    body: Callable[..., Any] = stage.body

    def run(config: Any, inputs: Mapping[str, Path], out: Path, context: Any) -> Any:
        metrics = body(config, inputs, out, context)
        flag = PLANTED / stage.name
        if flag.exists():
            flag.unlink()
            raise RuntimeError(f"planted in {stage.name}")
        return metrics

    return run


for one in stages.STAGES:
    vars(one)["body"] = failing(one)  # in place of what it would import

if __name__ == "__main__":
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)
