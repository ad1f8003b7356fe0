"""How a process that runs a recipe behaves: what its libraries print, and what signals mean to it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings

import psutil

from flows.engine import launch


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
