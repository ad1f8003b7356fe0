"""The pretrain stage in a process of its own (``python -m tests.stage_process JOB``), as `disturbed` starts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from data_pipeline.stage import LocalContext
from flows.engine import launch
from flows.engine.process import save_when_asked
from llm.pretrain.config import PretrainConfig
from llm.pretrain.stage import pretrain

if __name__ == "__main__":
    save_when_asked()
    job = json.loads(sys.argv[1])
    inputs = {name: Path(folder) for name, folder in job["inputs"].items()}
    context = LocalContext(launcher=launch.local)
    try:
        pretrain(PretrainConfig.model_validate(job["config"]), inputs, Path(job["out"]), context)
    except (Exception, KeyboardInterrupt) as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(3)
