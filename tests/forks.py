"""Processes that begin with all imported: forked from a server that has done so once, where Python starts for seconds.

``python -m tests.forks MODULE`` imports a module, then forks a process for each order on its standard input.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from flows.engine.launch import read_failure
from flows.engine.ports import free_port
from flows.engine.process import quiet_libraries
from flows.stages import STAGES
from llm.machine.environment import rank_environment

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def server(imported: str) -> subprocess.Popen[str]:
    """The process to fork from; it ends when we do, for then its standard input does."""
    quiet = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # else a look for GPUs spoils what is forked later
    # What modules set for MLflow when they are imported is for the forked ones too, not what ours have set here.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.forks", imported],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**kept, **quiet},
    )


class Forked:
    """``python -m module arguments``, as much of a `subprocess.Popen` as the tests need."""

    def __init__(self, imported: str, module: str, arguments: list[str], environment: dict[str, str]) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="forked-")
        self._folder = Path(self._temporary.name)
        self.args, self.returncode = [module, *arguments], None
        order = {
            "argv": self.args,
            "environment": environment,
            "folder": str(self._folder),
            "cwd": os.getcwd(),
        }
        stdin, stdout = server(imported).stdin, server(imported).stdout
        assert stdin
        assert stdout
        print(json.dumps(order), file=stdin, flush=True)
        self.pid = int(stdout.readline())

    returncode: int | None

    def poll(self) -> int | None:
        if self.returncode is None:
            with suppress(FileNotFoundError):
                self.returncode = int((self._folder / "code").read_text())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or 600)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 600)
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return (self._folder / "out").read_text(), (self._folder / "err").read_text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def launch(module: str, job: Path, ranks: int, *, logs: Path, grace_seconds: float = 0) -> None:
    """Run ranks to their end as `flows.engine.launch.local` does, without torchrun.

    For tests of what ranks compute; those of how they are started, signalled and ended use the real one.
    """
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "error.json").unlink(missing_ok=True)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": ranks}
    place |= {"LOCAL_WORLD_SIZE": ranks, **rank_environment(ranks)}
    started = []
    for rank in range(ranks):
        place |= {"RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        started.append(Forked("llm.training.trainer", module, [str(job)], environment))
    while any(rank.poll() is None for rank in started) and not any(rank.poll() for rank in started):
        time.sleep(0.01)
    for rank in started:  # where one has failed, the others may wait for it
        rank.send_signal(9)
    said = [rank.communicate()[1] for rank in started]
    if any(rank.returncode for rank in started):
        kind, message = read_failure(logs / "error.json") or ("fault", "\n".join(said)[-3000:])
        raise UserError(message) if kind == "user" else RuntimeError(message)


def serve(imported: str) -> None:
    """Fork a process for each order, say its number, and leave the code that it ends with."""
    before = dict(os.environ)
    quiet_libraries()
    importlib.import_module(imported)
    for stage in STAGES if imported == "flows.prefect.pipeline" else ():
        importlib.import_module(stage.body_at.partition(":")[0])
    settings = dict(os.environ.items() - before.items())  # that the imported made for themselves
    assert threading.active_count() == 1, "threads do not survive a fork"
    folders: dict[int, Path] = {}
    while True:
        if select.select([sys.stdin], [], [], 0.02)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            order = json.loads(line)
            pid = os.fork()
            if not pid:
                become({**order, "environment": settings | order["environment"]})
                return
            folders[pid] = Path(order["folder"])
            print(pid, flush=True)
        while folders and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            folder = folders.pop(ended[0])
            with suppress(FileNotFoundError):  # nobody wants to know
                (folder / "new").write_text(str(os.waitstatus_to_exitcode(ended[1])))
                (folder / "new").rename(folder / "code")


def become(order: dict[str, Any]) -> None:
    """Be what was ordered, from here to the end of the process."""
    folder = Path(order["folder"])
    for stream, path in enumerate((os.devnull, folder / "out", folder / "err")):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.dup2(file, stream)
        os.close(file)
    # What a shell starts in the background, maybe all of the tests, would ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    if (threads := os.environ.get("OMP_NUM_THREADS")) and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads))
    sys.argv = order["argv"]
    sys.modules.pop(sys.argv[0], None)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(sys.argv[1])
