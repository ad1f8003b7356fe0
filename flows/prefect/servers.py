"""A Prefect server for runs that have none: started in the background, shared, stopped by its last user.

Prefect's own ephemeral server slows the first flow down and prints traces as it shuts down; and two runs would
each start one on the same database. Ours starts while the plan is made, logs to a file, and serves every run on
the same home. A server that ``PREFECT_API_URL`` names, or that `llmill up` keeps, is used instead, if it answers.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from filelock import FileLock

from data_pipeline.core.files import write_durably
from data_pipeline.core.text import last_lines
from flows.engine.ports import answers, answers_soon, free_port
from flows.engine.process import lives
from flows.engine.services import prefect_api, prefect_home

START_SECONDS = 120
CLIENT_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_SETTINGS_PATH": str(Path(__file__).parent / "prefect_logging.yml"),
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_CLIENT_MAX_RETRIES": "2",  # 6 s in all: a run goes on without a server that is away for longer
}
NO_TLS = Path(__file__).parent / "no_tls.pem"


def client_settings(api: str) -> dict[str, str]:
    """Prefect's settings for a process that reports runs to this API.

    Each client that Prefect makes, one a step, reads 150 certificates in 20 ms: where no TLS is spoken, one will do.
    """
    without_tls = {"PREFECT_API_SSL_CERT_FILE": str(NO_TLS)} if api.startswith("http://") else {}
    return CLIENT_SETTINGS | without_tls


class PrefectServer:
    """A Prefect API for as long as the ``with`` block lasts. `wait` before the first flow."""

    def __init__(self, home: Path, *, wanted: bool = True) -> None:
        """Where none is ``wanted``, one that there is is used all the same, but none is started."""
        self.wanted = wanted
        self.folder = home / "prefect"
        self.state = self.folder / "server.json"
        self.log = self.folder / "server.log"
        self.given = prefect_api(home)
        self.absent = ""
        """The server that should have been used and did not answer, so that ours is."""
        self._users = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""

    def __enter__(self) -> PrefectServer:
        """Must come before Prefect is imported: it reads these settings once."""
        if self.given and answers_soon(self.given):
            self._lead_to(self.given)
            return self
        self.absent, self.given = self.given, ""
        self.folder.mkdir(parents=True, exist_ok=True)
        os.environ |= prefect_home(self.folder)
        if not self.wanted:
            os.environ.pop("PREFECT_API_URL", None)
            os.environ.update(CLIENT_SETTINGS)
            return self
        with FileLock(self.folder / "start.lock"):
            # Every user holds this lock shared: who can take it alone knows that nobody else uses the server.
            self._users = os.open(self.folder / "users.lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._users, fcntl.LOCK_SH)
            self._url = self.running() or self._start()
        self._lead_to(self._url)
        return self

    def _lead_to(self, api: str) -> None:
        """Have this process, and those that it starts, use the API."""
        for name, value in client_settings(api).items():
            os.environ.setdefault(name, value)
        os.environ["PREFECT_API_URL"] = api

    def __exit__(self, *_: object) -> None:
        if self.given or not self._url:
            return
        os.environ.pop("PREFECT_API_URL", None)
        with FileLock(self.folder / "start.lock"):
            try:
                fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._stop()
            except BlockingIOError:
                pass  # another run uses it
            finally:
                os.close(self._users)

    @property
    def there(self) -> bool:
        """Whether there is a server to report to."""
        return bool(self.given or self._url)

    def wait(self) -> None:
        """Return when the API answers.

        Raises:
            RuntimeError: ours did not come up; the message holds the end of its log.
        """
        if not self.there:
            return
        deadline = time.monotonic() + START_SECONDS
        while not answers(self.given or self._url):
            ended = self._process is not None and self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                raise RuntimeError(
                    f"Prefect's server did not start; the end of {self.log}:\n{read_end(self.log)}"
                )
            time.sleep(0.1)

    def running(self) -> str | None:
        """The address of a server that an earlier run on this home started and that still lives."""
        try:
            state = json.loads(self.state.read_text())
        except FileNotFoundError:
            return None
        return state["url"] if lives(state["pid"], state["created"]) else None

    def _start(self) -> str:
        port = free_port()
        environment = CLIENT_SETTINGS | os.environ
        del environment["PREFECT_LOGGING_SETTINGS_PATH"]
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flows.prefect.server", "--port", str(port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        url = f"http://127.0.0.1:{port}/api"
        created = psutil.Process(self._process.pid).create_time()
        write_durably(
            self.state,
            json.dumps({"pid": self._process.pid, "created": created, "url": url}, allow_nan=False),
        )
        return url

    def _stop(self) -> None:
        if self.running() is None:
            return
        process = psutil.Process(json.loads(self.state.read_text())["pid"])
        family = [process, *process.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=5)
        for survivor in alive:
            survivor.kill()
        self.state.unlink(missing_ok=True)


def read_end(path: Path) -> str:
    return last_lines(path.read_text(errors="replace")) if path.exists() else "(nothing was written there)"
