from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from corpora import check_kills, check_restarts, digests, prose, read_documents
from pydantic import ValidationError

from data_pipeline.core.errors import UserError
from data_pipeline.download.local import list_installed_python
from data_pipeline.download.sources import InstalledPythonSource
from data_pipeline.download.stage import DownloadConfig, download
from data_pipeline.stage import LocalContext


def write_files(folder: Path, count: int = 12) -> Path:
    """A folder of texts and JSON lines in sub-folders, with a few bad records."""
    for n in range(count):
        path = folder / f"part-{n % 3}" / f"text-{n:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(prose(n, 400))
    lines = [json.dumps({"text": prose(100 + n)}) for n in range(30)]
    lines[7] = '{"text": 3}'
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "ignored.pdf").write_text("a,b")
    return folder


def config(path: Path | str, **options: Any) -> DownloadConfig:
    shard_bytes = options.pop("shard_bytes", 5000)
    source = {"kind": "local", "name": "texts", "path": str(path), **options}
    return DownloadConfig.model_validate({"sources": [source], "shard_bytes": shard_bytes})


def test_documents_have_the_names_of_their_files_and_rows(tmp_path: Path) -> None:
    folder, out = write_files(tmp_path / "in"), tmp_path / "out"
    metrics = download(config(folder, license="CC0", url="https://x.org"), {}, out, LocalContext())
    documents = read_documents(out)
    assert metrics == {
        "files": 14,
        "documents": 41,
        "bytes": sum(len(t) for t in documents.values()),
        "rejected": 2,
        "rejected/field_not_text": 1,
        "rejected/not_utf8": 1,
        "left_out/.pdf": 1,
    }
    assert documents["texts/part-1/text-04.txt"] == prose(4, 400)
    assert documents["texts/lines.jsonl.gz#29"] == prose(129)
    first = pq.read_table(sorted(out.glob("documents-*"))[0]).to_pylist()[0]
    assert first["source"] == "texts"
    assert json.loads(first["meta"]) == {"license": "CC0", "url": "https://x.org"}
    rejected = [row for path in sorted(out.glob("rejected/*")) for row in pq.read_table(path).to_pylist()]
    assert {(row["id"], row["reason"]) for row in rejected} == {
        ("texts/latin.txt", "not_utf8"),
        ("texts/lines.jsonl.gz#7", "field_not_text"),
    }
    assert "texts/not_utf8" in (out / "report.md").read_text()


