from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import digests, prose, read_documents
from pydantic import ValidationError

from data_pipeline import remote
from data_pipeline.context import LocalContext, Unresolved, UserError
from data_pipeline.download import DownloadConfig, download
from data_pipeline.hub import explained, rows_of
from data_pipeline.sources import HuggingFaceSource

LINES = "\n".join(json.dumps({"text": prose(n, 400)}) for n in range(400)).encode()


@dataclass
class Site:
    """A real server on the loopback interface, whose faults a test chooses."""

    content: bytes = LINES
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"v1"'})
    cut_after: int | None = None
    """Bytes of the content after which a connection is cut."""
    busy: int = 0
    """Answers with 503 that stand before the first good one."""
    ranges: list[str | None] = field(default_factory=list)
    """The Range header of each GET."""
    if_ranges: list[str | None] = field(default_factory=list)
    knows_head: bool = True
    address: str = ""

    def config(self, **options: Any) -> DownloadConfig:
        url = f"{self.address}/texts/lines.jsonl"
        source = {"kind": "http", "name": "web", "urls": [url], **options}
        return DownloadConfig.model_validate({"sources": [source], "shard_bytes": 100_000})


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 0.01)
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def begin(self) -> int | None:
            """Send status and headers; returns where the content begins, or None when there is none."""
            if site.busy:
                site.busy -= 1
                self.send_error(503)
                return None
            if self.path.startswith("/loop/"):
                self.send_response(302)
                self.send_header("Location", self.path)
                self.end_headers()
                return None
            if not self.path.startswith("/texts/"):
                self.send_error(404)
                return None
            wanted = self.headers["Range"]
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(site.content) - start))
            for name, value in site.headers.items():
                self.send_header(name, value)
            self.end_headers()
            return start

        def do_HEAD(self) -> None:
            if site.knows_head:
                self.begin()
            else:
                self.send_error(405)

        def do_GET(self) -> None:
            site.ranges.append(self.headers["Range"])
            site.if_ranges.append(self.headers["If-Range"])
            start = self.begin()
            if start is not None:
                end = len(site.content) if site.cut_after is None else start + site.cut_after
                self.wfile.write(site.content[start:end])
            self.close_connection = True

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *arguments: Any) -> None:
            pass  # a client that has seen enough hangs up; that is no news

    with Server(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        site.address = f"http://127.0.0.1:{server.server_port}"
        yield site
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


def test_a_server_that_knows_no_head_is_asked_with_get(site: Site) -> None:
    expected = site.config().resolve().listings
    site.knows_head = False
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
        ConnectionError, match=r"can't fetch .*lines\.jsonl: the server answers 503 \(5 attempts\)"
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
    with pytest.raises(Unresolved, match=r"can't reach 127\.0\.0\.1:9/x\.txt"):
        nobody.resolve()


def test_credentials_in_an_address_are_refused_and_a_query_never_reaches_the_identity(site: Site) -> None:
    with pytest.raises(ValidationError, match="holds a user name or password") as refused:
        site.config(urls=["https://me:hunter2@example.org/a.txt"])
    assert "hunter2" not in str(refused.value.errors()[0]["msg"])
    signed = site.config(urls=[f"{site.address}/texts/lines.jsonl?key=hunter2"]).resolve()
    assert "hunter2" not in json.dumps(signed.identity())
    assert signed.identity()["sources"][0]["urls"] == [f"{site.address}/texts/lines.jsonl"]
    assert "hunter2" not in signed.listings[0][0].name


def hugging_face(dataset: Path | str, **options: Any) -> DownloadConfig:
    source = {"kind": "huggingface", "name": "hub", "dataset": str(dataset), **options}
    return DownloadConfig.model_validate({"sources": [source]})


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A data set folder with a train and a test split."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, count in (("train", 20), ("test", 5)):
        rows = [json.dumps({"content": f"{split} {prose(n)}", "n": n}) for n in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


def test_a_data_set_folder_is_streamed_by_split_and_pinned_by_its_files(
    dataset: Path, tmp_path: Path
) -> None:
    config = hugging_face(dataset, split="test", text_field="content")
    before = config.resolve().identity()
    assert str(tmp_path) not in json.dumps(before)
    download(config, {}, tmp_path / "out", LocalContext())
    documents = read_documents(tmp_path / "out")
    assert documents == {f"hub/test#{n}": f"test {prose(n)}" for n in range(5)}
    (dataset / "test.jsonl").write_text(json.dumps({"content": "new"}))
    assert config.resolve().identity() != before


def test_rows_and_bytes_of_a_data_set_can_be_limited(dataset: Path, tmp_path: Path) -> None:
    few = hugging_face(dataset, text_field="content", max_rows=3)
    assert download(few, {}, tmp_path / "few", LocalContext())["documents"] == 3
    small = hugging_face(dataset, text_field="content", max_bytes=len(f"train {prose(0)}") + 1)
    assert download(small, {}, tmp_path / "small", LocalContext())["documents"] == 2


def test_an_unknown_split_is_one_clear_line(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source hub: .*validation") as refused:
        download(hugging_face(dataset, split="validation"), {}, tmp_path / "out", LocalContext())
    assert "\n" not in str(refused.value)


def test_a_mistyped_folder_is_a_mistake_and_no_question_to_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder here and no name of a data set"):
        hugging_face(tmp_path / "not" / "there").resolve()


def test_a_hub_that_cannot_be_reached_leaves_a_source_unresolved_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(Unresolved, match="can't be asked for the revision of nobody/nothing"):
        hugging_face("nobody/nothing").resolve()
    assert time.monotonic() - start < 10


def test_a_full_commit_is_resolved_without_network() -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    pinned = hugging_face("nobody/nothing", revision=commit).resolve()
    assert pinned.listings[0][0].version == f"commit:nobody/nothing@{commit}"
    said = pinned.identity()["sources"][0]
    assert (said["dataset"], said["revision"], said["split"]) == ("nobody/nothing", commit, "train")


def test_of_a_column_format_only_the_text_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "columns"
    folder.mkdir()
    pq.write_table(pa.table({"n": range(3), "content": ["a", "b", "c"]}), folder / "train.parquet")
    config = hugging_face(folder, text_field="content").resolve()
    source, listed = config.sources[0], config.listings[0][0]
    assert isinstance(source, HuggingFaceSource)
    assert list(rows_of(source, listed)) == [{"content": "a"}, {"content": "b"}, {"content": "c"}]
    with pytest.raises(UserError, match=r"source hub: .*text") as refused:
        download(hugging_face(folder), {}, tmp_path / "out", LocalContext())
    assert "\n" not in str(refused.value)


def test_a_hub_lost_between_plan_and_run_is_one_line_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    planned = hugging_face("nobody/nothing", revision="0" * 40).resolve()
    with pytest.raises(ConnectionError, match=r"source hub: .*nobody/nothing.*run again when") as lost:
        download(planned, {}, tmp_path / "out", LocalContext())
    assert "\n" not in str(lost.value)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (httpx.ReadTimeout("timed out"), ConnectionError),
        (OSError(), ConnectionError),
        (ValueError("bad\nparquet"), UserError),
        (
            httpx.HTTPStatusError(
                "no", request=httpx.Request("GET", "http://x"), response=httpx.Response(403)
            ),
            UserError,
        ),
        (
            httpx.HTTPStatusError(
                "no", request=httpx.Request("GET", "http://x"), response=httpx.Response(503)
            ),
            ConnectionError,
        ),
    ],
)
def test_a_fault_amid_the_rows_says_whether_to_wait_or_to_mend(
    fault: Exception, kind: type[Exception]
) -> None:
    (source,) = hugging_face("nobody/nothing").sources
    assert isinstance(source, HuggingFaceSource)
    told = explained(source, fault, 7)
    assert isinstance(told, kind)
    assert "source hub" in str(told)
    assert "beyond 7 rows" in str(told)
    assert "\n" not in str(told)
