"""System metrics of a step, as MLflow's own monitors measure them: processor, memory, disk and GPUs.

The names are MLflow's (``system/cpu_utilization_percentage``), so that its page shows them under "System metrics". GPUs
are seen where ``nvidia-ml-py`` is installed. A point's step is the second since the step first began.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

from flows.listeners.mlflow.points import Point

SECONDS = 20.0  # between points; a step that ends sooner has one
SHORTEST_SECONDS = 1.0  # over which a processor's load means something


class SystemMonitor:
    """Measures from a thread of its own, from when it is made until `stop`."""

    def __init__(self, begun: int, report: Callable[[Sequence[Point]], None]) -> None:
        """``begun`` is when the step first began, in milliseconds since 1970."""
        self._begun, self._report = begun, report
        self._monitors = [CPUMonitor(), DiskMonitor()]
        with suppress(ImportError, RuntimeError):  # no GPU, or nothing to ask it with
            self._monitors.append(GPUMonitor())
        self._over = threading.Event()
        for monitor in self._monitors:
            monitor.collect_metrics()  # what the processor did is reported since the last time that one asked
            monitor.clear_metrics()
        self._thread = threading.Thread(target=self._serve, name="system-monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Report the last seconds, and end."""
        self._over.set()
        self._thread.join()

    def _serve(self) -> None:
        over, measured_at = False, 0.0
        while not over:
            over = self._over.wait(SECONDS)
            if time.monotonic() - measured_at > SHORTEST_SECONDS:
                measured_at = time.monotonic()
                self._report(self._measure())

    def _measure(self) -> list[Point]:
        stamp = int(time.time() * 1000)
        points: list[Point] = []
        for monitor in self._monitors:
            monitor.collect_metrics()
            step = max(0, stamp - self._begun) // 1000
            for name, value in monitor.aggregate_metrics().items():
                points.append((f"system/{name}", float(value), stamp, step))
            monitor.clear_metrics()
        return points
