"""The program that a job of Slurm runs on its first machine (``python -m flows.engine.slurm_job JOB``): it starts the
ranks on all of its machines, and queues itself again when it is asked to end by others than the run that submitted it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from data_pipeline.core.errors import UserError
from flows.engine import launch
from flows.engine.process import save_when_asked
from flows.engine.slurm import is_cancelled
from flows.engine.stopping import unwind_on_signals
from llm.machine.nodes import nodes_of_slurm
from llm.training.job import Job

STOPPED = 143
"""Exit code of a process that SIGTERM ended."""


def main(path: Path) -> int:
    """Train; the exit code."""
    unwind_on_signals()
    save_when_asked()
    job = Job.model_validate_json(path.read_text(encoding="utf-8"))
    runtime = job.config.runtime
    try:
        launch.local(
            "llm.training.trainer",
            path,
            runtime.ranks,
            logs=job.out / "logs",
            grace_seconds=runtime.grace_seconds,
            nodes=nodes_of_slurm(),
        )
    except KeyboardInterrupt as stopped:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what Slurm sends to a job that it queues again
        print(f"stopped: {stopped}", flush=True)
        if runtime.slurm.requeue and not is_cancelled(path.parent):
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        return STOPPED
    except (UserError, RuntimeError) as failure:
        print(failure, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
