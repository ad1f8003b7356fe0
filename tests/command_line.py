"""The command line as the tests type it, and ``kill -9`` of all that it started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from forks import Forked

from flows.engine.plan import make_plan
from flows.engine.store import Store
from flows.recipe import load_recipe

AWAY = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
"""An MLflow that does not answer."""


@dataclass(frozen=True)
class Llmill:
    """The command line on one home."""

    home: Path
    recipe: Path

    def environment(self, **changes: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        return {**kept, "LLMILL_HOME": str(self.home), "COLUMNS": "200", **changes}

    def start(self, *arguments: str, **changes: str) -> Forked:
        """Forked, so that it costs no imports; Prefect read then which server there is (`prefect_server`)."""
        assert "PREFECT_API_URL" in os.environ
        return Forked(
            "flows.prefect.pipeline", "flows.cli.main", list(arguments), self.environment(**changes)
        )

    def __call__(self, *arguments: str, code: int = 0, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run ``llmill arguments``, and see that it ends with exit code ``code``."""
        process = self.start(*arguments, **changes)
        out, err = process.communicate(timeout=900)
        return ended(subprocess.CompletedProcess(process.args, process.returncode or 0, out, err), code)

    def afresh(self, *arguments: str, code: int = 0, **changes: str) -> subprocess.CompletedProcess[str]:
        """The same as a person starts it: nothing is imported yet, and what imports print is seen."""
        process = self.start_afresh(*arguments, **changes)
        out, err = process.communicate(timeout=900)
        return ended(subprocess.CompletedProcess(process.args, process.returncode, out, err), code)

    def start_afresh(self, *arguments: str, **changes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli.main", *arguments],
            env=self.environment(**changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, code: int = 0, **changes: str) -> subprocess.CompletedProcess[str]:
        return self("run", str(self.recipe), *arguments, code=code, **changes)

    def plan(self, *settings: str) -> dict[str, dict[str, Any]]:
        """Step -> what ``llmill plan --json --set ...`` says of it, without the seconds that a process takes."""
        steps = make_plan(load_recipe(self.recipe, settings), Store(self.home))
        return {step.name: step.as_json() for step in steps}

    def actions(self, *settings: str) -> list[str]:
        return [step["action"] for step in self.plan(*settings).values()]

    def sealed(self) -> set[Path]:
        return {path.parent for path in self.home.glob("store/*/*/manifest.json")}

    def made(self, step: str) -> Path:
        """Folder of what the recipe as it is written makes in ``step``."""
        return self.home / "store" / step / self.plan()[step]["fingerprint"]

    def manifest(self, step: str) -> dict[str, Any]:
        return json.loads((self.made(step) / "manifest.json").read_text())

    def payloads(self) -> dict[str, str]:
        """Stage/fingerprint -> checksum of the payload, of all that is sealed."""
        manifests = [json.loads(path.read_text()) for path in self.home.glob("store/*/*/manifest.json")]
        return {f"{m['stage']}/{m['fingerprint']}": m["payload_sha256"] for m in manifests}


def ended(process: subprocess.CompletedProcess[str], code: int) -> subprocess.CompletedProcess[str]:
    """See that it ended with exit code ``code``."""
    assert process.returncode == code, process
    return process


def kill_tree(process: Forked) -> None:
    """``kill -9`` a process and all that it started, those in sessions of their own too."""
    with suppress(psutil.NoSuchProcess):  # it may just have ended
        parent = psutil.Process(process.pid)
        for member in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.communicate()
