"""Files that a setting names on the Hugging Face Hub, by its own client against a server that answers as that does."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE = "fälle/test.jsonl"
CONTENT = '{"text": "吾輩は猫である。 🐈"}\n'.encode()
PIN = """
import sys
from pathlib import Path
from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import pin
try:
    [file] = pin([Path(sys.argv[1])], "score.sets")
    print(file.sha256, file.path.name, len(file.read()))
except UserError as error:
    print(type(error).__name__, error)
"""


class Hub(BaseHTTPRequestHandler):
    """The hub, with one file of one data set, on ``main`` and at its commit."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        known = {
            f"/datasets/owner/tests/resolve/{revision}/f%C3%A4lle/test.jsonl" for revision in ("main", COMMIT)
        }
        if self.path not in known:
            code = "EntryNotFound" if self.path.startswith("/datasets/owner/tests/") else "RepoNotFound"
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(CONTENT).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if body:
            self.wfile.write(CONTENT)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Mapping[str, str]]:
    """An environment in which the hub is here, and nothing is downloaded yet."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    yield {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    server.shutdown()
    server.server_close()
    thread.join()


def pinned(name: str, environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PIN, name], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("at", ["", "@main", f"@{COMMIT}"])
def test_a_file_on_the_hub_is_known_by_its_content_and_read_again_without_the_hub(
    at: str, environment: Mapping[str, str]
) -> None:
    name = f"hf://datasets/owner/tests{at}/{FILE}"
    expected = f"{hashlib.sha256(CONTENT).hexdigest()} test.jsonl {len(CONTENT)}"
    assert pinned(name, environment) == expected
    away = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    assert pinned(name, away) == expected


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "hf://datasets/owner/tests/nothing.jsonl",
            "UserError score.sets: the Hugging Face Hub has no file nothing",
        ),
        ("hf://datasets/nobody/tests/test.jsonl", "in the data set nobody/tests that you may read"),
        ("hf://models/owner/tests/test.jsonl", "names no file of a data set on the hub"),
        ("hf://datasets/owner/tests", "names no file of a data set on the hub"),
    ],
)
def test_what_the_hub_has_not_is_said(name: str, said: str, environment: Mapping[str, str]) -> None:
    assert said in pinned(name, environment)


def test_a_hub_that_can_not_be_reached_is_said(environment: Mapping[str, str]) -> None:
    away = {**environment, "HF_HUB_OFFLINE": "1"}
    said = pinned(f"hf://datasets/owner/tests/{FILE}", away)
    assert said.startswith("Unresolved score.sets: hf:/datasets/owner/tests")
