"""``llmill chat`` in a terminal: lines, commands, and Ctrl-C, which stops an answer and not the program."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from command_line import Llmill

from flows.cli.chat import answer
from flows.compare.talkers import find_speaker
from flows.engine.store import Store
from llm.chat.talk import Talk


@pytest.fixture
def llmill(copy_finished: Callable[[Path], Llmill], tmp_path: Path) -> Llmill:
    return copy_finished(tmp_path / "home")


def talk(llmill: Llmill, *arguments: str, lines: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli.start", "chat", *arguments]
    return subprocess.run(
        command, env=llmill.environment(), input="\n".join(lines), capture_output=True, text=True, timeout=900
    )


def test_lines_of_a_file_are_answered_and_commands_carried_out(llmill: Llmill, tmp_path: Path) -> None:
    said = tmp_path / "said it.jsonl"
    lines = ["import os", "/temperature 0", "/temperature hot", "/nobody", "/save", f"/save '{said}'", "/reset",
             "/system x", "日本語 🦊", "/quit", "never read"]  # fmt: skip
    done = talk(llmill, "--max-tokens", "6", lines=lines)
    assert "it was trained on no conversations, and goes on with the text" in done.stderr
    for shown in ("(temperature 0)", "takes a number from 0 on, not 'hot'", "there is no command /nobody",
                  "/save takes the name of a file", "forgotten", "nothing is said to it beforehand"):  # fmt: skip
        assert shown in done.stderr
    assert done.stderr.count("tokens · first after") == 2
    row = json.loads(said.read_text(encoding="utf-8"))
    assert row["messages"][0] == {"role": "user", "content": "import os"}
    assert row["messages"][1]["role"] == "assistant"


class Terminal:
    """A terminal with ``llmill chat`` in it."""

    def __init__(self, llmill: Llmill) -> None:
        self.leader, follower = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli.start", "chat", "--max-tokens", "100000"],
            env=llmill.environment(),
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
        )
        os.close(follower)
        self.shown = ""

    def read(self) -> bool:
        """Read what is there, after a wait; False at the end."""
        ready, _, _ = select.select([self.leader], [], [], 200)
        assert ready, f"nothing comes behind {self.shown!r}"
        try:
            data = os.read(self.leader, 4096)
        except OSError:  # the other end is closed
            return False
        self.shown += data.decode("utf-8", "replace")
        return bool(data)

    def wait_for(self, text: str) -> None:
        """Read until something is shown, and take it and all before it away."""
        while text not in self.shown:
            assert self.read(), f"it ended: {self.shown!r}"
        self.shown = self.shown.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C at the prompt.

        CPython's `readline` prints the prompt before it waits, and does not see a Ctrl-C in between until the next key:
        so once it waits.
        """
        process = psutil.Process(self.process.pid)
        while process.status() != psutil.STATUS_SLEEPING:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)


def test_ctrl_c_at_the_prompt_does_not_end_the_program(llmill: Llmill) -> None:
    terminal = Terminal(llmill)
    terminal.wait_for("you> ")
    terminal.interrupt()
    terminal.wait_for("/quit or Ctrl-D ends")
    terminal.wait_for("you> ")
    terminal.type("import\n")
    terminal.wait_for("tokens · first after")
    terminal.wait_for("you> ")
    terminal.type("/quit\n")
    while terminal.read():
        pass
    assert terminal.process.wait(timeout=600) == 0
    os.close(terminal.leader)


class Stopped(io.StringIO):
    """A screen on which Ctrl-C is pressed when the third piece of an answer comes."""

    def write(self, text: str) -> int:
        if len(self.getvalue()) and self.getvalue().count("\0") == 2:
            raise KeyboardInterrupt
        return super().write(text + "\0")


def test_what_was_said_until_ctrl_c_stays(
    llmill: Llmill, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Talk(find_speaker("latest", Store(llmill.home)), most=30)
    screen = Stopped()
    with monkeypatch.context() as changed:
        changed.setattr(sys, "stdout", screen)
        changed.setattr("builtins.print", lambda *_: None)
        answer(talk, "import os")
    shown = screen.getvalue().replace("\0", "")
    assert "stopped · " in capsys.readouterr().err
    assert [one["role"] for one in talk.said] == ["user", "assistant"]
    assert talk.said[1]["content"].startswith(shown)
    assert talk.reply is not None
    assert 0 < talk.reply.tokens < 30


def test_what_can_not_be_talked_to_is_said(llmill: Llmill, tmp_path: Path) -> None:
    for arguments, said in (
        (("nobody",), "no run is called nobody"),
        (("--home", str(tmp_path)), "no model in"),
    ):
        done = talk(llmill, *arguments, lines=[])
        assert done.returncode == 2
        assert said in done.stderr
