from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import prose, read_documents, write_documents

from data_pipeline.clean.blocklists import Blocklists, PhraseBlocklist, UrlBlocklist
from data_pipeline.clean.stage import CleanConfig, clean
from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import pin
from data_pipeline.stage import LocalContext


def urls(folder: Path, text: str) -> UrlBlocklist:
    (folder / "urls.txt").write_text(text)
    return UrlBlocklist(pin([folder / "urls.txt"], "urls"))


LIST = """
# hosts
bad.example
*.Ugly.Example.
https://shop.example:8080/sale/
192.0.2.7
"""


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("https://bad.example/page?x=1", "bad.example"),
        ("http://WWW.Bad.Example", "bad.example"),
        ("https://user@deep.er.bad.example.:8443/", "bad.example"),
        ("ugly.example/x", "ugly.example"),
        ("ugly.example/?from=https://good.example", "ugly.example"),
        ("//ugly.example/x", "ugly.example"),
        ("https://www.shop.example/sale/shoes#red", "shop.example/sale"),
        ("https://shop.example/sale", "shop.example/sale"),
        ("http://192.0.2.7/x", "192.0.2.7"),
        ("https://notbad.example/", None),
        ("https://example/", None),
        ("https://good.example/?to=bad.example", None),
        ("https://good.example/bad.example", None),
        ("https://shop.example/sales", None),
        ("https://shop.example/", None),
        ("http://[::1", None),
        ("not an address", None),
        ("", None),
    ],
)
def test_an_entry_blocks_its_host_with_subdomains_or_its_pages(
    tmp_path: Path, url: str, entry: str | None
) -> None:
    assert urls(tmp_path, LIST).blocks(url) == entry


def test_addresses_are_found_in_metas_and_a_document_without_one_stays(tmp_path: Path) -> None:
    metas = [
        {"url": "https://bad.example/1"},
        {},
        {"url": None},
        {"url": "https://a.ugly.example"},
        {"licence": "x"},
    ]
    found = urls(tmp_path, LIST).find(pa.array([json.dumps(meta) for meta in metas]))
    assert [*found] == [(0, "blocked_url", "bad.example"), (3, "blocked_url", "ugly.example")]


def test_an_entry_that_is_no_host_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"urls.txt:2: '/path' is no host"):
        urls(tmp_path, "a.example\n/path\n")
    for entry in ("0.0.0.0 bad.example", "bad.example # why"):
        with pytest.raises(UserError, match=rf"urls.txt:1: '{entry}' is no host"):
            urls(tmp_path, entry)


@pytest.mark.timeout(20)
def test_a_very_long_address_is_looked_up_at_once(tmp_path: Path) -> None:
    blocked = urls(tmp_path, LIST)
    assert blocked.blocks("https://" + "a." * 500_000 + "bad.example/" + "a/" * 500_000) == "bad.example"
    assert blocked.blocks("https://shop.example/sale/" + "a/" * 500_000) == "shop.example/sale"


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("Buy cheap PILLS now", "cheap pills"),
        ("buy cheap,\n\npills", "cheap pills"),
        ("a cheap-pills.example", "cheap pills"),
        ("ÉTÉ indien", "été"),
        ("Un café noir", "cafe\u0301 noir"),  # texts are composed, lists may not be
        ("cheap pillsbury", None),
        ("ucheap pills", None),
        ("cheap blue pills", None),
        ("# not a comment", None),
    ],
)
def test_a_phrase_is_found_in_any_case_and_at_the_bounds_of_words(
    tmp_path: Path, text: str, phrase: str | None
) -> None:
    with gzip.open(tmp_path / "phrases.gz", "wt", encoding="utf-8") as file:
        file.write("# a comment\ncheap pills\n\nété\ncafe\u0301 noir\n")
    found = [*PhraseBlocklist(pin([tmp_path / "phrases.gz"], "phrases"), "NFC").find(pa.array([text]))]
    assert found == ([(0, "blocked_phrase", phrase)] if phrase else [])


def test_a_phrase_without_a_word_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("fine\n...\n")
    with pytest.raises(UserError, match=r"p.txt:2: '...' holds no word"):
        PhraseBlocklist(pin([tmp_path / "p.txt"], "phrases"), "NFC")


def test_a_list_counts_by_its_content_and_not_by_its_place(tmp_path: Path) -> None:
    identities = []
    for name, content in (("a", "x.example\n"), ("b", "x.example\n"), ("c", "y.example\n")):
        (tmp_path / name).write_text(content)
        config = CleanConfig(blocklists=Blocklists(urls=(tmp_path / name,)))
        identities.append(config.resolve().identity())
    assert identities[0] == identities[1] != identities[2]
    assert str(tmp_path) not in json.dumps(identities[0])


def test_a_list_that_is_missing_or_was_changed_after_the_plan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"clean.blocklists.phrases: .*/no.txt can't be read: No such file"):
        CleanConfig(blocklists=Blocklists(phrases=(tmp_path / "no.txt",))).resolve()
    (tmp_path / "list.txt").write_text("x.example\n")
    pinned = pin([tmp_path / "list.txt"], "urls")
    (tmp_path / "list.txt").write_text("y.example\n")
    with pytest.raises(UserError, match=r"list.txt changed since the run was planned"):
        UrlBlocklist(pinned)


def test_a_list_that_is_not_text_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"a\xff.example")
    with pytest.raises(UserError, match=r"list.txt is not UTF-8 text .byte 1."):
        UrlBlocklist(pin([tmp_path / "list.txt"], "urls"))
    (tmp_path / "list.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"list.gz can't be read: Not a gzipped file"):
        UrlBlocklist(pin([tmp_path / "list.gz"], "urls"))
    whole = gzip.compress(b"bad.example\n" * 1000)
    (tmp_path / "list.gz").write_bytes(whole[:20] + bytes(255 - byte for byte in whole[20:22]) + whole[22:])
    with pytest.raises(UserError, match=r"list.gz can't be read: Error -3"):
        UrlBlocklist(pin([tmp_path / "list.gz"], "urls"))


def test_a_listed_document_or_file_goes_and_nothing_of_its_text_stays(tmp_path: Path) -> None:
    texts = {
        f"s/{name}": f"{prose(n)} secret{n}"
        for n, name in enumerate(["a#0", "a#1", "b#0", "b#1", "c", "d/c"])
    }
    (tmp_path / "withdrawn.txt").write_text("# asked for on Monday\ns/a\ns/b#1\ns/c\ns/none\n")
    source, out = write_documents(tmp_path / "in", texts), tmp_path / "out"
    config = CleanConfig(gopher=None, blocklists=Blocklists(ids=(tmp_path / "withdrawn.txt",)))
    metrics = clean(config, {"documents": source}, out, LocalContext())
    assert set(read_documents(out)) == {"s/b#0", "s/d/c"}
    assert metrics["dropped/blocked_id"] == 4
    rejected = {row["id"] for path in out.glob("rejected/*") for row in pq.read_table(path).to_pylist()}
    assert rejected == {"s/a#0", "s/a#1", "s/b#1", "s/c"}
    tables = [pq.read_table(path).to_pylist() for path in out.rglob("*.parquet")]
    notes = [path.read_text() for path in out.rglob("*") if path.is_file() and path.suffix != ".parquet"]
    everything = str(tables) + "".join(notes)
    assert "secret2" in everything
    for gone in (0, 1, 3, 4):
        assert f"secret{gone}" not in everything
        assert prose(gone)[:40] not in everything
