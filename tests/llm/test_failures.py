"""How a rank that fails says so, and how the launcher hears it, on a full disk too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.core.errors import UserError
from data_pipeline.core.processes import has_ended
from flows.engine.launch import read_failure
from llm.model.config import ModelConfig
from llm.pretrain.config import PretrainConfig
from llm.training.failures import report_failure
from llm.training.job import Job


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("lower the rate"), "lower the rate"),
        (OSError(28, "No space left on device"), "make room and run again"),
        (torch.OutOfMemoryError("CUDA out of memory"), "lower pretrain.runtime.micro_batch"),
    ],
)
def test_what_the_user_can_mend_is_told_in_a_line(tmp_path: Path, error: Exception, message: str) -> None:
    report_failure(error, tmp_path)
    failure = read_failure(tmp_path / "error.json")
    assert failure is not None
    assert (failure[0], message in failure[1]) == ("user", True)


def test_the_first_failure_is_the_one_told(tmp_path: Path) -> None:
    report_failure(ValueError("first"), tmp_path)
    report_failure(UserError("second"), tmp_path)
    assert read_failure(tmp_path / "error.json") == ("fault", "ValueError: first")


@pytest.mark.parametrize("content", ["", '{"kind": "us', "[]", '{"kind": "user"}', None])
def test_a_failure_that_was_not_told_whole_is_not_heard(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "error.json").write_text(content)
    assert read_failure(tmp_path / "error.json") is None


ON_A_FULL_DISK = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from llm.training.failures import no_room, report_failure

folder = Path(sys.argv[1])
weights = {"a": torch.zeros(2_000_000)}
attempts = [
    lambda: torch.save(weights, folder / "weights.pt"),
    lambda: save_file(weights, folder / "weights.safetensors"),
    lambda: (folder / "weights").write_bytes(bytes(8_000_000)),
]
for attempt in attempts:
    try:
        attempt()
    except Exception as error:
        print(no_room(error))
        report_failure(error, folder)
"""


def test_a_full_disk_is_known_whichever_library_meets_it(tmp_path: Path) -> None:
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size=4m tmpfs {tmp_path}"
    allowed = subprocess.run([*command, "sh", "-c", mount], capture_output=True, text=True)
    if allowed.returncode:
        pytest.skip(f"this system lets us mount no small disk: {allowed.stderr.strip()}")
    script = f'{mount} && exec "$0" -c "$1" {tmp_path}'
    ended = subprocess.run(
        [*command, "sh", "-c", script, sys.executable, ON_A_FULL_DISK], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout.split()) == (0, ["True"] * 3), ended.stderr


def test_a_rank_that_cannot_tell_its_failure_ends_all_the_same(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    """No rendezvous is described in the environment, and there is no folder to say so in."""
    model = ModelConfig(layers=1, heads=2, width=16, context=32, vocab_size=500)
    config = PretrainConfig.model_validate({"tokens": 1 << 20})
    job = Job(
        config=config, model=model, tokens=corpus["tokens"], tokenizer=corpus["tokenizer"], out=tmp_path
    )
    job.scratch.mkdir()
    path = job.scratch / "job.json"
    path.write_text(job.model_dump_json())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    ended = subprocess.run(
        [sys.executable, "-m", "llm.training.trainer", str(path)],
        env={**environment, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert "MASTER_ADDR" in ended.stderr
    assert "FileNotFoundError" not in ended.stderr


def test_a_process_that_nobody_collected_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE)
    assert not has_ended(os.getpid())
    assert child.stdout is not None
    child.stdout.read()  # until it closes: then it has ended, and is a zombie
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(child.pid)
    child.wait()
    assert has_ended(child.pid)
