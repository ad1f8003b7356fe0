"""Formats that people keep text in beside JSON lines: tables, nested fields, a document a line, files without a
suffix."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import read_documents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from text_files import FORMATS, jsonl, tar, zipped

from data_pipeline.core.errors import UserError
from data_pipeline.download.formats import ALIASES, SUFFIXES
from data_pipeline.download.readers import Reading, read_file
from data_pipeline.download.records import Record, Rejected, Text
from data_pipeline.download.stage import DownloadConfig, download
from data_pipeline.stage import LocalContext

READING = Reading()


def read(folder: Path, name: str, data: bytes, reading: Reading = READING) -> list[Record]:
    (folder / name).write_bytes(data)
    return list(read_file(folder / name, reading))


def said(records: list[Record]) -> list[tuple[int | None, str]]:
    return [(one.row, one.text if isinstance(one, Text) else one.reason) for one in records]


def config(path: Path, **options: Any) -> DownloadConfig:
    return DownloadConfig.model_validate(
        {"sources": [{"kind": "local", "name": "s", "path": str(path), **options}]}
    )


CELLS = st.text(st.sampled_from("ab,\t\"'\n\r ü東ไท🙂\u2028"), max_size=12)


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(CELLS, CELLS.filter(bool)), max_size=8), end=st.sampled_from(["\n", "\r\n", "\r"])
)
def test_a_table_gives_the_texts_that_were_written(
    tmp_path: Path, suffix: str, delimiter: str, rows: list[tuple[str, str]], end: str
) -> None:
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("id", "text"), *rows])
    records = read(tmp_path, f"a{suffix}", sink.getvalue().encode("utf-8-sig"), Reading(meta_fields=("id",)))
    assert records == [Text(row, text, {"id": id}) for row, (id, text) in enumerate(rows)]


def test_a_bad_row_of_a_table_is_rejected_alone(tmp_path: Path) -> None:
    data = b'text,n\none,1\n\ntwo\n"three"x,3\ncaf\xe9,4\nfive,5\n"",6\n"se,7\neven",7\n"never closed,8\nnine,9\n'
    records = read(tmp_path, "a.csv", data)
    assert said(records) == [
        (0, "one"),
        (1, "bad_csv"),
        (2, "bad_csv"),
        (3, "not_utf8"),
        (4, "five"),
        (5, "empty"),
        (6, "se,7\neven"),
        (7, "bad_csv"),
    ]
    fault = records[-1]
    assert isinstance(fault, Rejected)
    assert "lines 11 to 12, read as one row" in fault.detail
    assert "quotes to false" in fault.detail


def test_quotes_and_delimiters_are_what_the_source_says(tmp_path: Path) -> None:
    data = b'text\tn\n"Yes", he said\t1\n"Open\t2\n'
    assert said(read(tmp_path, "a.tsv", data, Reading(quotes=False))) == [(0, '"Yes", he said'), (1, '"Open')]
    assert said(read(tmp_path, "b.csv", b"n;text\n1;a,b\n", Reading(delimiter=";"))) == [(0, "a,b")]
    (fault,) = read(tmp_path, "c.csv", b"n;text\n1;a,b\n")
    assert isinstance(fault, Rejected)
    assert (
        "no column 'text' among ['n;text'], which the first line names; they are told apart by ','"
        in fault.detail
    )


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_document_a_line_and_a_document_a_paragraph_whatever_ends_a_line(tmp_path: Path, end: str) -> None:
    lines = ["Eins zwei.", "", "สวัสดี", "三。", " ", "", "end"]
    data = end.join(lines).encode()
    assert said(read(tmp_path, "a.txt", data, Reading(split="lines"))) == [
        (0, "Eins zwei."),
        (2, "สวัสดี"),
        (3, "三。"),
        (6, "end"),
    ]
    parts = read(tmp_path, "a.txt", data, Reading(split="paragraphs"))
    assert [one.text.split() for one in parts if isinstance(one, Text)] == [
        ["Eins", "zwei."],
        ["สวัสดี", "三。"],
        ["end"],
    ]
    long = end.join(["word " * 30, "", "word " * 30, "", "x"]).encode()
    assert len(read(tmp_path, "b.txt", long, Reading(split_chars=100))) == 3


def test_a_bad_line_of_a_text_is_rejected_alone(tmp_path: Path) -> None:
    records = read(tmp_path, "a.txt", b"one\ncaf\xe9\nthree", Reading(split="lines"))
    assert said(records) == [(0, "one"), (1, "not_utf8"), (2, "three")]
    assert "byte 0xe9 at offset 3 of line 2; set the source's encoding" in str(records[1])


VALUE = {
    "id": 1,
    "data": {"text": "nested", "about": {"url": "http://x.org", "raw": "b"}},
    "data.url": "flat",
}


def test_a_dotted_path_finds_nested_fields_in_json_and_parquet(tmp_path: Path) -> None:
    reading = Reading("data.text", ("data.about.url", "data.url", "id", "none.of.these"))
    expected = [Text(0, "nested", {"data.about.url": "http://x.org", "data.url": "flat", "id": 1})]
    assert read(tmp_path, "a.jsonl", json.dumps(VALUE).encode(), reading) == expected
    for row_group_size in (1, 100):
        pq.write_table(
            pa.Table.from_pylist([VALUE] * 3), tmp_path / "a.parquet", row_group_size=row_group_size
        )
        assert list(read_file(tmp_path / "a.parquet", reading)) == [
            Text(row, "nested", expected[0].meta) for row in range(3)
        ]
    pq.write_table(pa.table({"data": [{"text": "a"}, None, {"text": None}]}), tmp_path / "b.parquet")
    assert said(list(read_file(tmp_path / "b.parquet", Reading("data.text")))) == [
        (0, "a"),
        (1, "field_not_text"),
        (2, "field_not_text"),
    ]
    assert said(list(read_file(tmp_path / "b.parquet", Reading("data.body")))) == [(None, "missing_field")]
    assert said(read(tmp_path, "b.jsonl", b'{"data": 7}', Reading("data.text"))) == [(0, "missing_field")]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_bytes_in_parquet_are_text_where_they_are_utf8(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["Zürich".encode(), b"caf\xe9", None], pa.binary()).cast(kind)
    url = pa.array([b"http://x.org", b"", b"\xff"], pa.binary())
    pq.write_table(pa.table({"text": column, "url": url}), tmp_path / "a.parquet")
    records = list(read_file(tmp_path / "a.parquet", Reading(meta_fields=("url",))))
    assert said(records) == [(0, "Zürich"), (1, "not_utf8"), (2, "field_not_text")]
    assert records[0] == Text(0, "Zürich", {"url": "http://x.org"})


def test_other_names_of_formats_are_known(tmp_path: Path) -> None:
    makers = FORMATS | {
        ".txt": lambda texts: texts[0].encode(),
        ".tsv": lambda texts: b"text\n" + texts[0].encode(),
    }
    for suffix, same in ALIASES.items():
        if same not in makers:  # HTML has tests of its own
            continue
        for packed, data in (("", makers[same](["one"])), (".GZIP", gzip.compress(makers[same](["one"])))):
            (record,) = read(tmp_path, f"a{suffix}{packed}", data)
            assert isinstance(record, Text)
            assert record.text == "one"


@pytest.mark.parametrize("name", ["part-00000", "part-00000.gz", "notes.log"])
def test_a_source_says_the_format_of_files_whose_names_do_not(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    data = jsonl(["one"])
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (folder / "a.csv").write_bytes(b"text\ntwo\n")
    (folder / "b.tar").write_bytes(tar({name: (folder / name).read_bytes()}))
    metrics = download(config(folder, format="jsonl"), {}, tmp_path / "out", LocalContext())
    assert read_documents(tmp_path / "out") == {
        "s/a.csv#0": "two",
        f"s/b.tar/{name}#0": "one",
        f"s/{name}#0": "one",
    }
    assert not any(key.startswith(("left_out", "passed_over")) for key in metrics)
    without = config(folder).resolve()
    assert [one.name for one in without.listings[0]] == ["a.csv", "b.tar"]
    assert sum(without.left_out().values()) == 1
    alone = config(folder / name)
    with pytest.raises(UserError, match=r"`format` sets that of others"):
        alone.resolve()


def test_an_address_may_have_no_suffix_if_the_source_says_its_format() -> None:
    source = {"kind": "http", "name": "s", "urls": ["https://x.org/export"]}
    with pytest.raises(ValidationError, match="or the source say its format"):
        DownloadConfig.model_validate({"sources": [source]})
    DownloadConfig.model_validate({"sources": [source | {"format": "jsonl"}]})


def test_options_that_exclude_each_other_and_those_that_no_format_has_are_refused(tmp_path: Path) -> None:
    for options in ({"split": "lines", "split_chars": 9}, {"format": "pdf"}, {"delimiter": "::"}):
        with pytest.raises(ValidationError):
            config(tmp_path, **options)
    assert all(f".{name[1:]}" in SUFFIXES for name in ALIASES.values())


def test_what_an_archive_holds_and_is_not_read_is_counted(tmp_path: Path) -> None:
    content = {"a.txt": b"text", "b.pdf": b"x", "c.pdf": b"x", ".hidden.txt": b"x", "LICENSE": b"x"}
    for make, name in ((tar, "a.tar"), (zipped, "a.zip")):
        (tmp_path / name).write_bytes(make(content))
    metrics = download(config(tmp_path / "a.*"), {}, tmp_path / "out", LocalContext())
    found = {key: value for key, value in metrics.items() if key.startswith("passed_over")}
    assert found == {"passed_over/.pdf": 4, "passed_over/hidden": 2, "passed_over/no suffix": 2}
    assert "s/.pdf" in (tmp_path / "out" / "report.md").read_text()


def test_what_a_folder_holds_and_is_not_read_is_counted_by_suffix_and_reason(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("a.txt", "deep/b.txt", "c.pdf", "deep/d.pdf", "README", ".x.txt", ".git/config.txt"):
        (folder / name).write_text(name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.txt").write_text("far")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "linked.txt").symlink_to(tmp_path / "elsewhere" / "far.txt")
    found = config(folder).resolve()
    assert [one.name for one in found.listings[0]] == ["a.txt", "deep/b.txt", "linked.txt"]
    assert found.left_out() == {
        "left_out/.pdf": 2,
        "left_out/hidden": 1,
        "left_out/hidden folder": 1,
        "left_out/linked folder": 1,
        "left_out/no suffix": 1,
    }
    matched = config(folder / "*").resolve()
    assert matched.left_out()["left_out/folder"] == 2
    assert "left_out/folder" not in config(folder / "**" / "*").resolve().left_out()


def test_a_folder_that_cannot_be_read_is_counted(tmp_path: Path) -> None:
    here = tmp_path / "in"
    here.mkdir()
    (here / "a.txt").write_text("text")
    inner = os.open(here, os.O_RDONLY)
    for _ in range(30):  # deeper than a path may be long, which no one may read by its path, root neither
        os.mkdir("x" * 250, dir_fd=inner)
        inner, above = os.open("x" * 250, os.O_RDONLY, dir_fd=inner), inner
        os.close(above)
    os.close(inner)
    assert config(here).resolve().left_out() == {"left_out/unreadable folder": 1}
