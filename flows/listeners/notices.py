"""Notices of a run's end: to a webhook, or by a notification block of Prefect's (Slack, e-mail and others).

A run reports its own end; whoever finds that one was killed reports that (`report_killed`).

A receiver is written ``env:NAME`` (a variable of the environment that holds a webhook's address, which may be a
secret) or ``TYPE/NAME`` (a block of Prefect's: ``webhook/ops``, ``slack-webhook/team``, ``sendgrid-email/team``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import httpx
from prefect.blocks.core import Block
from prefect.blocks.notifications import NotificationBlock
from prefect.blocks.webhook import Webhook
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings
from prefect.utilities.asyncutils import run_coro_as_sync

from data_pipeline.core.errors import UserError
from flows.engine.events import (
    Compared,
    Event,
    Killed,
    Linked,
    RunEnded,
    RunStarted,
    StepReused,
    StepSealed,
    StepStarted,
)
from flows.engine.log import LogFile
from flows.engine.services import prefect_api
from flows.headline import BITS
from flows.listeners.last_score import score_line

RECEIVER = re.compile(r"env:(?P<variable>[A-Za-z_][A-Za-z0-9_]*)|(?P<block>[a-z0-9-]+/[a-z0-9-]+)")
SECONDS = 10.0
KILLED = "process killed"
STATES = {"FINISHED": "completed", "FAILED": "failed", "KILLED": "stopped", KILLED: "killed"}
"""How a run ended, as events say it, and `Killed` -> as a notice does."""


@dataclass(frozen=True)
class Notice:
    """The outcome of a run."""

    recipe: str
    state: str
    """``completed``, ``failed``, ``stopped``, or ``killed`` where its process died and another one found that."""
    summary: str
    """One line."""
    stage: str = ""
    """The one that failed."""
    log: str = ""
    """The last lines of what it reported."""
    resume: str = ""
    """The command that resumes it."""
    prefect_url: str = ""
    mlflow_url: str = ""
    compare_url: str = ""
    """Where MLflow shows all runs of the recipe, with their curves."""
    seconds: float = 0.0
    score: str = ""
    """Bits per byte of each model that was evaluated, and the difference to the one before: a line each."""
    bits_per_byte: dict[str, float] = field(default_factory=dict)
    """Scores by the step that evaluated."""

    @property
    def subject(self) -> str:
        return f"llmill: {self.recipe} {self.state}"

    @property
    def text(self) -> str:
        """For people."""
        log = "```\n{}\n```".format(self.log.replace("```", "` ` `")) if self.log else ""
        resume = f"resume with: {self.resume}" if self.resume else ""
        parts = [self.summary, self.score, log, resume, self.prefect_url, self.mlflow_url, self.compare_url]
        return "\n".join(part for part in parts if part)


class NoticeListener:
    """Reports the run's end to those whom a recipe names."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._run: RunStarted | None = None
        self._ended: RunEnded | None = None
        self._how: dict[str, str] = {}
        self._evaluated: dict[str, StepSealed | StepReused] = {}
        self._verdicts: dict[str, str] = {}
        self._step = ""
        self._links = Linked(url="")

    def handle(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._run = event
            case Linked():
                self._links = event
            case StepStarted(step=step):
                self._step = step
            case StepSealed(step=step, how=how) | StepReused(step=step, how=how):
                self._how[step], self._step = how, ""
                if event.stage == "evaluate":
                    self._evaluated[step] = event
            case Compared(step=step, verdict=verdict):
                self._verdicts[step] = verdict
            case RunEnded():
                self._ended = event
            case Killed(key=key, time=time) if self._run and key == self._run.key:
                where = f" in {self._step}" if self._step else ""
                self._ended = RunEnded(
                    key=key,
                    status=KILLED,
                    seconds=(time - self._run.time) / 1000,
                    message=f"its process was killed{where}; what is sealed or saved is kept",
                    step=self._step,
                )

    def close(self) -> None:
        """Send the notice, when MLflow has had time to report where it shows the run."""
        if self._run and self._ended and self._run.notify:
            send_notice(self._notice(self._run, self._ended), self._run.notify, self._warn)

    def _notice(self, run: RunStarted, ended: RunEnded) -> Notice:
        done = ", ".join(f"{name} {how}" for name, how in self._how.items())
        lines = [
            "; ".join(filter(None, (score_line(one, run.recipe, Path(run.store)), self._verdicts.get(step))))
            for step, one in self._evaluated.items()
        ]
        return Notice(
            recipe=run.recipe,
            state=STATES[ended.status],
            summary=ended.message or done,
            stage=ended.step,
            log=ended.log,
            resume=run.command if ended.status != "FINISHED" else "",
            prefect_url=run.flow_run.get("url", ""),
            mlflow_url=self._links.url,
            compare_url=self._links.table,
            seconds=round(ended.seconds, 1),
            score="\n".join(filter(None, lines)),
            bits_per_byte=finite_scores(self._evaluated),
        )


def finite_scores(evaluated: Mapping[str, StepSealed | StepReused]) -> dict[str, float]:
    """Bits per byte by step, of those that are numbers as JSON has them."""
    scores = {step: one.metrics.get(BITS) for step, one in evaluated.items()}
    return {step: score for step, score in scores.items() if isinstance(score, float) and isfinite(score)}


def report_killed(log: LogFile, warn: Callable[[str], None]) -> None:
    """Report a run whose process died to those whom it names; called once, by who has just ended its log."""
    listener = NoticeListener(warn)
    for event, _ in log.events():
        listener.handle(event)
    api = prefect_api(log.folder.parents[1])
    # Prefect must start no server of its own, nor keep anything in a person's folder, where there is none to ask.
    with temporary_settings({PREFECT_API_URL: api or None, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False}):
        listener.close()


def check_receivers(receivers: Sequence[str]) -> None:
    """See that every receiver is well written.

    Raises:
        UserError: one is not.
    """
    for receiver in receivers:
        if not RECEIVER.fullmatch(receiver):
            raise UserError(
                f"runtime.notify: {receiver} is no receiver; write env:VARIABLE (it holds the address of a webhook) "
                "or TYPE/NAME of a block of Prefect's, such as slack-webhook/team"
            )


def unset_receivers(receivers: Sequence[str]) -> list[str]:
    """Those whose variable is not set here."""
    matches = {receiver: RECEIVER.fullmatch(receiver) for receiver in receivers}
    return [
        receiver
        for receiver, match in matches.items()
        if match and match["variable"] and not os.environ.get(match["variable"])
    ]


def send_notice(notice: Notice, receivers: Sequence[str], warn: Callable[[str], None]) -> None:
    """Send to every receiver; one that can't be reached is warned of, and never fails a run."""
    unset = unset_receivers(receivers)
    for receiver in unset:
        warn(f"{receiver} could not be notified of the run's end: the variable is not set")
    for receiver in receivers:
        if receiver in unset:
            continue
        try:
            send(notice, receiver)
        except Exception as error:
            # Not the message: it may hold the address, and that a secret.
            warn(f"{receiver} could not be notified of the run's end: {type(error).__name__}")


def send(notice: Notice, receiver: str) -> None:
    """Send to one receiver: JSON to a webhook, text to a block that writes to people."""
    match = RECEIVER.fullmatch(receiver)
    assert match
    content = {"subject": notice.subject, **asdict(notice)}
    if match["variable"]:
        httpx.post(os.environ[match["variable"]], json=content, timeout=SECONDS).raise_for_status()
        return
    block = Block.load(match["block"])
    if isinstance(block, Webhook):
        answer: Any = run_coro_as_sync(block.call(payload=content))
        answer.raise_for_status()
    elif isinstance(block, NotificationBlock):
        notify: Any = block.notify
        notify(body=notice.text, subject=notice.subject)
    else:
        raise TypeError(f"{receiver} is no block that sends notices")