def test_worker_count_does_not_change_the_shards(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in")
    for workers in (1, 2):
        download(config(folder), {}, tmp_path / str(workers), LocalContext(workers))
    assert len(list((tmp_path / "1").glob("documents-*"))) > 5
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_a_killed_download_ends_the_same_when_started_again(tmp_path: Path) -> None:
    check_restarts(download, config(write_files(tmp_path / "in")), {}, tmp_path)


def test_the_same_files_elsewhere_are_the_same_artifact(tmp_path: Path) -> None:
    here, there = write_files(tmp_path / "here"), write_files(tmp_path / "far" / "there")
    one, other = config(here).resolve().identity(), config(there).resolve().identity()
    assert one == other
    assert str(tmp_path) not in json.dumps(one)
    for folder in (here, there):
        download(config(folder), {}, tmp_path / f"out-{folder.name}", LocalContext())
    assert digests(tmp_path / "out-here") == digests(tmp_path / "out-there")


def test_a_file_changed_added_or_renamed_is_another_artifact(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in")

    def identity() -> str:
        return json.dumps(config(folder).resolve().identity())

    seen = {identity()}
    (folder / "part-0" / "text-00.txt").write_text(prose(999, 400))
    seen.add(identity())
    (folder / "new.txt").write_text("new")
    seen.add(identity())
    (folder / "new.txt").rename(folder / "newer.txt")
    seen.add(identity())
    assert len(seen) == 4
    (folder / "ignored.pdf").write_text("not text of ours")
    assert identity() in seen


def test_a_file_that_changes_after_the_plan_stops_the_stage_by_name(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in")
    planned = config(folder).resolve()
    changed = folder / "part-0" / "text-00.txt"
    changed.write_text("something else")
    with pytest.raises(UserError, match=r"text-00\.txt changed since the run was planned; run again"):
        download(planned, {}, tmp_path / "out", LocalContext())
    changed.unlink()
    with pytest.raises(UserError, match=r"can't read .*text-00\.txt"):
        download(planned, {}, tmp_path / "out", LocalContext())


def test_one_large_file_becomes_several_shards(tmp_path: Path) -> None:
    lines = [json.dumps({"text": prose(n, 300)}) for n in range(100)]
    path = tmp_path / "large.jsonl"
    path.write_text("\n".join(lines))
    metrics = download(config(path, shard_bytes=20_000), {}, tmp_path / "out", LocalContext())
    shards = sorted((tmp_path / "out").glob("documents-*"))
    assert len(shards) == -(-int(metrics["bytes"]) // 21_000)
    assert list(read_documents(tmp_path / "out").values()) == [prose(n, 300) for n in range(100)]


def test_a_glob_and_a_single_file_name_documents_below_what_is_fixed(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in")
    names = [one.name for one in config(folder / "part-*" / "*.txt").resolve().listings[0]]
    assert names[0] == "part-0/text-00.txt"
    assert len(names) == 12
    assert [one.name for one in config(folder / "latin.txt").resolve().listings[0]] == ["latin.txt"]


def test_max_bytes_ends_the_listing_with_the_file_that_reaches_it(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_bytes(b"x" * 100)
    sizes = {
        limit: len(config(tmp_path, max_bytes=limit).resolve().listings[0]) for limit in (1, 100, 101, 999)
    }
    assert sizes == {1: 1, 100: 1, 101: 2, 999: 3}


def test_a_file_name_that_is_not_utf8_is_escaped_in_ids(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text("coffee")
    download(config(folder), {}, tmp_path / "out", LocalContext())
    assert read_documents(tmp_path / "out") == {"texts/caf\\udce9.txt": "coffee"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "source texts: no file at .*nowhere"),
        ("*.nothing", r"source texts: no file at .*\*\.nothing"),
        ("folder", "source texts: nothing to read at .*folder .1 files, none ending with .txt"),
    ],
)
def test_a_source_without_files_names_itself_and_its_path(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "table.pdf").write_text("a")
    with pytest.raises(UserError, match=message):
        config(tmp_path / path).resolve()


def test_a_corpus_of_bad_records_only_is_called_empty_and_says_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n{"x": 2}\n')
    with pytest.raises(
        UserError,
        match=r"corpus is empty.*2 texts/missing_field[\s\S]*texts/a.jsonl#0: .*no field 'text' among \['x'\]",
    ):
        download(config(tmp_path), {}, tmp_path / "out", LocalContext())


def test_two_sources_of_one_name_are_refused() -> None:
    source = {"kind": "local", "name": "a", "path": "x"}
    with pytest.raises(ValidationError, match="two sources are named 'a'"):
        DownloadConfig.model_validate({"sources": [source, source]})


@pytest.mark.parametrize("name", ["", "A", "a/b", "-a", "a b"])
def test_a_source_name_that_would_confuse_ids_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        DownloadConfig.model_validate({"sources": [{"kind": "local", "name": name, "path": "x"}]})


def test_installed_python_is_the_standard_library_first_then_packages_as_text_only() -> None:
    listing = list_installed_python(InstalledPythonSource(name="python", max_bytes=40_000_000))
    names = [one.name for one in listing]
    stdlib = [name for name in names if name.startswith("stdlib/")]
    assert "stdlib/json/decoder.py" in stdlib
    assert names[: len(stdlib)] == sorted(stdlib)
    assert sum(one.size for one in listing) >= 40_000_000 > sum(one.size for one in listing[:-1])
    assert all(name.endswith((".py", ".rst", ".md", ".txt")) for name in names)
    ours = ("site-packages/data_pipeline/", "site-packages/llm/", "site-packages/flows/")
    for name in names:
        assert not name.startswith(ours)
        assert ".dist-info/" not in name
        assert "__pycache__" not in name
        assert "__editable__" not in name
        assert not name.startswith("stdlib/site-packages")


def test_byte_code_does_not_change_what_installed_python_is(tmp_path: Path, monkeypatch: Any) -> None:
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    (packages / "pack").mkdir(parents=True)
    (packages / "pack-1.0.dist-info").mkdir()
    (packages / "pack-1.0.dist-info" / "licence.txt").write_text("licence")
    (library / "os.py").write_text("import sys")
    (packages / "pack" / "core.py").write_text("x = 1")
    paths = {"stdlib": str(library), "purelib": str(packages), "platlib": str(packages)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    source = InstalledPythonSource(name="python")
    before = list_installed_python(source)
    (library / "__pycache__").mkdir()
    (library / "__pycache__" / f"os.{sys.implementation.cache_tag}.py").write_text("not source")
    assert [one.name for one in before] == ["stdlib/os.py", "site-packages/pack/core.py"]
    assert list_installed_python(source) == before


def test_provenance_is_kept_with_every_document_and_its_own_fields_come_first(tmp_path: Path) -> None:
    lines = [{"text": "one", "url": "https://a.org/1", "score": 2.5}, {"text": "two"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = {"license": "CC0", "url": "https://a.org", "retrieved": "2024-03-01"}
    download(
        config(tmp_path / "a.jsonl", **said, meta_fields=["url", "score"]),
        {},
        tmp_path / "out",
        LocalContext(),
    )
    rows = pq.read_table(tmp_path / "out" / "documents-00000.parquet").to_pylist()
    assert [json.loads(row["meta"]) for row in rows] == [
        said | {"url": "https://a.org/1", "score": 2.5},
        said,
    ]
    assert config(tmp_path, **said).resolve().identity()["sources"][0]["retrieved"] == "2024-03-01"


def test_a_field_of_meta_that_no_document_has_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one", "標題": "x", "about": {"n": 1}}\n{"text": "two", "k": 0}\n' * 50
    )
    fields = ["標題", "k", "about.n", "titel", 'a"b']
    context = LocalContext()
    download(config(tmp_path / "a.jsonl", meta_fields=fields, shard_bytes=20), {}, tmp_path / "out", context)
    assert context.notes == ['source texts: no document has titel, a"b, which its meta_fields name']


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "https://me:hunter2@a.org"}, "user name or password"),
        ({"encoding": "klingon"}, "no encoding of this name"),
        ({"encoding": "base64"}, "not an encoding of text"),
        ({"retrieved": "someday"}, "valid date"),
        ({"max_expansion": 0}, "greater than 0"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as refused:
        config("x", **options)
    assert "hunter2" not in refused.value.errors()[0]["msg"]


def test_names_of_an_encoding_are_one_artifact(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    one, other = (config(tmp_path, encoding=name).resolve().identity() for name in ("latin-1", "ISO-8859-1"))
    assert one == other


def test_a_killed_large_file_keeps_its_whole_parts_and_ends_the_same(tmp_path: Path) -> None:
    lines = [json.dumps({"text": prose(n, 300)}) if n % 7 else "broken" for n in range(200)]
    data = "\n".join(lines).encode()
    (tmp_path / "large.jsonl.gz").write_bytes(gzip.compress(data))
    source = {"kind": "local", "name": "texts", "path": str(tmp_path / "large.jsonl.gz")}
    check_kills({"sources": [source], "shard_bytes": 20_000}, tmp_path)


def test_a_killed_archive_goes_on_in_the_member_where_it_stopped(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_files(tmp_path / "in", 60)
    shutil.make_archive(str(tmp_path / "box"), "gztar", tmp_path / "in")
    source = {"kind": "local", "name": "texts", "path": str(tmp_path / "box.tar.gz")}
    check_kills({"sources": [source], "shard_bytes": 10_000}, tmp_path)


def test_empty_files_are_told_and_take_no_shard_of_their_own(tmp_path: Path) -> None:
    for n in range(20):
        (tmp_path / f"{n:02d}.txt").write_text("text" if n % 2 else "")
    metrics = download(config(tmp_path), {}, tmp_path / "out", LocalContext())
    assert (metrics["documents"], metrics["rejected"]) == (10, 10)
    assert len(list((tmp_path / "out").glob("documents-*"))) == 1


def test_a_pipe_among_the_files_is_a_mistake_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt: it is no regular file"):
        config(tmp_path).resolve()
