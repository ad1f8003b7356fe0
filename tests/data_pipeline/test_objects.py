"""Object stores, against a real server of S3's protocol on the loopback interface."""

from __future__ import annotations

import gzip
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from corpora import prose, read_documents
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer
from pydantic import ValidationError
from text_files import jsonl, parquet

from data_pipeline.core.errors import Unresolved, UserError
from data_pipeline.download import objects, redaction, transfer
from data_pipeline.download.stage import DownloadConfig, download
from data_pipeline.stage import LocalContext

KEY, SECRET, TOKEN = "AKIAHUNTERHUNTER2222", "hunter2secrethunter2secrethunter2", "hunter2token"
TEXTS = [prose(n) for n in range(20)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A bucket with some files; credentials and endpoint stand in the environment only."""
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", 0.01)
    settings = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": TOKEN,
        "AWS_ENDPOINT_URL": address,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    store = boto3.resource("s3")
    bucket = store.create_bucket(Bucket="corpus")
    for name, data in {
        "texts/a.jsonl": jsonl(TEXTS),
        "texts/deep/b.parquet": parquet(TEXTS),
        "texts/deep/c.txt.gz": gzip.compress(b"compressed"),
        "texts/notes.pdf": b"a,b",
        "other/d.txt": b"other",
    }.items():
        bucket.put_object(Key=name, Body=data)
    yield bucket
    bucket.objects.delete()
    bucket.delete()


def config(url: str, **options: Any) -> DownloadConfig:
    source = {"kind": "objects", "name": "store", "url": url, **options}
    return DownloadConfig.model_validate({"sources": [source]})


def names(url: str, **options: Any) -> list[str]:
    return [one.name for one in config(url, **options).resolve().listings[0]]


@pytest.mark.usefixtures("bucket")
def test_a_folder_a_pattern_and_a_file_name_documents_below_what_is_fixed(tmp_path: Path) -> None:
    folder = ["a.jsonl", "deep/b.parquet", "deep/c.txt.gz"]
    assert names("s3://corpus/texts") == folder
    assert names("s3://corpus/texts/") == folder
    assert names("s3://corpus/texts/**/*.parquet") == ["deep/b.parquet"]
    assert names("s3://corpus/*/*.txt") == ["other/d.txt"]
    assert names("s3://corpus/texts/deep/b.parquet") == ["b.parquet"]
    assert len(names("s3://corpus")) == 4
    assert names("s3://corpus/texts", max_bytes=1) == ["a.jsonl"]
    download(config("s3://corpus/texts"), {}, tmp_path / "out", LocalContext())
    documents = read_documents(tmp_path / "out")
    assert documents["store/deep/c.txt.gz"] == "compressed"
    assert [documents[f"store/a.jsonl#{n}"] for n in range(20)] == TEXTS
    assert [documents[f"store/deep/b.parquet#{n}"] for n in range(20)] == TEXTS


@pytest.mark.usefixtures("bucket")
def test_no_credential_reaches_a_file_or_the_identity(tmp_path: Path) -> None:
    planned = config("s3://corpus/texts").resolve()
    said = json.dumps(planned.identity()) + planned.model_dump_json() + repr(planned.listings)
    context = LocalContext()
    download(planned, {}, tmp_path / "out", context)
    said += "".join(context.notes)
    for path in (tmp_path / "out").rglob("*"):
        said += path.read_bytes().decode("latin-1") if path.is_file() else ""
    for secret in (KEY, SECRET, TOKEN):
        assert secret not in said
    assert planned.identity()["sources"][0]["urls"] == ["s3://corpus/texts"]


def test_a_changed_object_is_another_artifact_and_stops_a_planned_run(bucket: Any, tmp_path: Path) -> None:
    planned = config("s3://corpus/texts/a.jsonl").resolve()
    assert config("s3://corpus/texts/a.jsonl").resolve().identity() == planned.identity()
    bucket.put_object(Key="texts/a.jsonl", Body=jsonl(TEXTS[::-1]))
    assert config("s3://corpus/texts/a.jsonl").resolve().identity() != planned.identity()
    with pytest.raises(UserError, match=r"a\.jsonl changed since the run was planned; run again"):
        download(planned, {}, tmp_path / "out", LocalContext())


@pytest.mark.usefixtures("bucket")
def test_a_part_that_is_here_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "BLOCK_BYTES", 1000)
    planned = config("s3://corpus/texts/a.jsonl").resolve()
    folder = tmp_path / "out" / "scratch" / "fetched" / "group-00000"
    folder.mkdir(parents=True)
    head = b"#" + jsonl(TEXTS)[1:3000]  # a change that shows whether these bytes are used
    (folder / "00000.jsonl").write_bytes(head)
    metrics = download(planned, {}, tmp_path / "out", LocalContext())
    assert (metrics["documents"], metrics["rejected"]) == (19, 1)


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://corpus/nothing", "source store: nothing to read at s3://corpus/nothing"),
        ("s3://nobucket/x", "source store: .*s3://nobucket/x"),
        ("s3://corpus/texts/notes.pdf", r"1 files, none ending with \.txt"),
        ("klingon://corpus/x", "klingon:// is not known to fsspec"),
    ],
)
def test_what_is_not_there_is_one_clear_line(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        config(url).resolve()
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("bucket")
def test_a_store_out_of_reach_is_unresolved_and_says_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(Unresolved, match="source store: can't list s3://corpus/texts") as lost:
        config("s3://corpus/texts").resolve()
    assert SECRET not in str(lost.value)


def test_a_missing_driver_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme, advice in (("gs", "pip install gcsfs"), ("az", "pip install adlfs")):
        with pytest.raises(UserError, match=advice):
            config(f"{scheme}://corpus/x").resolve()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(UserError, match=r"pip install 'llmill\[s3\]'"):
        config("s3://corpus/x").resolve()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"s3://{KEY}:{SECRET}@corpus/x", "user name or password"),
        (f"s3://{KEY}@corpus/x", "user name or password"),
        (f"az://box/x?sv=2024&sig={SECRET}", "query"),
        ("corpus/x", "not an address"),
        ("file:///etc", "use `kind: local`"),
        ("https://example.org/x.txt", "use `kind: http`"),
        ("memory://x", "no object store"),
        ("simplecache::s3://corpus/x", "not an address"),
    ],
)
def test_an_address_with_credentials_or_of_another_kind_is_refused(url: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as refused:
        config(url)
    said = str(refused.value.errors()[0]["msg"])
    assert SECRET not in said
    assert KEY not in said


def test_patterns_and_containers_are_no_credentials() -> None:
    for url in ("s3://b/day=3/part-?.txt", "abfs://box@account.dfs.core.windows.net/x.txt"):
        assert config(url).sources[0].url == url


def test_a_secret_of_the_environment_is_cut_out_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    fault = objects.explained("can't list", RuntimeError(f"signature with {SECRET} is wrong"), Unresolved)
    assert SECRET not in str(fault)
    assert "***" in str(fault)


@pytest.mark.parametrize(
    "said",
    [
        f"403, url='https://cdn.example.org/a/b.parquet?Expires=9&X-Amz-Signature={SECRET}'",
        f"HTTPSConnectionPool(host='x', port=443): Max retries exceeded with url: /a/b?sv=1&sig={SECRET} (refused)",
        f"can't reach https://me:{SECRET}@example.org/a",
        f"wrong key {SECRET}",
    ],
)
def test_a_signature_a_password_and_an_option_of_fsspec_are_cut_out_of_messages(
    monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setenv("FSSPEC_S3", json.dumps({"key": KEY, "secret": SECRET}))
    assert SECRET not in redaction.without_secrets(said)
    assert redaction.without_secrets("is s3://b/day=3/part-?.txt there? a = b") == (
        "is s3://b/day=3/part-?.txt there? a = b"
    )


@pytest.mark.usefixtures("bucket")
def test_no_trace_of_a_fault_holds_what_a_driver_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{SECRET}@127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(Unresolved) as lost:
        config("s3://corpus/texts").resolve()
    assert SECRET not in "".join(traceback.format_exception(lost.value))


class Short(MemoryFileSystem):
    """A driver that gives nothing beyond the end of a file, whatever it said of its size."""

    protocol = "short"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("short://").strip("/")

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = super().info(path, **options)
        return found | {"size": found["size"] + 10, "ETag": "one"}

    def find(self, path: str, *rest: Any, **options: Any) -> Any:
        return {name: self.info(name) for name in super().find(path)}


def test_a_store_that_ends_before_the_size_it_said_never_hangs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", 0.01)
    fsspec.register_implementation("short", Short, clobber=True)
    Short().pipe_file("/box/a.txt", b"text")
    with pytest.raises(ConnectionError, match=r"nothing follows byte 4 of 14.*run again"):
        download(config("short://box/a.txt"), {}, tmp_path / "out", LocalContext())


def test_two_keys_that_differ_by_an_empty_folder_are_two_files(bucket: Any) -> None:
    bucket.put_object(Key="other//d.txt", Body=b"another")
    assert names("s3://corpus/other") == ["/d.txt", "d.txt"]
