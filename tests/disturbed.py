"""Trainings that are signalled and killed, under the real launcher."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from forks import Forked

from data_pipeline.stage import StageConfig
from llm.training.events import read_events


class Stage:
    """The stage in a process of its own, to be disturbed."""

    def __init__(
        self, config: StageConfig, corpus: dict[str, Path], out: Path, stage: str = "pretrain"
    ) -> None:
        job = {
            "stage": stage,
            "config": config.model_dump(mode="json"),
            "inputs": {name: str(folder) for name, folder in corpus.items()},
            "out": str(out),
        }
        self.out = out
        self.process = Forked(
            "llm.training.trainer", "tests.stage_process", [json.dumps(job)], dict(os.environ)
        )

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Look very often, for what is to be met may last milliseconds."""
        deadline = time.monotonic() + 900
        while not true():
            assert self.process.poll() is None, f"it ended too early: {self.process.communicate()}"
            assert time.monotonic() < deadline
            time.sleep(0.003)

    def wait_for(self, event: str, step: int = 0) -> None:
        self.wait_until(lambda: any(found["step"] >= step for found in events(self.out, event)))

    def ranks(self) -> list[psutil.Process]:
        [torchrun] = psutil.Process(self.process.pid).children()
        return torchrun.children()

    def kill(self, whole_tree: bool = True) -> None:
        """All of it, as a power cut would, or the stage's own process alone."""
        family = psutil.Process(self.process.pid).children(recursive=True) if whole_tree else []
        for pid in [self.process.pid, *(child.pid for child in family)]:
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said, when it ends by itself."""
        said, _ = self.process.communicate(timeout=900)
        assert self.process.returncode is not None
        return self.process.returncode, said


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(out / "logs" / "events.jsonl") if event["event"] == kind]
