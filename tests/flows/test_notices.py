"""Whom a run tells of its end, and what is said."""

from __future__ import annotations

import pytest

from data_pipeline.core.errors import UserError
from flows.listeners.notices import Notice, check_receivers, send_notice, unset_receivers


@pytest.mark.parametrize(
    "receiver", ["https://hooks.example/secret", "slack", "env:", "Slack/Team", "env:A-B"]
)
def test_what_is_no_receiver_is_refused_with_how_to_write_one(receiver):
    with pytest.raises(UserError, match="slack-webhook/team"):
        check_receivers([receiver])


def test_a_variable_that_is_not_set_is_warned_of_and_fails_no_run(monkeypatch):
    monkeypatch.delenv("LLMILL_TEST_HOOK", raising=False)
    check_receivers(["env:LLMILL_TEST_HOOK"])
    assert unset_receivers(["env:LLMILL_TEST_HOOK", "slack-webhook/team"]) == ["env:LLMILL_TEST_HOOK"]
    warnings: list[str] = []
    send_notice(Notice("small", "failed", "it failed"), ["env:LLMILL_TEST_HOOK"], warnings.append)
    assert warnings == [
        "env:LLMILL_TEST_HOOK could not be notified of the run's end: the variable is not set"
    ]
    monkeypatch.setenv("LLMILL_TEST_HOOK", "http://127.0.0.1:1")
    assert not unset_receivers(["env:LLMILL_TEST_HOOK"])


def test_a_receiver_that_cannot_be_told_is_warned_of_without_its_address(monkeypatch):
    monkeypatch.setenv("LLMILL_TEST_HOOK", "http://127.0.0.1:1/secret-path")
    warnings: list[str] = []
    send_notice(Notice("small", "failed", "it failed"), ["env:LLMILL_TEST_HOOK"], warnings.append)
    assert len(warnings) == 1
    assert "env:LLMILL_TEST_HOOK could not be notified" in warnings[0]
    assert "secret-path" not in warnings[0]


def test_the_text_for_people_holds_what_failed_its_log_and_the_command_that_resumes():
    notice = Notice(
        recipe="small",
        state="failed",
        summary="clean failed",
        stage="clean",
        log="line 1\nline 2",
        resume="llmill run small.yaml",
    )
    assert notice.subject == "llmill: small failed"
    assert notice.text == "clean failed\n```\nline 1\nline 2\n```\nresume with: llmill run small.yaml"
