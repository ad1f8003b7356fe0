from __future__ import annotations

import hashlib
import json
import pickle
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import pytest
from corpora import digests, prose, read_documents
from pydantic import ValidationError

from data_pipeline.core.errors import Unresolved, UserError
from data_pipeline.download import transfer
from data_pipeline.download.inputs import all_inputs
from data_pipeline.download.remote import retry_after
from data_pipeline.download.stage import DownloadConfig, download
from data_pipeline.stage import LocalContext

LINES = "\n".join(json.dumps({"text": prose(n, 400)}) for n in range(400)).encode()


@dataclass
class Site:
    """A real server on the loopback interface, whose faults a test chooses."""

    content: bytes = LINES
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"v1"'})
    cut_after: int | None = None
    """Bytes of the content after which a connection is cut."""
    busy: int = 0
    """Answers with `busy_status` that stand before the first good one."""
    busy_status: int = 503
    busy_headers: dict[str, str] = field(default_factory=dict)
    promised: int = 0
    """Bytes that are announced beyond those that there are."""
    knows_ranges: bool = True
    starts_late: int = 0
    """Bytes that an answer to a Range request leaves out."""
    becomes: bytes | None = None
    """The content of version 2, which there is after the first answer."""
    stalls: bool = False
    """Whether an answer waits for ever before its last byte."""
    pause: float = 0
    """Seconds before each answer."""
    ranges: list[str | None] = field(default_factory=list)
    """The Range header of each GET."""
    if_ranges: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """Of each GET."""
    at_once: int = 0
    most_at_once: int = 0
    head_status: int = 200
    address: str = ""
    lock: Lock = field(default_factory=Lock)
    over: Event = field(default_factory=Event)

    def config(self, **options: Any) -> DownloadConfig:
        url = f"{self.address}/texts/lines.jsonl"
        runtime = options.pop("runtime", {})
        source = {"kind": "http", "name": "web", "urls": [url], **options}
        return DownloadConfig.model_validate(
            {"sources": [source], "shard_bytes": 100_000, "runtime": runtime}
        )


def make_handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def begin(self) -> int | None:
            """Send status and headers; returns where the content begins, or None when there is none."""
            if site.busy:
                site.busy -= 1
                self.send_response(site.busy_status)
                for name, value in site.busy_headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
            if self.path.startswith("/loop/"):
                self.send_response(302)
                self.send_header("Location", self.path)
                self.end_headers()
                return None
            if not self.path.startswith("/texts/"):
                self.send_error(404)
                return None
            wanted = self.headers["Range"] if site.knows_ranges else None
            same = self.headers["If-Range"] in (None, *site.headers.values())
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and same else 0
            if start >= len(site.content) > 0:
                self.send_error(416)
                return None
            start += site.starts_late if start else 0
            total = len(site.content) + site.promised
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(total - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            for name, value in site.headers.items():
                self.send_header(name, value)
            self.end_headers()
            return start

        def do_HEAD(self) -> None:
            if site.head_status == 200:
                self.begin()
            else:
                self.send_error(site.head_status)

        def do_GET(self) -> None:
            site.ranges.append(self.headers["Range"])
            site.if_ranges.append(self.headers["If-Range"])
            site.times.append(time.monotonic())
            with site.lock:
                site.at_once += 1
                site.most_at_once = max(site.most_at_once, site.at_once)
            time.sleep(site.pause)
            start = self.begin()
            with site.lock:
                site.at_once -= 1
            content = site.content
            if site.becomes is not None:
                site.content, site.headers, site.becomes = site.becomes, {"ETag": '"v2"'}, None
            if start is not None:
                end = len(content) if site.cut_after is None else start + site.cut_after
                if site.stalls:
                    self.wfile.write(content[start : end - 1])
                    site.over.wait()
                    start = end - 1
                self.wfile.write(content[start:end])
            self.close_connection = True

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler


class Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, *arguments: Any) -> None:
        pass  # a client that has seen enough hangs up; that is no news


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", 0.01)
    site = Site()
    with Server(("127.0.0.1", 0), make_handler(site)) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        site.address = f"http://127.0.0.1:{server.server_port}"
        yield site
        site.over.set()
        server.shutdown()


def test_a_cut_transfer_goes_on_where_it_stopped_and_gives_the_same_bytes(site: Site, tmp_path: Path) -> None:
    download(site.config(), {}, tmp_path / "smooth", LocalContext())
    assert site.ranges == [None]
    site.ranges.clear()
    site.cut_after = len(LINES) // 3
    download(site.config(), {}, tmp_path / "cut", LocalContext())
    third = len(LINES) // 3
    assert site.ranges == [None, f"bytes={third}-", f"bytes={2 * third}-", f"bytes={3 * third}-"]
    assert site.if_ranges[-4:] == [None, '"v1"', '"v1"', '"v1"']
    assert digests(tmp_path / "smooth") == digests(tmp_path / "cut")
    texts = list(read_documents(tmp_path / "cut").values())
    assert texts == [prose(n, 400) for n in range(400)]


