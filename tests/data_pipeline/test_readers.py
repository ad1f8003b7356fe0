from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import accumulate, repeat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_files import FORMATS, TEXTS, jsonl, parquet

from data_pipeline.download import readers, records
from data_pipeline.download.json_values import json_values
from data_pipeline.download.paragraphs import split_paragraphs
from data_pipeline.download.readers import Reading, read_file
from data_pipeline.download.records import Record, Rejected, Text

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
        Rejected(
            None,
            "not_utf8",
            "byte 0xe9 at offset 3; set the source's encoding to what it is in: cp1252, latin-1, ...",
        )
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
    assert isinstance(fault, Rejected)
    assert (fault.row, fault.reason) == (None, "not_utf8")
    assert fault.detail.startswith(f"byte 0xff at offset {size};")


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
    start, ends = 0, []
    for gap in re.finditer(r"(?>\r\n|\r|\n)[ \t]*(?>\r\n|\r|\n)\s*", text):
        if gap.end() - start >= characters and gap.end() < len(text):
            start = gap.end()
            ends.append(start)
    assert list(accumulate(map(len, parts)))[:-1] == ends


@pytest.mark.timeout(100)
@pytest.mark.parametrize("part", ["word", "   \t", "\n\n\n\n", "a\n \t", "\r\r\r\r"])
def test_no_text_takes_long_to_split(part: str) -> None:
    """One look at all that came before for each block would be 5 * 10^11 characters."""
    parts = list(split_paragraphs(repeat(part, 500_000), 1_000_000_000))
    assert list(map(len, parts)) == [2_000_000]


SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".warc", ".wet", ".zip", ".tar")
SEEDS = {
    ".jsonl": jsonl(TEXTS),
    ".json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    ".parquet": parquet(TEXTS),
    ".warc": b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 5\r\n\r\nhello\r\n\r\n",
}


def read_bytes(folder: Path, name: str, data: bytes) -> list[Record]:
    path = folder / name
    path.write_bytes(data)
    return list(read_file(path, Reading("text", ("n",), spool=folder)))


@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_any_bytes_give_records_and_never_an_exception(
    tmp_path: Path, suffix: str, compression: str, data: bytes
) -> None:
    for content in (data, SEEDS.get(suffix, b"") + data):
        for record in read_bytes(tmp_path, f"file{suffix}{compression}", content):
            assert isinstance(record, Text | Rejected)
            if isinstance(record, Text):
                assert record.text
                assert record.size == len(record.text.encode())
            else:
                assert record.reason.isidentifier()
                assert record.detail.encode() or record.reason == "empty"


@pytest.mark.parametrize("name", [f"file{suffix}" for suffix in SEEDS] + ["file.jsonl.gz", "file.tar"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1), change=st.binary(min_size=1, max_size=4), cut=st.booleans())
def test_a_file_that_is_damaged_anywhere_gives_records_and_never_an_exception(
    tmp_path: Path, name: str, at: float, change: bytes, cut: bool
) -> None:
    data = SEEDS.get("." + name.split(".")[1], b"")
    if name.endswith(".gz"):
        data = gzip.compress(data)
    elif name.endswith(".tar"):
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w") as archive:
            for n in range(3):
                header = tarfile.TarInfo(f"{n}.jsonl")
                header.size = len(SEEDS[".jsonl"])
                archive.addfile(header, io.BytesIO(SEEDS[".jsonl"]))
        data = sink.getvalue()
    place = int(at * len(data))
    damaged = data[:place] + (b"" if cut else change + data[place + len(change) :])
    for record in read_bytes(tmp_path, name, damaged):
        assert isinstance(record, Text | Rejected)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.one_of(st.binary(max_size=40).map(lambda data: data.replace(b"\n", b"")), st.text(min_size=1)),
        max_size=12,
    )
)
def test_good_lines_survive_among_any_others(tmp_path: Path, lines: list[bytes | str]) -> None:
    written = [json.dumps({"text": one}).encode() if isinstance(one, str) else one for one in lines]
    good = {
        row: one
        for row, one in enumerate(lines)
        if isinstance(one, str) and "\0" not in one and one.encode("utf-8", "replace") == one.encode("utf-8")
    }
    records = read_bytes(tmp_path, "file.jsonl", b"\n".join(written))
    found = {one.row: one.text for one in records if isinstance(one, Text) and one.row in good}
    assert found == good


