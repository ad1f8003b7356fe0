"""One limit holds for all that comes out of one input, however it is packed."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from text_files import conversion, jsonl, tar, zipped

from data_pipeline.download import columns, json_values, readers, streams
from data_pipeline.download.readers import Reading, read_file
from data_pipeline.download.records import Record, Rejected, Text

FREE = 1_000_000
LINES = jsonl(["x" * 1000] * 800)
"""800 kB, less than any file may hold; six of them are too much for one."""


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FREE_BYTES", FREE)


def read(folder: Path, name: str, data: bytes) -> list[Record]:
    (folder / name).write_bytes(data)
    return list(read_file(folder / name, Reading(max_expansion=10, spool=folder)))


def check_limited(records: list[Record]) -> None:
    size = sum(one.size for one in records if isinstance(one, Text))
    assert 0.5 * FREE < size <= FREE
    fault = records[-1]
    assert isinstance(fault, Rejected)
    assert fault.reason == "expands_too_far"
    assert "max_expansion" in fault.detail


def parquet_of(text: str, rows: int) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [text] * rows}), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


MEMBERS: dict[str, Callable[[], bytes]] = {
    "jsonl.gz": lambda: gzip.compress(LINES),
    "parquet": lambda: parquet_of("x" * 1000, 800),
    "warc": lambda: gzip.compress(conversion(b"x" * 1000) * 800),
}


@pytest.mark.parametrize("suffix", MEMBERS)
@pytest.mark.parametrize("pack", [tar, zipped])
def test_members_of_an_archive_share_its_limit(
    tmp_path: Path, suffix: str, pack: Callable[[dict[str, bytes]], bytes]
) -> None:
    member = MEMBERS[suffix]()
    data = pack({f"{n}.{suffix}": member for n in range(6)})
    assert len(data) < 100_000
    check_limited(read(tmp_path, "a.tar" if pack is tar else "a.zip", data))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_false_size_in_a_zips_directory_raises_no_limit(tmp_path: Path, method: int) -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as archive:
        archive.writestr("a.jsonl.gz", gzip.compress(LINES * 6))
    data = bytearray(sink.getvalue())
    at = data.index(b"PK\1\2") + 20
    data[at : at + 4] = (1 << 31).to_bytes(4, "little")
    records = read(tmp_path, "a.zip", bytes(data))
    assert sum(one.size for one in records if isinstance(one, Text)) <= FREE
    assert isinstance(records[-1], Rejected)


def test_a_web_archive_that_is_packed_though_its_name_does_not_say_so_has_a_limit(tmp_path: Path) -> None:
    records = conversion(b"x" * 1000) * 6000
    check_limited(read(tmp_path, "a.warc", gzip.compress(records)))
    check_limited(read(tmp_path, "a.warc.gz", gzip.compress(gzip.compress(records))))
    (fault,) = read(tmp_path, "a.warc", gzip.compress(gzip.compress(records)))
    assert isinstance(fault, Rejected)
    assert fault.reason == "unreadable_file"


def test_bodies_of_pages_that_were_sent_packed_share_the_limit_of_their_file(tmp_path: Path) -> None:
    body = gzip.compress(b"x" * 300_000)
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Encoding: gzip\r\n\r\n" + body
    head = "WARC-Type: response\r\nWARC-Target-URI: http://x.org/\r\nContent-Type: application/http; msgtype=response"
    record = f"WARC/1.0\r\n{head}\r\nContent-Length: {len(page)}\r\n\r\n".encode() + page + b"\r\n\r\n"
    check_limited(read(tmp_path, "a.warc", record * 20))


@pytest.mark.parametrize("how", ["string", "dictionary", "nested", "binary"])
def test_rows_that_repeat_a_long_word_are_read_a_few_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(columns, "REPEATED_BYTES", 200_000)
    word = pa.array(["x" * 50_000] * 1000, pa.binary() if how == "binary" else pa.string())
    column = word.dictionary_encode() if how == "dictionary" else word
    table = pa.table(
        {"data": pa.StructArray.from_arrays([word], ["text"])} if how == "nested" else {"text": column}
    )
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        reading = Reading("data.text" if how == "nested" else "text", max_expansion=10)
        check_limited(list(read_file(tmp_path / "a.parquet", reading)))
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 5_000_000  # all rows of a batch would be 50 MB


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("bomb", ["[],", "0,", '{"":0},'], ids=["lists", "numbers", "objects"])
def test_a_value_that_would_fill_the_memory_is_refused_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, bomb: str
) -> None:
    monkeypatch.setattr(json_values, "FEW_CHARACTERS", 1000)
    monkeypatch.setattr(json_values, "MOST_VALUES", 1000)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    text = 2000 * '[{,日本\\"'
    good = json.dumps({"text": text}, ensure_ascii=False)  # as many brackets, but in a text
    many = '{"text": "x", "many": [' + 2000 * bomb + "0]}"
    (tmp_path / name).write_text(f"{good}\n{many}\n{good}\n", encoding="utf-8")
    first, refused, last = read_file(tmp_path / name, Reading())
    assert isinstance(first, Text)
    assert isinstance(last, Text)
    assert first.text == last.text == text
    assert isinstance(refused, Rejected)
    assert (refused.row, refused.reason) == (1, "too_large")
    assert "holds more than 1,000 others" in refused.detail
