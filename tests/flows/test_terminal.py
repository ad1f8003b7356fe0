"""Progress on the terminal."""

from __future__ import annotations

import pytest

from flows.listeners import terminal
from flows.listeners.terminal import Terminal


def test_what_is_counted_anew_has_a_rate_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step that has worked for long on one thing does not say of the next one that it takes for ever."""
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    shown = Terminal()
    shown.step_started("score", "")
    for seconds, done, unit in (
        (100, 100, "items of 一"),
        (100, 200, "items of 一"),
        (1, 1, "items of 二"),
        (99, 100, "items of 二"),
    ):
        now[0] += seconds
        shown.progress("score", done, 300, unit)
    out = capsys.readouterr().out
    assert "100 of 300 items of 一 · 1/s · 3:20 left" in out
    assert "100 of 300 items of 二 · 1.01/s · 3:18 left" in out
