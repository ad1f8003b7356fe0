"""A body's context under Prefect: work over shards is tasks of the step's task runner."""

from __future__ import annotations

import os
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from prefect import task
from prefect.context import TagsContext
from prefect.futures import PrefectFuture
from prefect.runtime import deployment

from data_pipeline.stage import Item, Result
from flows.engine import launch
from flows.engine.context import StepContext
from flows.engine.events import StepStarted
from flows.engine.log import RunLog
from flows.engine.parts import Part, Stopped, compute
from flows.engine.stopping import END_SECONDS, STOP_SECONDS
from flows.prefect.run_notes import WORKER, needs
from flows.prefect.runners import Workers

MOST_TASKS, TASKS_A_WORKER = 200, 4
IN_FLIGHT = 3  # tasks a worker that are submitted and not done, so that none waits for this process
FOREIGN_SECONDS = 30.0
"""After which a worker of Prefect's own kills what it has asked to end; ours waits for as long as a run needs."""


class PrefectContext(StepContext):
    """Serves one body inside its step's Prefect flow."""

    def __init__(self, started: StepStarted, out: Path, log: RunLog, workers: Workers) -> None:
        super().__init__(started, out, log)
        self.workers, self._workers = workers.count, workers

    def map(
        self, fn: Callable[[Item], Result], items: Sequence[Item], *, names: Sequence[str] | None = None
    ) -> list[Result]:
        """Each item, or group of neighbours when there are many, is a task of the step's task runner.

        When one fails, no more are submitted, those at work end at their next item, and only then is the failure
        raised: nothing may go on writing when the step's lock is given back.
        """
        stop = self._out / f".stop-{secrets.token_hex(4)}.tmp"
        waiting = deque(enumerate(self._groups(fn, items, names, stop)))
        computing = task(name=self.step, task_run_name="{name}", persist_result=False, retries=0)(compute)
        done: SimpleQueue[tuple[int, PrefectFuture[list[Result]]]] = SimpleQueue()
        results: dict[int, list[Result]] = {}
        failure: Exception | None = None
        running = finished = 0
        try:
            while waiting or running:
                if waiting and running < IN_FLIGHT * self.workers:
                    number, (name, part) = waiting.popleft()
                    # For each tag that a task inherits, it would ask the server for leave before it starts.
                    with TagsContext(current_tags=set()):
                        future = computing.submit(name, self._workers.prepare(part))
                    future.add_done_callback(
                        partial(lambda number, future: done.put((number, future)), number)
                    )
                    running += 1
                    continue
                number, future = done.get()
                running -= 1
                try:
                    results[number] = future.result()
                except Exception as error:
                    waiting.clear()
                    if failure is None or isinstance(failure, Stopped):
                        failure = error
                else:
                    finished += len(results[number])
                    self.advance(len(results[number]), finished, len(items))
        except BaseException:
            stop.touch()
            self._workers.stop()  # else Prefect waits for the tasks at work
            raise
        if failure:
            stop.unlink(missing_ok=True)
            raise failure
        return [result for number in sorted(results) for result in results[number]]

    def _groups(
        self,
        fn: Callable[[Item], Result],
        items: Sequence[Item],
        names: Sequence[str] | None,
        stop: Path,
    ) -> Iterator[tuple[str, Part[Item, Result]]]:
        """The items in groups, each with a name for people."""
        size = group_size(len(items), self.workers)
        for start in range(0, len(items), size):
            group = items[start : start + size]
            more = f" and {len(group) - 1} more" if len(group) > 1 else ""
            yield f"{self.step} {names[start] if names else start}{more}", Part(fn, group, stop)

    def grace(self, wanted: float) -> float:
        """The seconds that ranks get to save in; less than ``wanted`` where the worker that runs us does not wait."""
        most = FOREIGN_SECONDS - launch.MARGIN_SECONDS - STOP_SECONDS
        if not deployment.id or WORKER in os.environ or wanted <= most:
            needs(wanted + launch.MARGIN_SECONDS + END_SECONDS)
            return wanted
        self.note(
            f"this worker is Prefect's own, which kills a run {FOREIGN_SECONDS:g} s after a cancel: "
            f"ranks get {most:g} s to save, not grace_seconds ({wanted:g}); `llmill worker` waits for them",
            warning=True,
        )
        needs(most + launch.MARGIN_SECONDS + END_SECONDS)
        return most


def group_size(items: int, workers: int) -> int:
    """How many items make a task: one, until there are more than enough tasks to keep all workers evenly busy.

    A task costs 10 ms in a thread and 150 ms on Dask or Ray (measured), whatever it computes.
    """
    return max(1, -(-items // max(MOST_TASKS, TASKS_A_WORKER * workers)))
