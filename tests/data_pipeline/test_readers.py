from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import readers, records
from data_pipeline.readers import Reading, read_file, split_paragraphs
from data_pipeline.records import Rejected, Text

TEXTS = ["first line\nsecond", "Zürich, 東京", "third \u2028 text"]


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "n": n}).encode() + b"\n" for n, text in enumerate(texts))


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    ".jsonl": jsonl,
    ".json": lambda texts: json.dumps([{"text": text} for text in texts]).encode(),
    ".parquet": parquet,
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_row_format_gives_its_texts_in_order(tmp_path: Path, suffix: str, compression: str) -> None:
    path = tmp_path / f"file{suffix}{compression}"
    path.write_bytes(COMPRESSIONS[compression](FORMATS[suffix](TEXTS)))
    assert list(read_file(path, Reading("text"))) == [Text(row, text) for row, text in enumerate(TEXTS)]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"file.TXT{compression}"
    path.write_bytes(COMPRESSIONS[compression](b"\xef\xbb\xbf" + TEXTS[1].encode()))
    assert list(read_file(path, Reading("text"))) == [Text(None, TEXTS[1])]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_compressed_files_that_were_concatenated_are_read_to_the_end(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / ("file.txt.gz" if compress is gzip.compress else "file.txt.zst")
    path.write_bytes(compress(b"one ") + compress(b"two"))
    assert list(read_file(path, Reading("text"))) == [Text(None, "one two")]


def test_a_json_object_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{"body": "hello"}')
    assert list(read_file(tmp_path / "one.json", Reading("body"))) == [Text(None, "hello")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "bad_json"),
        (b'"just a string"', "not_an_object"),
        (b'{"body": "x"}', "missing_field"),
        (b'{"text": 7}', "field_not_text"),
        (b'{"text": null}', "field_not_text"),
        (b'{"text": ""}', "empty"),
        (b'{"text": "\\ud800"}', "not_utf8"),
        (b'{"text": "\xff"}', "not_utf8"),
        (b"[" * 100_000, "bad_json"),
    ],
)
def test_a_bad_line_is_rejected_with_its_reason_and_its_neighbours_survive(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n\n{"text": "after"}')
    before, bad, after = read_file(path, Reading("text"))
    assert (before, after) == (Text(0, "before"), Text(3, "after"))  # the blank line counts as a row
    assert isinstance(bad, Rejected)
    assert (bad.row, bad.reason) == (1, reason)
    assert bad.detail or reason == "empty"


def test_bytes_that_are_not_utf8_reject_a_text_file_and_say_where(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Caf\xe9".encode("latin-1"))
    assert list(read_file(tmp_path / "latin.txt", Reading("text"))) == [
        Rejected(None, "not_utf8", "byte 0xe9 at offset 3")
    ]


def test_a_text_above_the_size_limit_is_rejected_with_a_way_out_which_streams_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(records, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 64)
    path = tmp_path / "book.txt"
    paragraphs = [f"{n} " + "wörter " * 9 + "\n\n" for n in range(50)]
    path.write_text("".join(paragraphs))
    (fault,) = read_file(path, Reading("text"))
    assert isinstance(fault, Rejected)
    assert fault.reason == "too_large"
    assert "split_chars" in fault.detail
    assert list(read_file(path, Reading("text", split_chars=60))) == [
        Text(n, one) for n, one in enumerate(paragraphs)
    ]
    path.write_text("".join(paragraphs[:2]) + "x" * 5000 + "\n\n" + paragraphs[2])
    kinds = [type(record) for record in read_file(path, Reading("text", split_chars=60))]
    assert kinds[:3] == [Text, Text, Rejected]
    assert kinds[-1] is Text
    path.write_bytes("".join(paragraphs).encode() + b"\xff tail")
    *parts, fault = read_file(path, Reading("text", split_chars=60))
    assert len(parts) >= 48
    size = len("".join(paragraphs).encode())
    assert fault == Rejected(None, "not_utf8", f"byte 0xff at offset {size}")


def test_a_fault_of_the_disk_is_raised_and_never_taken_for_a_bad_record(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(read_file(tmp_path / "gone.txt", Reading("text")))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        list(read_file(tmp_path / "folder.jsonl", Reading("text")))


def test_a_cut_gzip_gives_the_records_before_the_cut_and_one_rejected_file(tmp_path: Path) -> None:
    texts = [f"{n} " + "".join(chr(33 + (n * i * i) % 90) for i in range(300)) for n in range(2000)]
    data = gzip.compress(jsonl(texts))
    path = tmp_path / "file.jsonl.gz"
    path.write_bytes(data[: len(data) // 2])
    *records, fault = read_file(path, Reading("text"))
    assert isinstance(fault, Rejected)
    assert fault.reason == "unreadable_file"
    assert 100 < len(records) < 2000
    assert records == [Text(row, text) for row, text in enumerate(texts[: len(records)])]


@pytest.mark.parametrize("suffix", [".parquet", ".txt.gz", ".txt.zst", ".parquet.gz"])
def test_a_file_that_is_not_what_its_name_says_is_rejected(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(b"this is plain text, nothing else" * 10)
    (fault,) = read_file(path, Reading("text"))
    assert isinstance(fault, Rejected)
    assert fault.reason == "unreadable_file"


def test_a_parquet_file_without_the_column_is_rejected_and_names_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    path.write_bytes(parquet(["x"]))
    (fault,) = read_file(path, Reading("body"))
    assert isinstance(fault, Rejected)
    assert fault.reason == "missing_field"
    assert "'text'" in fault.detail


def test_a_parquet_row_that_is_not_utf8_is_rejected_alone(tmp_path: Path) -> None:
    bad = pa.array([b"before", b"caf\xe9", b"after"]).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "file.parquet")
    assert list(read_file(tmp_path / "file.parquet", Reading("text"))) == [
        Text(0, "before"),
        Rejected(1, "not_utf8", "byte 0xe9 at offset 3 of the text"),
        Text(2, "after"),
    ]


@given(st.text(alphabet="ab\n \r\t.", max_size=400), st.integers(1, 60), st.integers(1, 50))
def test_the_parts_of_a_split_text_add_up_to_it_are_long_enough_and_do_not_depend_on_blocks(
    text: str, characters: int, block: int
) -> None:
    parts = list(split_paragraphs([text], characters))
    assert parts == list(
        split_paragraphs((text[at : at + block] for at in range(0, len(text), block)), characters)
    )
    assert "".join(parts) == text
    assert all(len(part) >= characters for part in parts[:-1])
