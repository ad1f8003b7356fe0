"""Requests to a rank by signals while it trains: SIGUSR1 to save and continue, SIGTERM to save and end. Schedulers
send the one or the other some time before they kill. What any rank was asked, all do after the same step.
"""

from __future__ import annotations

import signal
from types import FrameType

from llm.training.engine import Asked


class Requests:
    """The signals that came since they were last looked at."""

    def __init__(self) -> None:
        self._came: set[int] = set()

    def listen(self) -> None:
        """Keep the signals from now on: before there is anything to save, they end a rank as any process."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._keep)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self._came.add(number)

    def take(self) -> Asked:
        """Return what was asked since the last call."""
        came, self._came = self._came, set()
        return Asked(save=signal.SIGUSR1 in came, stop=signal.SIGTERM in came)