def test_a_busy_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    planned = site.config().resolve()
    site.busy = 3
    metrics = download(planned, {}, tmp_path / "out", LocalContext())
    assert metrics["documents"] == 400
    assert len(site.ranges) == 4


def test_a_plan_waits_for_a_busy_server_too_but_not_for_ever(site: Site) -> None:
    site.busy = 3
    assert site.config().resolve().listings[0][0].version == 'etag:"v1"'
    site.busy = 1000
    with pytest.raises(Unresolved, match=r"lines\.jsonl answers 503"):
        site.config().resolve()
    assert site.busy == 1000 - 5


@pytest.mark.parametrize("status", [405, 501, 403])
def test_a_server_that_knows_no_head_or_signed_for_get_only_is_asked_with_get(
    site: Site, status: int
) -> None:
    expected = site.config().resolve().listings
    site.head_status = status
    assert site.config().resolve().listings == expected


def test_redirects_without_end_are_a_mistake(site: Site) -> None:
    with pytest.raises(UserError, match=r"x\.txt redirects without end"):
        site.config(urls=[f"{site.address}/loop/x.txt"]).resolve()


def test_two_sources_may_fetch_one_address_at_once_and_one_source_may_not(site: Site, tmp_path: Path) -> None:
    one = site.config().sources[0]
    both = DownloadConfig(sources=(one, one.model_copy(update={"name": "again"})))
    download(both, {}, tmp_path / "out", LocalContext(2))
    documents = read_documents(tmp_path / "out")
    assert len(documents) == 800
    assert len({id for id in documents if id.startswith("again/")}) == 400
    with pytest.raises(ValidationError, match=r"two addresses stand for example\.org/a\.txt"):
        site.config(urls=["https://example.org/a.txt", "http://example.org/a.txt#top"])


def test_a_server_that_stays_busy_ends_the_stage_after_a_few_attempts(site: Site, tmp_path: Path) -> None:
    planned = site.config().resolve()
    site.busy = 1000
    with pytest.raises(
        ConnectionError,
        match=r"can't fetch .*lines\.jsonl: the server answers 503 \(5 attempts\); run again to resume",
    ):
        download(planned, {}, tmp_path / "out", LocalContext())


def test_content_that_changes_on_the_server_is_another_artifact_and_stops_a_planned_run(
    site: Site, tmp_path: Path
) -> None:
    planned = site.config().resolve()
    assert site.config().resolve().identity() == planned.identity()
    site.headers = {"ETag": '"v2"'}
    assert site.config().resolve().identity() != planned.identity()
    with pytest.raises(UserError, match="changed since the run was planned; run again"):
        download(planned, {}, tmp_path / "out", LocalContext())


def test_an_expected_hash_plans_without_the_server_and_is_checked(site: Site, tmp_path: Path) -> None:
    url = f"{site.address}/texts/lines.jsonl"
    site.headers = {}
    right = site.config(sha256={url: hashlib.sha256(LINES).hexdigest()})
    right.resolve()
    assert site.ranges == []
    assert download(right, {}, tmp_path / "right", LocalContext())["documents"] == 400
    with pytest.raises(UserError, match=r"its sha256 is .*, the recipe expects 0000"):
        download(site.config(sha256={url: "0" * 64}), {}, tmp_path / "wrong", LocalContext())


def test_content_that_cannot_be_pinned_is_refused_with_advice(site: Site) -> None:
    site.headers = {}
    with pytest.raises(UserError, match=r"neither ETag nor Last-Modified.*under `sha256`"):
        site.config().resolve()


def test_a_missing_page_is_a_mistake_and_a_missing_server_is_unresolved(site: Site) -> None:
    lost = site.config(urls=[f"{site.address}/lost.txt"])
    with pytest.raises(UserError, match=r"lost\.txt answers 404: check the address"):
        lost.resolve()
    nobody = site.config(urls=["http://127.0.0.1:9/x.txt"])
    with pytest.raises(Unresolved, match=r"127\.0\.0\.1:9/x\.txt can not be reached"):
        nobody.resolve()


