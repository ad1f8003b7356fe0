"""Notices of a run's end: to a webhook, or by a notification block of Prefect's (Slack, e-mail and others).

A receiver is written ``env:NAME`` (a variable of the environment that holds a webhook's address, which may be a
secret) or ``TYPE/NAME`` (a block of Prefect's: ``webhook/ops``, ``slack-webhook/team``, ``sendgrid-email/team``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from prefect.blocks.core import Block
from prefect.blocks.notifications import NotificationBlock
from prefect.blocks.webhook import Webhook
from prefect.utilities.asyncutils import run_coro_as_sync

from data_pipeline.core.errors import UserError
from flows.engine.events import Event, Linked, RunEnded, RunStarted, StepReused, StepSealed

RECEIVER = re.compile(r"env:(?P<variable>[A-Za-z_][A-Za-z0-9_]*)|(?P<block>[a-z0-9-]+/[a-z0-9-]+)")
SECONDS = 10.0


@dataclass(frozen=True)
class Notice:
    """The outcome of a run."""

    recipe: str
    state: str
    """``completed``, ``failed`` or ``stopped``."""
    summary: str
    """One line."""
    stage: str = ""
    """The one that failed."""
    log: str = ""
    """The last lines of what it said."""
    resume: str = ""
    """The command that resumes it."""
    prefect_url: str = ""
    mlflow_url: str = ""
    compare_url: str = ""
    """Where MLflow shows all runs of the recipe, with their curves."""
    seconds: float = 0.0

    @property
    def subject(self) -> str:
        return f"llmill: {self.recipe} {self.state}"

    @property
    def text(self) -> str:
        """For people."""
        log = "```\n{}\n```".format(self.log.replace("```", "` ` `")) if self.log else ""
        resume = f"resume with: {self.resume}" if self.resume else ""
        parts = [self.summary, log, resume, self.prefect_url, self.mlflow_url, self.compare_url]
        return "\n".join(part for part in parts if part)


class NoticeListener:
    """Reports the run's end to those whom a recipe names."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._run: RunStarted | None = None
        self._ended: RunEnded | None = None
        self._how: dict[str, str] = {}
        self._links = Linked(url="")

    def handle(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._run = event
            case Linked():
                self._links = event
            case StepSealed(step=step, how=how) | StepReused(step=step, how=how):
                self._how[step] = how
            case RunEnded():
                self._ended = event

    def close(self) -> None:
        """Send the notice, when MLflow has had time to say where it shows the run."""
        if self._run and self._ended and self._run.notify:
            send_notice(self._notice(self._run, self._ended), self._run.notify, self._warn)

    def _notice(self, run: RunStarted, ended: RunEnded) -> Notice:
        done = ", ".join(f"{name} {how}" for name, how in self._how.items())
        return Notice(
            recipe=run.recipe,
            state={"FINISHED": "completed", "FAILED": "failed", "KILLED": "stopped"}[ended.status],
            summary=ended.message or done,
            stage=ended.step,
            log=ended.log,
            resume=run.command if ended.status != "FINISHED" else "",
            prefect_url=run.flow_run.get("url", ""),
            mlflow_url=self._links.url,
            compare_url=self._links.table,
            seconds=round(ended.seconds, 1),
        )


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
        warn(f"{receiver} could not be told of the run's end: the variable is not set")
    for receiver in receivers:
        if receiver in unset:
            continue
        try:
            send(notice, receiver)
        except Exception as error:
            # Not the message: it may hold the address, and that a secret.
            warn(f"{receiver} could not be told of the run's end: {type(error).__name__}")


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
        told: Any = block.notify
        told(body=notice.text, subject=notice.subject)
    else:
        raise TypeError(f"{receiver} is no block that sends notices")
