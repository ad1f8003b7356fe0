"""Pages of HTML: which text becomes a document, in which charset, and what a bad page costs."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import prose, read_documents
from web_archives import web_archive

from data_pipeline.download import html
from data_pipeline.download.groups import HubRecords
from data_pipeline.download.html import (
    EXTRACTORS,
    ExtractorGone,
    HtmlRules,
    charset_of,
    codec_of,
    declared,
    read_page,
)
from data_pipeline.download.readers import Reading, read_file
from data_pipeline.download.records import Record, Rejected, Text
from data_pipeline.download.stage import DownloadConfig, download
from data_pipeline.stage import LocalContext

RULES = HtmlRules()
DEEP = "<div>" * 30_000 + "text"
"""A page that takes its extractor minutes: the depth counts in the square."""


def page(text: str, head: str = "") -> str:
    return f"""<!DOCTYPE html><html><head>{head}<title> A
 title</title></head><body><div id="page"><nav><ul><li><a href="/">Home</a></li><li><a href="/x">In</a></li></ul></nav>
<div class="content"><article><p>{text}</p></article></div><footer><p>All rights reserved</p></footer></div></body>
</html>"""


def said(record: Record) -> str:
    return record.text if isinstance(record, Text) else record.reason


def test_the_main_text_of_a_page_is_a_document_with_its_title_and_address() -> None:
    head = '<meta charset="utf-8"><link rel="canonical" href="https://example.org/a"/>'
    text = prose(1).replace("\n\n", "</p><p>")
    record = read_page(None, page(text, head).encode(), RULES)
    assert isinstance(record, Text)
    assert record.text == prose(1)
    assert record.meta == {"title": "A title", "url": "https://example.org/a"}
    assert record.size == len(prose(1).encode())


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_either_extractor_finds_the_text_of_all_layouts_in_all_scripts(
    extractor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))  # `benchmarks` is no installed package
    from benchmarks.extractors import agreement
    from benchmarks.pages import pages

    rules = HtmlRules.model_validate({"extractor": extractor})
    for made in pages(1):
        record = read_page(None, made.source.encode(), rules)
        assert isinstance(record, Text), made.name
        precision, recall = agreement(made, record.text)
        assert recall > 0.85, made.name
        assert precision > 0.7, made.name


TEXTS = {
    "windows-1251": "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 3,
    "koi8-r": "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 3,
    "Shift_JIS": "吾輩は猫である。名前はまだ無い。どこで生れたか頓と見当がつかぬ。①㈱" * 3,
    "EUC-JP": "吾輩は猫である。名前はまだ無い。" * 5,
    "iso-2022-jp": "吾輩は猫である。名前はまだ無い。" * 5,
    "GBK": "人之初，性本善。性相近，习相远。苟不教，性乃迁。€" * 4,
    "gb2312": "人之初，性本善。性相近，習相遠。" * 4,
    "Big5": "人之初，性本善。性相近，習相遠。苟不教，性乃遷。" * 4,
    "EUC-KR": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 뷁 " * 3,
    "windows-874": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน " * 4,
    "iso-8859-1": "“Ça va”, dit l’élève – naïf et déçu. " * 4,
    "windows-1256": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. " * 3,
    "utf-8": "Zwölf Boxkämpfer 日本 हिन्दी 🙂. " * 4,
}


@pytest.mark.parametrize("label", TEXTS)
def test_the_charset_is_taken_from_the_header_and_from_the_page(label: str) -> None:
    text = TEXTS[label].strip()
    codec = codec_of(label)
    assert codec
    metas = [
        f'<meta charset="{label}">',
        f"<META HTTP-EQUIV=Content-Type CONTENT='text/html; charset={label}'>",
    ]
    for meta in metas:
        assert said(read_page(None, page(text, meta).encode(codec), RULES)) == text
    assert said(read_page(None, page(text).encode(codec), RULES, served=label)) == text
    assert said(read_page(None, page(text).encode(codec), RULES, fallback=label)) == text
    xml = f'<?xml version="1.0" encoding="{label}"?>' + page(text)
    assert said(read_page(None, xml.encode(codec), RULES)) == text


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-8"])
def test_a_byte_order_mark_comes_before_all_that_is_said(codec: str) -> None:
    text = TEXTS["utf-8"].strip()
    data = ("\ufeff" + page(text, '<meta charset="windows-1251">')).encode(codec)
    assert said(read_page(None, data, RULES, served="latin-1")) == text


def test_what_the_server_says_comes_before_the_page_and_an_unknown_name_counts_for_nothing() -> None:
    assert charset_of(b'<meta charset="koi8-r">', "windows-1251", "utf-8")[0] == "cp1251"
    assert charset_of(b'<meta charset="koi8-r">', "klingon", "utf-8")[0] == "koi8-r"
    assert charset_of(b"<p>", "klingon", "utf-8")[0] is None
    assert declared(b'<!-- <meta charset="koi8-r"> --><meta charset=big5>') == "big5"
    assert declared(b'<meta charset="utf-16">') == "utf-8"  # else it could not be read
    for name in ("utf-7", "base64", "rot13", "punycode", "unicode_escape", "a\0b", ""):
        assert codec_of(name) is None


def test_a_page_that_is_not_in_its_charset_is_rejected_with_advice_unless_the_fault_is_outside_of_its_text() -> (
    None
):
    text = TEXTS["windows-1251"].strip()
    record = read_page(None, page(text).encode("cp1251"), RULES)
    assert isinstance(record, Rejected)
    assert record.reason == "not_utf8"
    assert "encoding" in record.detail
    broken = page("café " * 20).encode().replace(b"All rights", b"\xff\xfe rights")
    assert said(read_page(None, broken, RULES)) == ("café " * 20).strip()
    assert said(read_page(None, b"<p>x", RULES, served="klingon")) == "unknown_charset"


@pytest.mark.parametrize("name", ["a.html", "b.HTM", "c.xhtml", "d.html.gz"])
def test_files_of_html_are_documents(tmp_path: Path, name: str) -> None:
    data = page(prose(2, 40)).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    config = DownloadConfig.model_validate(
        {"sources": [{"name": "site", "kind": "local", "path": str(tmp_path)}]}
    )
    metrics = download(config, {}, tmp_path / "out", LocalContext())
    assert read_documents(tmp_path / "out") == {f"site/{name}": prose(2, 40)}
    assert (metrics["documents"], metrics["rejected"]) == (1, 0)


def test_a_crawl_gives_its_pages(tmp_path: Path) -> None:
    """Ninety-eight pages of HTML and two of plain text."""
    russian = page(TEXTS["windows-1251"]).encode("cp1251")
    records: list[tuple[str, str, bytes, dict[str, Any]]] = [
        *(("response", "text/html", page(prose(n, 40)).encode(), {}) for n in range(95)),
        ("response", "text/html; Charset=windows-1251", russian, {}),
        ("response", "application/xhtml+xml", page(prose(96, 40)).encode(), {}),
        ("response", "text/html", b"<title>nothing</title>", {}),
        *(("response", "text/plain", prose(n).encode(), {}) for n in (98, 99)),
    ]
    (tmp_path / "crawl.warc.gz").write_bytes(web_archive(True, records))
    found = list(read_file(tmp_path / "crawl.warc.gz", Reading()))
    texts = [one for one in found if isinstance(one, Text)]
    assert len(found) == 100
    assert len(texts) == 99
    assert [one.reason for one in found if isinstance(one, Rejected)] == ["no_main_text"]
    assert texts[7].text == prose(7, 40)
    assert texts[7].meta is not None
    assert texts[7].meta.items() >= {"title": "A title", "url": "http://example.org/7"}.items()
    assert texts[95].text == TEXTS["windows-1251"].strip()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_fields_and_columns_of_html_are_documents(tmp_path: Path, name: str) -> None:
    rows = [{"text": page(prose(n, 40)), "title": f"row {n}"} for n in range(3)]
    rows.append({"text": "", "title": "none"})
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".csv"):
        quoted = [",".join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in rows]
        path.write_text("\n".join(["text,title", *quoted]) + "\n")
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    plain = list(read_file(path, Reading()))
    assert said(plain[0]) == rows[0]["text"]
    found = list(read_file(path, Reading(text_format="html", meta_fields=("title",))))
    assert [said(one) for one in found] == [*(prose(n, 40) for n in range(3)), "empty"]
    assert [one.row for one in found] == [one.row for one in plain]
    assert isinstance(found[1], Text)
    assert found[1].meta == {"title": "row 1"}  # of the row, before that of the page


def test_rows_of_a_data_set_that_hold_html_are_documents() -> None:
    rows: Any = [(3, Text(0, page(prose(1, 40)))), (3, Rejected(1, "field_not_text", ""))]
    found = [(where, said(record)) for where, record in HubRecords(rows, RULES)]
    assert found == [("/00003", prose(1, 40)), ("/00003", "field_not_text")]


def test_a_page_that_takes_too_long_is_given_up_and_those_after_it_are_read(tmp_path: Path) -> None:
    pages_ = [page(prose(1, 40)), DEEP, page(prose(2, 40))]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in pages_))
    reading = Reading(text_format="html", html=HtmlRules(page_seconds=0.3))
    found = [said(one) for one in read_file(tmp_path / "a.jsonl", reading)]
    assert found == [prose(1, 40), "too_slow", prose(2, 40)]


def waiting(rules: HtmlRules) -> psutil.Process:
    return psutil.Process(EXTRACTORS._idle[rules][-1]._process.pid)


@pytest.mark.parametrize("signal_", [signal.SIGSEGV, signal.SIGKILL])
def test_an_extractor_that_was_killed_while_it_waited_is_replaced(signal_: signal.Signals) -> None:
    assert EXTRACTORS.ask(page("one"), RULES)["text"]
    process = waiting(RULES)
    process.send_signal(signal_)
    process.wait(60)
    assert said(read_page(None, page(prose(3, 40)).encode(), RULES)) == prose(3, 40)


@pytest.mark.parametrize(
    ("signal_", "reason"), [(signal.SIGSEGV, "extractor_failed"), (signal.SIGKILL, None)]
)
def test_a_page_is_rejected_for_a_breakdown_of_its_extractor_and_not_for_a_kill_from_outside(
    signal_: signal.Signals, reason: str | None
) -> None:
    rules = HtmlRules(page_seconds=500)
    EXTRACTORS.ask(page("one"), rules)
    process, outcome = waiting(rules), []

    def ask() -> None:
        try:
            outcome.append(EXTRACTORS.ask(DEEP, rules).get("reason"))
        except ExtractorGone:
            outcome.append(None)

    asking = threading.Thread(target=ask)
    before = sum(process.cpu_times()[:2])
    asking.start()
    while sum(process.cpu_times()[:2]) < before + 0.05:  # until it works on the page
        pass
    process.send_signal(signal_)
    asking.join(60)
    assert outcome == [reason]


def test_the_end_of_an_extractor_is_no_fault_of_a_web_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html.sys, "executable", "/bin/false")
    (tmp_path / "a.warc").write_bytes(web_archive(False, [("response", "text/html", page("x").encode(), {})]))
    with pytest.raises(ExtractorGone):
        list(read_file(tmp_path / "a.warc", Reading(html=HtmlRules(page_seconds=9))))


def test_pages_of_too_many_bytes_are_rejected_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "MAX_PAGE_BYTES", 1000)
    assert said(read_page(None, b"x" * 1001, RULES)) == "too_large"
    assert said(html.as_main_text(Text(0, "x" * 1001, size=1001), RULES)) == "too_large"


def test_many_threads_and_forked_processes_have_extractors_of_their_own() -> None:
    texts = {number: prose(number, 40) for number in range(24)}
    found: dict[int, str] = {}

    def read(numbers: range) -> None:
        for number in numbers:
            found[number] = said(read_page(None, page(texts[number]).encode(), RULES))

    threads = [threading.Thread(target=read, args=(range(first, 24, 3),)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {
        number: said(read_page(None, page(text).encode(), RULES)) for number, text in texts.items()
    }
    child = os.fork()
    if not child:
        os._exit(0 if said(read_page(None, page(prose(1, 40)).encode(), RULES)) == prose(1, 40) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert said(read_page(None, page(prose(1, 40)).encode(), RULES)) == prose(1, 40)


def test_an_extractor_ends_when_nobody_asks_any_more() -> None:
    rules = HtmlRules(page_seconds=7)
    EXTRACTORS.ask(page("one"), rules)
    process = waiting(rules)
    EXTRACTORS.close()
    process.wait(60)


def test_an_extractor_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"trafilatura is not installed: pip install 'llmill\[trafilatura\]'"
    ):
        HtmlRules(extractor="trafilatura")


def test_marks_of_byte_order_are_the_ones_of_the_standard() -> None:
    assert list(html.BOMS) == [codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE]