def test_credentials_in_an_address_are_refused_and_a_query_never_reaches_the_identity(site: Site) -> None:
    with pytest.raises(ValidationError, match="holds a user name or password") as refused:
        site.config(urls=["https://me:hunter2@example.org/a.txt"])
    assert "hunter2" not in str(refused.value.errors()[0]["msg"])
    signed = site.config(urls=[f"{site.address}/texts/lines.jsonl?key=hunter2"]).resolve()
    assert "hunter2" not in json.dumps(signed.identity())
    assert signed.identity()["sources"][0]["urls"] == [f"{site.address}/texts/lines.jsonl"]
    assert "hunter2" not in signed.listings[0][0].name


def test_a_server_that_ignores_ranges_is_read_from_the_start(site: Site, tmp_path: Path) -> None:
    planned = site.config().resolve()
    site.knows_ranges = False
    site.cut_after = len(LINES) // 2
    with pytest.raises(ConnectionError, match=r"lines\.jsonl: the server broke off"):
        download(planned, {}, tmp_path / "out", LocalContext())
    site.cut_after = None
    download(planned, {}, tmp_path / "out", LocalContext())
    assert site.ranges[-1] is not None
    assert read_documents(tmp_path / "out") == {
        f"web/{planned.listings[0][0].name}#{n}": prose(n, 400) for n in range(400)
    }


def test_a_transfer_whose_process_is_killed_goes_on_with_the_byte_where_it_stopped(
    site: Site, tmp_path: Path
) -> None:
    planned = site.config().resolve()
    site.stalls = True
    process = get_context("forkserver").Process(
        target=download, args=(planned, {}, tmp_path / "out", LocalContext())
    )
    process.start()
    part = tmp_path / "out" / "scratch" / "fetched" / "group-00000" / "00000.jsonl"
    while not part.exists() or part.stat().st_size < len(LINES) // 2:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    site.stalls = False
    size = part.stat().st_size
    assert download(planned, {}, tmp_path / "out", LocalContext())["documents"] == 400
    assert site.ranges == [None, f"bytes={size}-"]


@pytest.mark.parametrize("pinned_by_hash", [True, False])
def test_a_file_that_is_whole_when_a_worker_is_killed_is_not_asked_for_again(
    site: Site, tmp_path: Path, pinned_by_hash: bool
) -> None:
    hashes = {f"{site.address}/texts/lines.jsonl": hashlib.sha256(LINES).hexdigest()}
    planned = site.config(**({"sha256": hashes} if pinned_by_hash else {})).resolve()
    folder = tmp_path / "out" / "scratch" / "fetched" / "group-00000"
    folder.mkdir(parents=True)
    (folder / "00000.jsonl").write_bytes(LINES)
    assert download(planned, {}, tmp_path / "out", LocalContext())["documents"] == 400
    assert site.ranges == []


def test_what_a_killed_run_has_fetched_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    planned = site.config().resolve()
    site.cut_after = 100_000
    site.busy_headers, site.busy_status = {}, 503

    class Dies(LocalContext):
        def map(self, fn: Any, items: Any, *, names: Any = None) -> Any:
            first = super().map(fn, items, names=names)
            raise KeyboardInterrupt(first)

    with pytest.raises(KeyboardInterrupt):
        download(planned, {}, tmp_path / "out", Dies())
    asked = len(site.ranges)
    download(planned, {}, tmp_path / "out", LocalContext())
    assert len(site.ranges) == asked
    site.cut_after = None
    download(planned, {}, tmp_path / "smooth", LocalContext())
    assert digests(tmp_path / "smooth") == digests(tmp_path / "out")


def test_a_server_that_lies_about_length_never_gives_a_short_file(site: Site, tmp_path: Path) -> None:
    planned = site.config().resolve()
    site.promised = -1000
    with pytest.raises(UserError, match=r"bytes came, \d+ were announced; run again"):
        download(planned, {}, tmp_path / "less", LocalContext())
    assert not list((tmp_path / "less").glob("documents-*"))
    site.promised = 1000  # all that was planned has come when the connection breaks off
    assert download(planned, {}, tmp_path / "more", LocalContext())["documents"] == 400


def test_a_length_that_was_a_lie_in_the_plan_ends_the_stage_too(site: Site, tmp_path: Path) -> None:
    site.promised = 1000
    planned = site.config().resolve()
    with pytest.raises(ConnectionError, match=r"lines\.jsonl"):
        download(planned, {}, tmp_path / "out", LocalContext())
    site.promised = 0
    with pytest.raises((ConnectionError, UserError), match=r"announced"):
        download(planned, {}, tmp_path / "later", LocalContext())


def test_bytes_from_elsewhere_are_never_appended(site: Site, tmp_path: Path) -> None:
    planned = site.config().resolve()
    site.cut_after, site.starts_late = 50_000, 7
    with pytest.raises(ConnectionError, match=r"sends bytes from 50007 on, asked for those from 50000"):
        download(planned, {}, tmp_path / "out", LocalContext())


