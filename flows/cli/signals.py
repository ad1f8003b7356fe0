"""Signals that come before anything is imported: they end this process with one line.

Libraries are imported for seconds, and an interrupt within an import is a trace at best, and swallowed at worst. What
has something to undo calls `flows.engine.stopping.unwind_on_signals` before it begins.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

STOPPED = 130


def heed_signals() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP end this process at once, but for those that its parent has it ignore."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, leave)


def leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"error: stopped\n")
    os._exit(STOPPED)