@given(
    values=st.lists(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)),
    blocks=st.integers(1, 30),
    indent=st.sampled_from([None, 1]),
)
def test_a_json_array_is_the_same_in_whatever_blocks_it_comes(
    values: list[object], blocks: int, indent: int | None
) -> None:
    text = json.dumps(values, indent=indent)
    parts = (text[at : at + blocks] for at in range(0, len(text), blocks))
    assert list(json_values(parts)) == list(enumerate(values))


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    data = b'{"text": "one"}\nbroken\n{"text": "two", "n": 2}\n'
    first, broken, last = read_bytes(tmp_path, "file.json", data)
    assert (first, last) == (Text(0, "one"), Text(2, "two", {"n": 2}))
    assert isinstance(broken, Rejected)
    assert broken.reason == "bad_json"


def test_an_array_that_breaks_off_gives_the_elements_before(tmp_path: Path) -> None:
    data = b'[{"text": "one"}, {"text": "two"}, {"text": "thr'
    *records, fault = read_bytes(tmp_path, "file.json", data)
    assert records == [Text(0, "one"), Text(1, "two")]
    assert isinstance(fault, Rejected)
    assert (fault.row, fault.reason) == (2, "bad_json")


def test_fields_that_are_kept_stay_what_they_are(tmp_path: Path) -> None:
    value = {"text": "t", "score": 0.5, "n": 3, "ok": True, "tags": ["a"], "none": None, "far": float("inf")}
    fields = ("score", "n", "ok", "tags", "none", "far", "missing")
    (tmp_path / "a.jsonl").write_text(json.dumps(value) + "\n" + '{"text": "bare"}')
    kept = {"score": 0.5, "n": 3, "ok": True, "tags": ["a"]}
    assert list(read_file(tmp_path / "a.jsonl", Reading("text", fields))) == [
        Text(0, "t", kept),
        Text(1, "bare"),
    ]
    day = datetime(2024, 3, 1, tzinfo=UTC)
    pq.write_table(pa.table({"text": ["t"], "date": [day], "score": [0.5]}), tmp_path / "a.parquet")
    assert list(read_file(tmp_path / "a.parquet", Reading("text", ("score", "date", "missing")))) == [
        Text(0, "t", {"score": 0.5, "date": "2024-03-01T00:00:00+00:00"})
    ]
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "t", "n": "x" * 70_000}))
    (fault,) = read_file(tmp_path / "b.jsonl", Reading("text", ("n",)))
    assert isinstance(fault, Rejected)
    assert fault.reason == "meta_too_large"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252", "shift_jis"])
def test_another_encoding_is_read_where_the_source_says_so(tmp_path: Path, encoding: str) -> None:
    text = "caf\u00e9" if encoding != "shift_jis" else "\u6771\u4eac"
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for _ in range(3))
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode(encoding)))
    reading = Reading("text", encoding=encoding)
    assert list(read_file(tmp_path / "a.txt", reading)) == [Text(None, text)]
    assert list(read_file(tmp_path / "a.jsonl.gz", reading)) == [Text(n, text) for n in range(3)]
    (fault,) = read_file(tmp_path / "a.txt", Reading("text"))
    assert isinstance(fault, Rejected)
    assert fault.reason == "not_utf8"
    assert ("set the source's encoding to utf-16" in fault.detail) == (encoding == "utf-16")


def test_utf16_without_a_byte_order_mark_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16-le"))
    (fault,) = read_file(tmp_path / "a.txt", Reading("text", encoding="utf-16"))
    assert fault == Rejected(None, "not_utf-16", "UTF-16 stream does not start with BOM")


def test_bytes_outside_the_encoding_end_a_file_after_its_good_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "two \x81"}\n{"text": "three"}')
    first, fault = read_file(tmp_path / "a.jsonl", Reading("text", encoding="cp1252"))
    assert first == Text(0, "one")
    assert fault == Rejected(None, "not_cp1252", "byte 0x81 at offset 30")


@pytest.mark.parametrize(
    ("name", "data", "row"), [("a.txt", b"a\0b", None), ("a.jsonl", b'{"text": "a\\u0000b"}', 0)]
)
def test_a_text_with_a_nul_is_binary_and_refused(
    tmp_path: Path, name: str, data: bytes, row: int | None
) -> None:
    (fault,) = read_bytes(tmp_path, name, data)
    assert fault == Rejected(row, "nul_bytes", "NUL at character 1: binary, or not UTF-8?")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file_is_told_or_holds_nothing(tmp_path: Path, suffix: str) -> None:
    records = read_bytes(tmp_path, f"file{suffix}", b"")
    assert all(isinstance(one, Rejected) for one in records)
    assert len(records) == (0 if suffix in (".jsonl", ".warc", ".wet") else 1)