def test_a_file_that_changes_amid_its_transfer_is_not_a_mixture(site: Site, tmp_path: Path) -> None:
    planned = site.config().resolve()
    site.cut_after = 50_000
    site.becomes = LINES[::-1]
    with pytest.raises(UserError, match="changed since the run was planned; run again"):
        download(planned, {}, tmp_path / "out", LocalContext())
    assert site.ranges == [None, "bytes=50000-"]
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_a_resumed_file_with_the_wrong_hash_is_fetched_once_more_whole(site: Site, tmp_path: Path) -> None:
    url = f"{site.address}/texts/lines.jsonl"
    planned = site.config(sha256={url: hashlib.sha256(LINES).hexdigest()}).resolve()
    folder = tmp_path / "out" / "scratch" / "fetched" / "group-00000"
    folder.mkdir(parents=True)
    (folder / "00000.jsonl").write_bytes(b"x" * 5000)
    assert download(planned, {}, tmp_path / "out", LocalContext())["documents"] == 400
    assert site.ranges == ["bytes=5000-", None]


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_says_when_to_come_again(site: Site, tmp_path: Path, form: str) -> None:
    planned = site.config().resolve()
    site.busy, site.busy_status = 1, 429
    moment = formatdate(time.time() + 2, usegmt=True)  # in whole seconds: one to two from now
    site.busy_headers = {"Retry-After": "1" if form == "seconds" else moment}
    download(planned, {}, tmp_path / "out", LocalContext())
    first, second = site.times
    assert 0.9 < second - first < 20


def test_a_wait_is_capped_and_nonsense_is_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert retry_after("120") == 120
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after("soon") is None
    assert retry_after("") is None
    assert transfer.pause(1, 1e9) <= transfer.LONGEST_WAIT_SECONDS + transfer.BACKOFF_SECONDS
    waits = [transfer.pause(n, None) for n in range(1, 30)]
    assert all(0 < wait <= transfer.LONGEST_BACKOFF_SECONDS for wait in waits)
    assert waits[4] > waits[0]


def test_small_files_come_side_by_side_and_no_host_sees_more_connections_than_set(
    site: Site, tmp_path: Path
) -> None:
    site.content, site.pause = b"a short text", 0.05
    urls = [f"{site.address}/texts/{n}.txt" for n in range(24)]
    config = site.config(urls=urls, runtime={"connections_per_host": 3})
    small = DownloadConfig.model_validate(config.model_dump() | {"shard_bytes": 40}).resolve()
    metrics = download(small, {}, tmp_path / "out", LocalContext(2))
    assert metrics["documents"] == 24
    assert len(list((tmp_path / "out").glob("documents-*"))) == 6
    assert 2 <= site.most_at_once <= 3


def test_content_that_the_server_compresses_on_its_own_account_is_refused(site: Site, tmp_path: Path) -> None:
    site.headers["Content-Encoding"] = "gzip"
    with pytest.raises(UserError, match="sends it as gzip, though asked for it as it is"):
        download(site.config(), {}, tmp_path / "out", LocalContext())


def test_no_key_of_an_address_is_left_in_any_file(site: Site, tmp_path: Path) -> None:
    config = site.config(urls=[f"{site.address}/texts/lines.jsonl?key=hunter2"])
    download(config, {}, tmp_path / "out", LocalContext())
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if b"hunter2" in path.read_bytes()]


def test_no_key_of_an_address_is_in_a_refusal(site: Site) -> None:
    url = f"{site.address}/texts/lines.jsonl?key=hunter2"
    for options in (
        {"urls": url},
        {"urls": [url], "sha256": {url: "abc"}},
        {"urls": [url], "sha256": {url: 1}},
    ):
        with pytest.raises(ValidationError) as refused:
            site.config(**options)
        for mistake in refused.value.errors():
            assert "hunter2" not in f"{mistake['loc']} {mistake['msg']}"
            # Of those of other types the recipe's reader tells a text that was given.
            assert mistake["type"] == "value_error" or not isinstance(mistake["input"], str)


def test_an_item_of_work_holds_its_own_addresses_only(site: Site, tmp_path: Path) -> None:
    urls = [f"{site.address}/texts/lines.jsonl?part={n}" for n in range(50)]
    planned = site.config(urls=urls).resolve()
    inputs = all_inputs(planned.sources, planned.listings, 1, tmp_path, LocalContext())
    assert {pickle.dumps(one).count(b"?part=") for one in inputs} == {1}


def test_a_netrc_that_cannot_be_read_is_a_mistake_and_its_words_stay_there(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine example.org login me hunter2")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="netrc can't be read") as refused:
        site.config().resolve()
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))
