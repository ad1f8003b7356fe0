"""Signals while native code computes that does not return to Python for minutes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from corpora import write_documents

PROGRAM = """
import signal, sys
from pathlib import Path
from data_pipeline.stage import LocalContext
from data_pipeline.train_tokenizer.stage import TokenizerConfig, train_tokenizer
signal.signal(signal.SIGTERM, signal.default_int_handler)
train_tokenizer(TokenizerConfig(vocab_size=60_000), {"documents": Path(sys.argv[1])}, Path(sys.argv[2]), LocalContext())
"""


def learns(pid: int, out: Path) -> bool:
    """Whether a process below ``pid`` has computed for a second from the sample that lies there."""
    if not (out / "scratch/sample.arrow").exists():
        return False
    family = psutil.Process(pid).children(recursive=True)
    mapped = [one for one in family if any(file.path.endswith("sample.arrow") for file in one.memory_maps())]
    return any(one.cpu_times().user > 1 for one in mapped)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_ends_the_training_of_a_tokenizer_at_once(tmp_path: Path, number: signal.Signals) -> None:
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, (20, 400_000), np.uint8)
    texts = {f"s/{n}": row.tobytes().decode() for n, row in enumerate(letters)}
    source, out = write_documents(tmp_path / "in", texts), tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", PROGRAM, source, out], stderr=subprocess.PIPE) as process:
        while not learns(process.pid, out):
            assert process.poll() is None
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.wait(10)
        assert b"KeyboardInterrupt" in process.stderr.read()
    assert not psutil.wait_procs(family, 10)[1]
    assert not (out / "tokenizer.json").exists()
