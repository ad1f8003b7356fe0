"""The course of a run: where it stands, how it fails or is stopped, and what is reported of that."""

from __future__ import annotations

import errno
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.core.errors import UserError
from data_pipeline.core.text import human_bytes
from flows.engine.context import StepContext
from flows.engine.launch import Interrupted
from flows.engine.log import RunLog
from flows.engine.order import Host, Order, Result
from flows.engine.plan import Step
from flows.engine.reporter import Reporter
from flows.engine.stopping import Stop, asked
from flows.engine.store import LOGS

FULL_BYTES = 1_000_000  # less free space than this, and no step can seal its manifest


class StageFailed(Exception):
    """A step ended with an error that is not the user's mistake; the message says how to resume it."""


class Course:
    """Where one run stands."""

    def __init__(
        self, order: Order, log: RunLog, host: Host, reporter: Reporter, results: Mapping[str, Result]
    ) -> None:
        self._order, self._log, self._host = order, log, host
        self._reporter, self._results = reporter, results
        self._store = order.planned.uses.store
        self.begin("")

    def begin(self, step: str) -> None:
        """A step is at work from now on; none, where its name is empty."""
        self.step = step
        self.context: StepContext | None = None
        """The context of the body that is called, once it is."""
        self.message = ""
        """Why the run failed or was stopped."""
        self.details = ""
        """The trace of that, or the message of a user's mistake; empty where it was stopped."""

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Log that the run begins, and how it ends."""
        status = "KILLED"
        try:
            self._reporter.run_started()
            yield
            status = "FINISHED"
        except Exception as error:
            status = "FAILED"
            self.message = self.message or str(error) or type(error).__name__
            raise explained(error, self._store.home, self._order.command) from error.__cause__
        except self._host.stops as stop:
            raise self._stopped(stop) from None
        finally:
            self._end(status)

    def _end(self, status: str) -> None:
        self._reporter.run_ended(
            status, self._results, message=self.message, step=self.step, details=self.details
        )

    def give_up(self) -> None:
        """Report everywhere that the run was stopped, while what is at work does not let it end."""
        if not self.message:
            self._failed(str(self._stopped(Stop())), "", "KILLED")
        message = self.message
        self._log.warn(f"{message}: ended by force; the same command resumes it: {self._order.command}")
        self._host.stopped(message)
        self._end("KILLED")
        self._log.close()

    def _stopped(self, stop: BaseException) -> Stop:
        """Return the `Stop` to raise: its message says in which step, who wanted it, and what is kept of that."""
        if not self.message:
            why = asked.why or (str(stop) if isinstance(stop, Stop) else "stopped by Prefect")
            interrupted = isinstance(stop, Interrupted)  # its message has what is saved
            kept = self.context.kept if self.context and not interrupted else ""
            where = f"{self.step}: " if self.step else ""
            self.message = "; ".join(part for part in (f"{where}{why}", kept) if part)
        return Stop(self.message)

    @contextmanager
    def failures(self, step: Step) -> Iterator[None]:
        """Keep the trace of a failure beside the unfinished artifact, and report how to resume."""
        try:
            yield
        except UserError as error:
            self._failed(str(error), str(error))
            raise UserError(f"{step.name}: {error}") from None
        except Exception as error:
            trace = "".join(traceback.format_exception(error))
            self._failed(f"{type(error).__name__}: {error}", trace)
            log = self._store.partial(step.stage.name, str(step.fingerprint)) / LOGS / "failure.txt"
            with suppress(OSError):  # the failure itself matters more than its log
                log.parent.mkdir(exist_ok=True)
                log.write_text(trace)
            details = f"{step.name} failed: {type(error).__name__}: {error}"
            raise StageFailed(f"{details}\nresume with: `{self._order.command}`\ntrace: {log}") from error
        except self._host.stops as stop:
            stopped = self._stopped(stop)
            self._failed(str(stopped), "", "KILLED")
            raise stopped from None

    def _failed(self, message: str, details: str, status: str = "FAILED") -> None:
        self.message, self.details = message, details
        self._reporter.step_failed(self.step, message, status)


def explained(error: Exception, home: Path, command: str) -> Exception:
    """A failure as people should read it."""
    if isinstance(error, UserError) or not disk_is_full(home, error):
        return error
    where = f"{home.resolve()} ({human_bytes(shutil.disk_usage(home).free)} free)"
    return UserError(f"the disk is full: {where}; make room, then `{command}` resumes the run")


def disk_is_full(home: Path, error: BaseException | None) -> bool:
    """Whether a failure comes from want of room: it says so, or hardly anything is left where all is written.

    Not only our own writes fail then; the databases of Prefect and MLflow have other words for it.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return shutil.disk_usage(home).free < FULL_BYTES
