"""A real ``llmill chat --web``."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass

from command_line import Llmill


@dataclass(frozen=True)
class ChatServer:
    """A server that answers."""

    process: subprocess.Popen[str]
    where: str
    said: str
    """All that it printed until then, in one line."""

    def end(self) -> str:
        """Press Ctrl-C; return what it printed since it was started."""
        os.kill(self.process.pid, signal.SIGINT)
        _, said = self.process.communicate(timeout=900)
        assert self.process.returncode in (0, 130, -signal.SIGINT)
        return said


def start_chat(llmill: Llmill, *arguments: str, **environment: str) -> ChatServer:
    """Start one on a free port."""
    command = [sys.executable, "-m", "flows.cli.start", "chat", "--web", "--port", "0", *arguments]
    process = subprocess.Popen(
        command,
        env=llmill.environment(**environment),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr
    said = ""
    for line in process.stderr:
        said += line.replace("\n", " ")
        if found := re.search(r"at (http://\S+) ", said):
            return ChatServer(process, found[1], said)
    raise AssertionError(said)
