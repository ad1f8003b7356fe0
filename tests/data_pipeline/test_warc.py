"""Web archives: which records are documents, and what is kept of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from web_archives import DATE, web_archive

from data_pipeline.download.readers import Reading, read_file
from data_pipeline.download.records import Rejected, Text

RECORDS: list[tuple[str, str, bytes, dict[str, Any]]] = [
    ("conversion", "text/plain", "Zürich".encode(), {}),
    ("response", "text/html", b"<p>page</p>", {}),
    ("response", "text/plain; charset=latin-1", b"caf\xe9", {}),
    ("response", "text/plain", b"caf\xe9", {}),
    ("response", "text/plain", b"gone", {"status": "404 Not Found"}),
    ("response", "text/plain; charset=klingon", b"x", {}),
    ("response", "text/plain; charset=undefined", b"x", {}),
    ("metadata", "text/plain", b"about", {}),
    ("conversion", "text/plain", b"", {}),
    ("resource", "text/plain", b"a resource", {}),
    ("response", "application/pdf", b"%PDF-1.7", {}),
]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "a.warc.wet.gz", "a.wet"])
def test_texts_of_a_web_archive_keep_their_address_and_date(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(web_archive(name.endswith(".gz"), RECORDS))
    records = list(read_file(path, Reading()))
    said = [(one.row, one.text if isinstance(one, Text) else one.reason) for one in records]
    assert said == [
        (1, "Zürich"),
        (2, "page"),
        (3, "café"),
        (4, "not_utf8"),
        (5, "http_status"),
        (6, "unknown_charset"),
        (7, "unknown_charset"),
        (9, "empty"),
        (10, "a resource"),
        (11, "not_plain_text"),
    ]
    assert isinstance(records[0], Text)
    assert records[0].meta == {"url": "http://example.org/0", "date": DATE}


def test_a_cut_web_archive_gives_the_records_before_the_cut(tmp_path: Path) -> None:
    texts = [f"{n} " + "".join(chr(33 + (n * i * i) % 90) for i in range(3000)) for n in range(60)]
    data = web_archive(True, [("conversion", "text/plain", text.encode(), {}) for text in texts])
    path = tmp_path / "a.wet.gz"
    path.write_bytes(data[: len(data) // 2])
    *records, fault = read_file(path, Reading())
    found = [one.text for one in records if isinstance(one, Text)]
    assert 20 < len(found) < 60
    assert found[:-1] == texts[: len(found) - 1]
    assert isinstance(fault, Rejected)
    assert fault.reason in ("unreadable_file", "bad_warc")


def test_what_is_no_web_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.warc"
    path.write_bytes(b"just a text\r\nand no more\r\n")
    (fault,) = read_file(path, Reading())
    assert isinstance(fault, Rejected)
    assert fault.reason == "bad_warc"
