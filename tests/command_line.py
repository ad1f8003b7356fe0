"""The command line as the tests type it, and ``kill -9`` of all that it started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Llmill:
    """The command line on one home."""

    home: Path
    recipe: Path

    def environment(self, **changes: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        return {**kept, "LLMILL_HOME": str(self.home), "COLUMNS": "200", **changes}

    def start(self, *arguments: str, **changes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(**changes),
        )

    def __call__(self, *arguments: str, code: int = 0, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run ``llmill arguments``, and see that it ends with exit code ``code``."""
        process = self.start(*arguments, **changes)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, f"llmill {' '.join(arguments)}: {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(process.args, code, out, err)

    def run(self, *arguments: str, code: int = 0, **changes: str) -> subprocess.CompletedProcess[str]:
        return self("run", str(self.recipe), *arguments, code=code, **changes)

    def plan(self, *arguments: str) -> dict[str, dict[str, Any]]:
        """Stage -> what the plan says of it."""
        steps = json.loads(self("plan", str(self.recipe), *arguments, "--json").stdout)
        return {step["stage"]: step for step in steps}

    def actions(self, *arguments: str) -> list[str]:
        return [step["action"] for step in self.plan(*arguments).values()]

    def payloads(self) -> dict[str, str]:
        """Stage/fingerprint -> checksum of the payload, of all that is sealed."""
        manifests = [json.loads(path.read_text()) for path in self.home.glob("store/*/*/manifest.json")]
        return {f"{m['stage']}/{m['fingerprint']}": m["payload_sha256"] for m in manifests}


def kill_tree(process: subprocess.Popen[str]) -> None:
    """``kill -9`` a process and all that it started, those in sessions of their own too."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
