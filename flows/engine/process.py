"""How a process that runs a recipe behaves: what its libraries print, and what signals mean to it."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
import warnings
from typing import Any, TextIO

import psutil

from flows.engine import launch
from flows.engine.stopping import asked, unwind_on_signals


def lives(pid: int, created: float) -> bool:
    """Whether the process of that number that began at ``created`` (seconds of the epoch) is still there.

    Another may have got its number since; and one that has ended stays listed until its parent asks for it.
    """
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def save_when_asked() -> None:
    """Let SIGUSR1 have a training that runs write a checkpoint, and continue."""

    signal.signal(signal.SIGUSR1, lambda number, frame: launch.save_asked.set())


def begin_part() -> tuple[Any, TextIO]:
    """Make this the process of a part of a run, which the process that started it writes to its standard input.

    Returns:
        what came there; and the stream of its reports, standard output, which nothing else is printed to.
    """
    quiet_libraries()
    unwind_on_signals()
    save_when_asked()
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no report
    job = pickle.load(sys.stdin.buffer)
    threading.Thread(target=stop_when_alone, daemon=True).start()
    return job, reports


def stop_when_alone() -> None:
    """Stop this process when the one that writes its standard input is gone."""
    os.read(
        sys.stdin.fileno(), 1
    )  # not through a buffer, whose lock the interpreter could not have as it ends
    asked.stop("stopped, for the run that it belongs to is gone")


def quiet_libraries() -> None:
    """Settings that keep libraries from printing what a user can do nothing about. Before their import."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONWARNINGS": "ignore",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.raiseExceptions = False  # a log record that can't be delivered is no news for the terminal
