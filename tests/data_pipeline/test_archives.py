"""Archives as sources: what is read of them, what is refused, and that nothing is ever written beside them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from corpora import prose, read_documents
from text_files import FORMATS, TAR, TEXTS, jsonl, tar, zipped

from data_pipeline.download import streams
from data_pipeline.download.readers import Reading, read_file
from data_pipeline.download.records import Rejected, Text
from data_pipeline.download.stage import DownloadConfig, download
from data_pipeline.stage import LocalContext

READING = Reading("text")
ARCHIVES: dict[str, Callable[[Mapping[str, bytes]], bytes]] = {
    "a.zip": zipped,
    "a.tar": tar,
    "a.tar.gz": lambda entries: gzip.compress(tar(entries)),
    "a.tgz": lambda entries: gzip.compress(tar(entries)),
    "a.tar.zst": lambda entries: zstandard.compress(tar(entries)),
    "a.tar.bz2": lambda entries: bz2.compress(tar(entries)),
    "a.tar.xz": lambda entries: lzma.compress(tar(entries)),
}


def read(path: Path, data: bytes, reading: Reading = READING) -> list[Text | Rejected]:
    path.write_bytes(data)
    return list(read_file(path, reading))


def refused(records: list[Text | Rejected]) -> list[tuple[str, str]]:
    return [(one.member, one.reason) for one in records if isinstance(one, Rejected)]


@pytest.mark.parametrize("name", ARCHIVES)
def test_members_of_every_format_are_documents_named_by_archive_path_and_row(
    tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    content = {f"deep/{suffix[1:]}/file{suffix}": make(TEXTS) for suffix, make in FORMATS.items()}
    content |= {"plain.txt": b"one", "small.txt.gz": gzip.compress(b"two"), "table.pdf": b"a,b"}
    content |= {".hidden.txt": b"x", "__MACOSX/._plain.txt": b"x"}
    (folder / name).write_bytes(ARCHIVES[name](content))
    config = DownloadConfig.model_validate(
        {"sources": [{"kind": "local", "name": "box", "path": str(folder)}]}
    )
    metrics = download(config, {}, tmp_path / "out", LocalContext())
    assert metrics["rejected"] == 0
    documents = read_documents(tmp_path / "out")
    expected = {
        f"box/{name}/deep/{suffix[1:]}/file{suffix}#{row}": text
        for suffix in FORMATS
        for row, text in enumerate(TEXTS)
    }
    assert documents == expected | {f"box/{name}/plain.txt": "one", f"box/{name}/small.txt.gz": "two"}


def test_a_name_that_leaves_the_folder_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    names = [
        "../up.txt",
        "/abs.txt",
        "a/../../up.txt",
        "C:\\x.txt",
        "..\\up.txt",
        "new\nline.txt",
        "good.txt",
    ]
    for name, make in (("a.tar", tar), ("a.zip", zipped)):
        records = read(tmp_path / "in" / name, make(dict.fromkeys(names, b"text")))
        assert [one for one in records if isinstance(one, Text)] == [Text(None, "text", member="good.txt")]
        assert {reason for _, reason in refused(records)} == {"unsafe_name"}
        assert len(records) == len(names)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "a.zip", "in"]


def test_links_and_devices_are_refused_and_never_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    headers = []
    for name, kind in (
        ("soft.txt", tarfile.SYMTYPE),
        ("hard.txt", tarfile.LNKTYPE),
        ("dev", tarfile.CHRTYPE),
    ):
        header = TAR(name)
        header.type, header.linkname = kind, str(tmp_path / "secret.txt")
        headers.append((header, b""))
    records = read(tmp_path / "a.tar", tar([*headers, (TAR("good.txt"), b"good")]))
    assert refused(records) == [(name, "link_or_device") for name in ("soft.txt", "hard.txt", "dev")]
    assert records[-1] == Text(None, "good", member="good.txt")
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        link = zipfile.ZipInfo("soft.txt")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(tmp_path / "secret.txt"))
    assert refused(read(tmp_path / "a.zip", sink.getvalue())) == [("soft.txt", "link_or_device")]


def test_an_archive_in_an_archive_is_refused_and_counted(tmp_path: Path) -> None:
    inner = zipped({"x.txt": b"x"})
    records = read(
        tmp_path / "a.tar.gz", gzip.compress(tar({"in.zip": inner, "in.tar.gz": b"", "b.txt": b"b"}))
    )
    assert refused(records) == [("in.zip", "nested_archive"), ("in.tar.gz", "nested_archive")]
    assert records[-1] == Text(None, "b", member="b.txt")


def test_of_two_members_of_one_name_the_first_is_read(tmp_path: Path) -> None:
    twice = tar([(TAR("a.txt"), b"first"), (TAR("a.txt"), b"second")])
    records = read(tmp_path / "a.tar", twice)
    assert records[0] == Text(None, "first", member="a.txt")
    assert refused(records) == [("a.txt", "repeated_name")]


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FREE_BYTES", 1_000_000)


BOMB = jsonl(["x" * 1000] * 5000)  # 5 MB of which gzip makes 20 kB


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(BOMB)),
        ("a.jsonl.zst", zstandard.compress(BOMB)),
        ("a.jsonl.bz2", bz2.compress(BOMB)),
        ("a.jsonl.xz", lzma.compress(BOMB)),
        ("a.zip", zipped({"a.jsonl": BOMB, "b.jsonl": BOMB})),
        ("a.tar.gz", gzip.compress(tar({"a.jsonl": BOMB, "b.jsonl": BOMB}))),
        ("a.tar", tar({"a.jsonl.gz": gzip.compress(BOMB)})),
    ],
)
def test_a_decompression_bomb_stops_at_its_limit_after_the_good_records(
    tmp_path: Path, name: str, data: bytes
) -> None:
    records = read(tmp_path / name, data, Reading("text", max_expansion=20))
    texts = [one for one in records if isinstance(one, Text)]
    assert 500 < len(texts) < 1100
    assert {reason for _, reason in refused(records)} == {"expands_too_far"}
    fault = records[-1]
    assert isinstance(fault, Rejected)
    assert re.match("holds more than 1.[01] MB; max_expansion of its source allows more", fault.detail)
    absolute = read(tmp_path / name, data, Reading("text", max_expansion=1e6, max_unpacked_bytes=100_000))
    assert sum(isinstance(one, Text) for one in absolute) < 110
    assert "max_unpacked_bytes" in str(absolute[-1])
    enough = read(tmp_path / name, data, Reading("text", max_expansion=1e6))
    assert not refused(enough)


@pytest.mark.usefixtures("small_limit")
def test_a_column_of_one_long_value_many_times_is_a_bomb_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x" * 100_000] * 1000}), tmp_path / "a.parquet")
    records = list(read_file(tmp_path / "a.parquet", Reading("text", max_expansion=20)))
    assert refused(records) == [("", "expands_too_far")]


@pytest.mark.usefixtures("small_limit")
def test_a_sparse_tar_is_a_bomb(tmp_path: Path) -> None:
    header = TAR("a.txt")
    header.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.name": "a.txt",
        "GNU.sparse.size": str(10**12),
        "GNU.sparse.map": f"{10**12 - 1},1",
        "GNU.sparse.numblocks": "1",
    }
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as archive:
        header.size = 1
        archive.addfile(header, io.BytesIO(b"x"))
    (fault,) = read(tmp_path / "a.tar", sink.getvalue(), Reading("text", max_expansion=20))
    assert isinstance(fault, Rejected)
    assert fault.reason == "expands_too_far"


@pytest.mark.parametrize("name", [name for name in ARCHIVES if name != "a.zip"])
def test_a_cut_tar_gives_what_stands_before_the_cut_and_never_ends_silently(
    tmp_path: Path, name: str
) -> None:
    members = {f"{n}.txt": prose(n, 3000).encode() for n in range(40)}
    data = ARCHIVES[name](members)
    for cut in (len(data) // 2, len(data) - 11_000 if name == "a.tar" else len(data) - 20):
        records = read(tmp_path / name, data[:cut])
        texts = [one.text for one in records if isinstance(one, Text)]
        assert texts == [prose(n, 3000) for n in range(len(texts))]
        assert refused(records)[-1] == ("", "unreadable_file")
    assert len(texts) >= (
        38 if name[-3:] in ("tar", ".gz", "tgz") else 0
    )  # others come in blocks of a megabyte


def test_a_broken_header_amid_a_tar_is_told(tmp_path: Path) -> None:
    data = bytearray(tar({"a.txt": b"a", "b.txt": b"b"}))
    data[1024:1536] = b"\xff" * 512
    first, fault = read(tmp_path / "a.tar", bytes(data))
    assert first == Text(None, "a", member="a.txt")
    assert isinstance(fault, Rejected)
    assert fault.reason == "unreadable_file"
    assert "no header where one should be" in fault.detail


def test_a_header_that_promises_a_name_of_a_gigabyte_is_refused(tmp_path: Path) -> None:
    header = TAR("x")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    (fault,) = read(tmp_path / "a.tar", header.tobuf())
    assert isinstance(fault, Rejected)
    assert "a name of 1073741824 bytes" in fault.detail


def test_one_broken_member_of_a_zip_spares_the_others(tmp_path: Path) -> None:
    data = bytearray(zipped({"a.txt": b"first", "b.txt": b"second" * 50, "c.txt": b"third"}))
    at = data.index(b"b.txt") + 5
    data[at : at + 4] = b"\xff\xff\xff\xff"
    records = read(tmp_path / "a.zip", bytes(data))
    assert [one.text for one in records if isinstance(one, Text)] == ["first", "third"]
    assert refused(records) == [("b.txt", "unreadable_file")]


def test_a_member_under_a_password_is_refused(tmp_path: Path) -> None:
    data = bytearray(zipped({"a.txt": b"first"}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    assert refused(read(tmp_path / "a.zip", bytes(data))) == [("a.txt", "encrypted")]


def test_a_bad_record_in_a_member_says_its_member(tmp_path: Path) -> None:
    source: dict[str, Any] = {"kind": "local", "name": "box", "path": str(tmp_path / "a.zip")}
    (tmp_path / "a.zip").write_bytes(
        zipped({"x/a.jsonl": b'{"text": "a"}\n{"body": "b"}\n', "l.txt": b"caf\xe9"})
    )
    config = DownloadConfig.model_validate({"sources": [source]})
    download(config, {}, tmp_path / "out", LocalContext())
    rows = pq.read_table(tmp_path / "out" / "rejected" / "rejected-00000.parquet").to_pylist()
    assert [(row["id"], row["reason"]) for row in rows] == [
        ("box/a.zip/x/a.jsonl#1", "missing_field"),
        ("box/a.zip/l.txt", "not_utf8"),
    ]
    assert json.loads(json.dumps(rows))
