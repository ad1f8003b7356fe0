"""A reader ends where its file does: what follows a value, an archive or a member is read, or it is said that it
isn't."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from text_files import conversion, jsonl, parquet, tar, zipped

from data_pipeline.download import columns, slices
from data_pipeline.download.readers import Reading, read_file, read_json
from data_pipeline.download.records import Record, Rejected, Text
from data_pipeline.download.slices import look_through
from data_pipeline.download.sources import Listed

READING = Reading()


def read(folder: Path, name: str, data: bytes, reading: Reading = READING) -> list[Record]:
    (folder / name).write_bytes(data)
    return list(read_file(folder / name, reading))


def texts(records: list[Record]) -> list[str]:
    return [one.text for one in records if isinstance(one, Text)]


def reasons(records: list[Record]) -> list[str]:
    return [one.reason for one in records if isinstance(one, Rejected)]


ONE, TWO, THREE = (json.dumps({"text": text}).encode() for text in ("one", "zwei ü", "三"))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize(
    "lines",
    [
        [b"", ONE, TWO, THREE],
        [b"broken", ONE, TWO],
        [b"null", ONE, TWO],
        [b"7", ONE, b"", b'"text"', TWO],
        [ONE, b'{"text": "cut', TWO, b'{"text": "cut"', THREE],
        [ONE, b'{"text": "caf\xe9"}', TWO],
        [ONE, b'{"text": caf\xe9', TWO],
        [b"\xef\xbb\xbf" + ONE, b"\xef\xbb\xbf" + TWO],
        [b'{"a": {"text": "x"},', ONE, b"{" * 100_000, TWO],
        [b'{"text": -Infinit', ONE, b'{"text": "\\ud83', TWO, b'{"text": tru'],
    ],
)
def test_json_lines_are_read_the_same_under_either_name(
    tmp_path: Path, lines: list[bytes], end: bytes
) -> None:
    data = end.join(lines) + end
    as_lines, as_json = (read(tmp_path, f"a{suffix}", data) for suffix in (".jsonl", ".json"))
    assert [one for one in as_json if isinstance(one, Text)] == [
        one for one in as_lines if isinstance(one, Text)
    ]
    said = [
        [(one.row, one.reason) for one in found if isinstance(one, Rejected)] for found in (as_json, as_lines)
    ]
    assert said[0] == said[1]
    assert texts(as_json)


@given(
    st.lists(st.sampled_from([b"", b"null", b"x", ONE, TWO, THREE, b'{"text":', b"]", b"\xff", b"1 2"])),
    st.integers(1, 40),
)
def test_lines_are_the_same_documents_under_either_name_whatever_stands_between(
    lines: list[bytes], block: int
) -> None:
    class Blocks(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            return self.read(block)

    stream = Blocks(b"\n".join(lines))
    found = texts(list(read_json(stream, READING)))  # type: ignore[arg-type]
    assert found == [json.loads(line)["text"] for line in lines if line in (ONE, TWO, THREE)]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('[{"text": "a"}]\n[{"text": "b"}]\n', "ab"),
        ('[{"text": "a"}][{"text": "b"}] {"text": "c"}', "abc"),
        ('{"text": "a"}{"text": "b"}\n\n{"text": "c"}', "abc"),
        ('{\n "text": "a"\n}\n{\n "text": "b"\n}\n', "ab"),
        ('[]\n[{"text": "a"},\n\n{"text": "b"}]{"text": "c"}\n{"text": "d"}', "abcd"),
        ('\n\n[{"text": "a"}]', "a"),
    ],
)
def test_any_sequence_of_json_values_is_read_and_its_arrays_are_opened(
    tmp_path: Path, text: str, values: str
) -> None:
    records = read(tmp_path, "a.json", text.encode())
    assert texts(records) == list(values)
    assert not reasons(records)
    assert len({one.row for one in records}) == len(records)


def test_after_a_broken_element_an_array_goes_on_with_the_next_line_that_begins_alike(tmp_path: Path) -> None:
    rows = [{"text": f"{n}", "notes": [{"text": "inner"}]} for n in range(4)]
    for indent in (None, 1):
        whole = json.dumps(rows, indent=indent) if indent else ",\n".join(map(json.dumps, rows)).join("[]")
        broken = whole.replace('"text": "1"', '"text": "1" "x"')
        records = read(tmp_path, "a.json", broken.encode())
        assert texts(records) == ["0", "2", "3"]
        assert reasons(records) == ["bad_json"]
    records = read(tmp_path, "b.json", b'[{"text": "0"} {"text": "1"},\n{"text": "2"}]\n{"text": "3"}')
    assert texts(records) == ["0", "1", "2", "3"] or reasons(records)
    assert texts(records)[:2] == ["0", "1"]


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_members_of_a_compressed_file_are_read_to_the_last_and_what_is_none_is_told(
    tmp_path: Path, suffix: str
) -> None:
    pack = COMPRESS[suffix]
    joined = pack(jsonl(["one"])) + pack(b"") + b"\0" * 8 + pack(jsonl(["two"])) + b"\0" * 4
    assert texts(read(tmp_path, f"a.jsonl{suffix}", joined)) == ["one", "two"]
    records = read(tmp_path, f"a.jsonl{suffix}", joined + b"this is no member")
    assert (texts(records), reasons(records)) == (["one", "two"], ["unreadable_file"])
    records = read(tmp_path, f"a.jsonl{suffix}", joined + pack(jsonl(["three"] * 999))[:-9])
    assert texts(records)[:2] == ["one", "two"]
    assert reasons(records)[-1] == "unreadable_file"


def test_frames_that_zstd_skips_and_windows_of_two_gigabytes_are_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False)
    sink = io.BytesIO()
    writer = zstandard.ZstdCompressor(compression_params=parameters).stream_writer(sink, closefd=False)
    writer.write(jsonl(["far"]))
    writer.close()
    assert zstandard.get_frame_parameters(sink.getvalue()).window_size == 1 << 31
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    data = skipped + sink.getvalue() + skipped + zstandard.compress(jsonl(["near"])) + skipped
    assert read(tmp_path, "a.jsonl.zst", data) == [Text(0, "far", None), Text(1, "near", None)] or texts(
        read(tmp_path, "a.jsonl.zst", data)
    ) == ["far", "near"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_tars_that_were_joined_are_read_to_the_last(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    first, second = tar({"a.txt": b"1", "b.txt": b"2"}), tar({"c.txt": b"3", "a.txt": b"4"})
    name = "a.tar" if pack is bytes else "a.tar.gz"
    records = read(tmp_path, name, pack(first) + pack(second) + pack(tar({"a.txt": b"5"})))
    assert [(one.member, one.text) for one in records if isinstance(one, Text)] == [
        ("a.txt", "1"),
        ("b.txt", "2"),
        ("c.txt", "3"),
        ("a.txt~2", "4"),
        ("a.txt~3", "5"),
    ]
    assert not reasons(records)
    records = read(tmp_path, name, pack(first + second[:512]))
    assert (texts(records), reasons(records)[-1]) == (["1", "2"], "unreadable_file")
    records = read(tmp_path, name, pack(first + b"no header" * 200))
    assert (texts(records), reasons(records)) == (["1", "2"], ["unreadable_file"])


def test_zips_that_were_joined_are_read_to_the_last_and_what_belongs_to_none_is_told(tmp_path: Path) -> None:
    first, second = zipped({"a.txt": b"1", "b.txt": b"2"}), zipped({"a.txt": b"3"})
    records = read(tmp_path, "a.zip", first + second)
    assert [(one.member, one.text) for one in records if isinstance(one, Text)] == [
        ("a.txt", "1"),
        ("b.txt", "2"),
        ("a.txt~2", "3"),
    ]
    assert not reasons(records)
    program = b"#!/bin/sh\nunpacks itself\n" * 99
    assert read(tmp_path, "a.zip", program + second) == read(tmp_path, "b.zip", second + b"\r\n\0")
    for data, found in ((first[:-30] + second, ["3"]), (second + first[:50], ["3"])):
        records = read(tmp_path, "a.zip", data)
        assert (texts(records), reasons(records)) == (found, ["unreadable_file"])


def test_parquet_files_that_were_joined_are_refused_and_none_is_taken_for_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = parquet(["one"]) + parquet(["two"])
    records = read(tmp_path, "a.parquet", data)
    assert (texts(records), reasons(records)) == ([], ["unreadable_file"])
    assert "several Parquet files" in str(records[0])
    about = pa.table({"text": ["PAR1PAR1", "b"]})
    pq.write_table(about, tmp_path / "b.parquet", compression="none")
    assert texts(list(read_file(tmp_path / "b.parquet", Reading()))) == ["PAR1PAR1", "b"]
    for size in (7, 64):  # wherever the seam lies in what is read at once
        monkeypatch.setattr(columns, "BUFFER_BYTES", size)
        assert reasons(read(tmp_path, "a.parquet", data)) == ["unreadable_file"]
    monkeypatch.setattr(slices, "BLOCK_BYTES", 64)
    listed = Listed(name="a.parquet", size=len(data), version="", location=str(tmp_path / "a.parquet"))
    with pytest.raises(Exception, match="changed"):
        look_through(listed, 2)


def test_web_archives_that_were_joined_are_read_to_the_last(tmp_path: Path) -> None:
    parts = [gzip.compress(conversion(text)) for text in (b"one", b"two")]
    assert texts(read(tmp_path, "a.warc.gz", b"".join(parts))) == ["one", "two"]
    assert texts(read(tmp_path, "a.warc", gzip.decompress(b"".join(parts)))) == ["one", "two"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_text_in_utf16_is_refused_with_advice_and_never_read_as_other_letters(
    tmp_path: Path, suffix: str, encoding: str
) -> None:
    text = "text\nPchnąć w tę łódź jeża\n"
    if suffix.startswith(".json"):
        text = '{"text": "Księżyc"}\n{"text": "Œuvre: le cœur"}\n{"text": "plain"}\n'
    data = text.encode(encoding)
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(f"x{suffix}", data)
    for records in (read(tmp_path, f"a{suffix}", data), read(tmp_path, "a.zip", sink.getvalue())):
        (fault,) = records
        assert isinstance(fault, Rejected)
        assert fault.reason == "not_utf8"
        assert f"set the source's encoding to {encoding}" in fault.detail
    good = read(tmp_path, f"a{suffix}", data, Reading(encoding=encoding))
    assert not reasons(good)
    assert len(texts(good)) == {".txt": 1, ".csv": 1, ".tsv": 1}.get(suffix, 3)


def test_a_page_that_cannot_be_unpacked_does_not_end_its_web_archive(tmp_path: Path) -> None:
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Encoding: br\r\n\r\n" + b"\xff\x80" * 400
    head = "WARC-Type: response\r\nWARC-Target-URI: http://x.org/\r\nContent-Type: application/http; msgtype=response"
    record = f"WARC/1.0\r\n{head}\r\nContent-Length: {len(page)}\r\n\r\n".encode() + page + b"\r\n\r\n"
    records = read(tmp_path, "a.warc", conversion(b"one") + record + conversion(b"two"))
    assert texts(records) == ["one", "two"]
    assert len(reasons(records)) == 1
