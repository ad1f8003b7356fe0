"""A stage in a process of its own (``python -m tests.stage_process JOB``), as `disturbed` starts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from data_pipeline.stage import LocalContext
from flows.engine import launch
from flows.engine.process import save_when_asked
from flows.stages import BY_NAME

if __name__ == "__main__":
    save_when_asked()
    job = json.loads(sys.argv[1])
    inputs = {name: Path(folder) for name, folder in job["inputs"].items()}
    context = LocalContext(launcher=launch.local)
    stage = BY_NAME[job["stage"]]
    try:
        stage.body(stage.config.model_validate(job["config"]), inputs, Path(job["out"]), context)
    except (Exception, KeyboardInterrupt) as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(3)
