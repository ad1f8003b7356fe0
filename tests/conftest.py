"""Shared by the tests of the whole line: a small real corpus, a recipe for it, and the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.servers import PrefectServer

RECIPE = """\
name: small
download:
  shard_bytes: 150_000
  sources:
    - {{name: stdlib, kind: local, path: {corpus}}}
clean:
  gopher: null
train_tokenizer: {{vocab_size: 512}}
tokenize: {{val_fraction: 0.1}}
pretrain:
  model: {{layers: 2, width: 32, heads: 2, context: 64, tie_embeddings: true}}
  tokens: 61_440
  batch_tokens: 1024
  lr: 3.0e-3
  validation: {{every: 20, tokens: 4096}}
  runtime: {{checkpoint_every: 5}}
evaluate: {{max_new_tokens: 16}}
"""


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
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    """One Prefect server for all runs of the session, as a team would have one."""
    before = {name: value for name, value in os.environ.items() if name.startswith("PREFECT_")}
    with PrefectServer(tmp_path_factory.mktemp("prefect")) as server:
        server.wait()
        yield os.environ["PREFECT_API_URL"]
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """About 600 kB of this Python's own sources, with an exact and a near duplicate planted."""
    folder = tmp_path_factory.mktemp("corpus")
    total = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if 2_000 < path.stat().st_size < 60_000 and total < 600_000:
            total += path.stat().st_size
            (folder / f"{path.stem}.txt").write_bytes(path.read_bytes())
    text = (folder / "ast.txt").read_text()
    (folder / "zz_copy.txt").write_text(text)
    (folder / "zz_almost.txt").write_text(text + "\n# one more line\n")
    return folder


@pytest.fixture(scope="session")
def make_llmill(tmp_path_factory, prefect_server, corpus):
    """``make_llmill()``: the command line on a new home, with the small recipe."""

    def make(home: Path | None = None, recipe: str = RECIPE) -> Llmill:
        home = home or tmp_path_factory.mktemp("home")
        path = tmp_path_factory.mktemp("recipe") / "small.yaml"
        path.write_text(recipe.format(corpus=corpus))
        return Llmill(home, path)

    return make


@pytest.fixture(scope="session")
def finished(make_llmill) -> Llmill:
    """A home in which the small recipe has run undisturbed. Tests must not change what is sealed there."""
    llmill = make_llmill()
    llmill.run()
    return llmill