def test_a_line_of_1500_megabytes_is_refused_in_bounded_memory_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "before"}\n')
        file.seek(1_500_000_000)  # zeros, of which the disk holds none
        file.write(b'\n{"text": "after"}\n')
    program = (
        "import re, sys; from pathlib import Path; from data_pipeline.download.readers import *\n"
        "for one in read_file(Path(sys.argv[1]), Reading()): print(getattr(one, 'text', 0) or one.reason)\n"
        # getrusage() would tell that of the process which started this one, where that had more
        r"print(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])"
    )
    run = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    *said, kilobytes = run.stdout.split()
    assert said == ["before", "too_large", "after"]
    assert int(kilobytes) < 1_250_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_fields_that_are_nested_too_deeply_refuse_their_record_alone(tmp_path: Path, name: str) -> None:
    deep = "[" * 900 + "]" * 900
    lines = ['{"text": "before"}', f'{{"text": "deep", "n": {deep}}}', '{"text": "after"}']
    data = "\n".join(lines) if name == "a.jsonl" else f"[{','.join(lines)}]"
    before, fault, after = read_bytes(tmp_path, name, data.encode())
    assert (before, after) == (Text(0, "before"), Text(2, "after"))
    assert isinstance(fault, Rejected)
    assert fault.reason == "bad_json"


def table(*columns: pa.Array, names: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(list(columns), names=names), file)
    return file.getvalue()


@pytest.mark.parametrize(
    "odd",
    [
        pa.array([1 << 30, 1], pa.date32()),
        pa.array([1 << 62, 1], pa.duration("s")),
        pa.array([1, 1], pa.timestamp("s", tz="Nowhere/Land")),
        pa.StructArray.from_arrays([pa.array([1, 1]), pa.array([2, 2])], names=["x", "x"]),
    ],
    ids=lambda odd: str(odd.type),
)
def test_a_field_that_python_cannot_hold_is_left_out_and_its_document_survives(
    tmp_path: Path, odd: pa.Array
) -> None:
    path = tmp_path / "file.parquet"
    path.write_bytes(table(pa.array(["a", "b"]), odd, names=["text", "odd"]))
    found = list(read_file(path, Reading(meta_fields=("odd",))))
    assert [record.text for record in found if isinstance(record, Text)] == ["a", "b"]


@pytest.mark.parametrize("names", [["text", "text", "odd"], ["text", "odd", "odd"]])
def test_a_parquet_file_with_a_column_twice_is_rejected(tmp_path: Path, names: list[str]) -> None:
    path = tmp_path / "file.parquet"
    path.write_bytes(table(*[pa.array(["a"])] * 3, names=names))
    (record,) = read_file(path, Reading(meta_fields=("odd",)))
    assert isinstance(record, Rejected)
    assert record.reason == "repeated_column"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "punycode"])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60))
def test_any_bytes_in_any_encoding_give_records_and_never_an_exception(
    tmp_path: Path, encoding: str, data: bytes
) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(data)
    list(read_file(path, Reading(encoding=encoding)))


def test_an_array_in_one_line_is_never_parsed_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(
        b"\xef\xbb\xbf [" + b",".join(json.dumps({"text": text}).encode() for text in TEXTS) + b"]"
    )
    monkeypatch.setattr(readers.json, "loads", lambda _: pytest.fail("parsed as a whole"))
    assert list(read_file(path, Reading())) == [Text(row, text) for row, text in enumerate(TEXTS)]


def test_a_parquet_file_of_one_large_row_group_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    rows = [f"{n:05d}".ljust(10_000, "x") for n in range(20_000)]
    pq.write_table(
        pa.table({"text": rows}), path, row_group_size=1 << 30, compression="none", use_dictionary=False
    )
    count = (
        "import resource, sys; from pathlib import Path; from data_pipeline.download.readers import Reading, read_file;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "before = peak(); found = sum(1 for _ in read_file(Path(sys.argv[1]), Reading()));"
        "print(found, (peak() - before) // 1000)"
    )
    said = subprocess.run(
        [sys.executable, "-c", count, str(path)], capture_output=True, text=True, check=True
    )
    found, megabytes = map(int, said.stdout.split())
    assert found == len(rows)
    assert path.stat().st_size > 200e6
    assert megabytes < 130
