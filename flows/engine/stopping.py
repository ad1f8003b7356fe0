"""How a run is asked to stop: by a signal, or on Prefect's pages. Either way `Stop` is raised in the main thread, once.

A request often comes twice: a worker and systemd both send SIGTERM, and Prefect has its own besides. Only a
second Ctrl-C is more than the first: what is being saved is then given up.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SECONDS = 10.0
"""Seconds that a run gets to end in, besides the time in which ranks save."""
REPORT_SECONDS = 15.0
"""Seconds that it gets on top to report to Prefect, MLflow and those whom the recipe names."""
END_SECONDS = STOP_SECONDS + REPORT_SECONDS
WORDS = {
    signal.SIGINT: "stopped by Ctrl-C",
    signal.SIGTERM: "stopped by SIGTERM",
    signal.SIGHUP: "stopped, for its terminal was closed",
}


class Stop(KeyboardInterrupt):
    """The run is to end; the message says who asked, or where it stands."""


class Asked:
    """The request to this process: none, or to stop."""

    def __init__(self) -> None:
        self.why = ""
        """In words; empty until somebody asks."""
        self.deadline = 0.0
        """When (`time.monotonic`) the steps must have ended."""
        self._raised = False
        self._lock = threading.Lock()

    def stop(self, why: str) -> None:
        """Ask from another thread."""
        self.note(why)
        os.kill(os.getpid(), signal.SIGTERM)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.note(WORDS[signal.Signals(number)])
        if not self._raised or number == signal.SIGINT:
            self._raised = True
            raise Stop(self.why)

    def allow(self, seconds: float) -> None:
        """Have the steps be given so long from now on: ranks save."""
        self.deadline = time.monotonic() + seconds

    def note(self, why: str) -> None:
        """Keep what was asked first."""
        with self._lock:
            if not self.why:
                self.why = why
                self.allow(STOP_SECONDS)


asked = Asked()


def unwind_on_signals() -> None:
    """From now on, let SIGTERM, SIGHUP and Ctrl-C raise `Stop`, but for those that our parent had us ignore (nohup)."""
    for number in WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, asked.handle)


@contextmanager
def heeding_signals() -> Iterator[None]:
    """`unwind_on_signals` within the block: Prefect puts a handler of its own in the place of ours as a flow begins."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in WORDS}
    unwind_on_signals()
    try:
        yield
    finally:
        if not asked.why:  # else who asks again must not interrupt its report
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def ending_in_time(report: Callable[[], None]) -> Iterator[None]:
    """See that this process ends soon after it is asked to, even where its main thread computes and handles no signal.

    When the block has not been left by `Asked.deadline`, ``report`` is called from another thread, for `REPORT_SECONDS`
    at most, and the process ends with code 130. Must be entered in the main thread.

    Raises:
        Stop: somebody has asked before: what was raised then may have been lost within an import or a destructor.
    """
    if asked.why:
        raise Stop(asked.why)
    done = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        received = os.read(reading, 64)
        while not done.is_set():
            for number in received:
                if number in WORDS and signal.getsignal(number) is not signal.SIG_IGN:
                    asked.note(WORDS[signal.Signals(number)])
            received = b""
            if not asked.why:
                received = os.read(reading, 64)
            elif done.wait(0.2) or time.monotonic() < asked.deadline:
                continue
            else:
                end(report)

    thread = threading.Thread(target=watch, name="end-in-time", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(before)
        with suppress(OSError):
            os.write(writing, b"\0")
        thread.join()
        os.close(reading)
        os.close(writing)


def end(report: Callable[[], None]) -> None:
    """End this process, whatever it computes."""
    reporting = threading.Thread(target=report, name="report", daemon=True)
    reporting.start()
    reporting.join(REPORT_SECONDS)
    os._exit(130)
