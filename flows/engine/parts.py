"""The parts of a step, as they travel to whatever computes them: a function, its items, and the place of a stop flag.

A worker process of any kind imports this module, so it imports little, and it knows nothing of the run that sent it.
"""

from __future__ import annotations

import platform
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic

from data_pipeline.stage import Item, Result

SAME_VERSIONS = ("llmill", "prefect", "pyarrow", "numpy", "tokenizers")


class Stopped(Exception):
    """Another part of the same step failed, so that this one was not computed."""


class Part(Generic[Item, Result]):
    """Some neighbouring items of a `StageContext.map`, computed one after the other.

    No dataclass and no list: Prefect would look into these for futures, item by item.
    """

    def __init__(self, fn: Callable[[Item], Result], items: Sequence[Item], stop: Path) -> None:
        self.fn, self.items, self.stop = fn, items, stop

    def __call__(self) -> list[Result]:
        """The results, in the order of the items. The first part to fail keeps all others from their next item.

        Raises:
            Stopped: another part failed. Besides that, whatever ``fn`` raises.
        """
        results = []
        for item in self.items:
            if self.stop.exists():
                raise Stopped("another part of the step failed")
            try:
                results.append(self.fn(item))
            except BaseException:
                with suppress(OSError):  # a full disk, say; the failure itself is the news
                    self.stop.touch()
                raise
        return results


def compute(name: str, part: Callable[[], list[Any]]) -> list[Any]:
    """The body of a Prefect task, which is called ``name``."""
    return part()


def dask_setup(worker: object) -> None:
    """Leave Ctrl-C to the run. Dask calls this in each worker process that was started here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def versions() -> dict[str, str]:
    """Return the versions that must be the same wherever a run is computed, or else its bytes may differ."""
    return {"Python": platform.python_version(), **{name: version(name) for name in SAME_VERSIONS}}


def unfit(seen: Path, api: str, expected: dict[str, str]) -> str:
    """Why this worker can't serve a run; empty where it can.

    Args:
        seen: a file that the run has made in its home.
        api: the address of the run's Prefect server.
        expected: the run's own `versions`.
    """
    from flows.engine.ports import answers

    if not seen.exists():
        return f"does not see {seen.parent}: the home must be a folder that all workers share (--home)"
    if not answers(api):
        return f"does not reach Prefect at {api}: set PREFECT_API_URL to a server that all workers reach"
    differing = [
        f"{name} {mine} (here {expected[name]})"
        for name, mine in versions().items()
        if mine != expected[name]
    ]
    return f"has {', '.join(differing)}: install the same everywhere" if differing else ""
