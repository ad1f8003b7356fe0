"""Large files in slices: the same documents, ids and faults as read whole, however they are cut."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import check_restarts, digests, prose
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.core.errors import UserError
from data_pipeline.download import slices
from data_pipeline.download.local import pin_file
from data_pipeline.download.readers import Reading, read_file
from data_pipeline.download.slices import survey
from data_pipeline.download.stage import DownloadConfig, download
from data_pipeline.stage import LocalContext


def cut(path: Path, count: int, marker: Path) -> list[slices.Slice]:
    marker.unlink(missing_ok=True)
    return survey((pin_file(path.name, path), count, marker))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.sampled_from([b'{"text": "a"}', b'{"text": "wxyz"}', b"", b"broken", b"\r"]), max_size=20
    ),
    count=st.integers(2, 12),
    ends=st.booleans(),
    block=st.integers(1, 9),
)
def test_the_slices_of_a_file_of_lines_add_up_to_it(
    tmp_path: Path, lines: list[bytes], count: int, ends: bool, block: int
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if ends else b""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "BLOCK_BYTES", block)
        found = cut(path, count, tmp_path / "marker")
        if path.stat().st_size:
            parts = [record for part in found for record in read_file(path, Reading(), part)]
            assert parts == list(read_file(path, Reading()))


@pytest.mark.parametrize("count", [2, 3, 7, 20])
def test_the_slices_of_a_parquet_file_add_up_to_it(tmp_path: Path, count: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [prose(n) for n in range(50)]}), path, row_group_size=4)
    parts = [
        record
        for part in cut(path, count, tmp_path / "marker")
        for record in read_file(path, Reading(), part)
    ]
    assert parts == list(read_file(path, Reading()))


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DownloadConfig:
    """A large file of lines and one of columns."""
    monkeypatch.setattr(slices, "SLICE_BYTES", 20_000)
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [prose(n, 200) for n in range(100)]
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    columns: dict[str, Any] = {"text": texts}
    pq.write_table(pa.table(columns), folder / "b.parquet", row_group_size=5, use_dictionary=False)
    source = {"kind": "local", "name": "large", "path": str(folder)}
    return DownloadConfig.model_validate({"sources": [source], "shard_bytes": 15_000}).resolve()


def test_slices_are_items_of_work_and_workers_do_not_change_the_shards(
    large: DownloadConfig, tmp_path: Path
) -> None:
    for workers in (1, 2):
        download(large, {}, tmp_path / str(workers), LocalContext(workers))
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    ids = [
        id
        for path in sorted((tmp_path / "1").glob("documents-*"))
        for id in pq.read_table(path).column("id").to_pylist()
    ]
    assert ids == [f"large/{name}#{n}" for name in ("a.jsonl", "b.parquet") for n in range(100)]
    assert len(list((tmp_path / "1" / "scratch").glob("group-*-progress.json"))) > 5


def test_a_killed_download_of_slices_ends_the_same(large: DownloadConfig, tmp_path: Path) -> None:
    fewer = DownloadConfig.model_validate(large.model_dump() | {"shard_bytes": 60_000})
    check_restarts(download, fewer, {}, tmp_path)


def test_a_large_file_that_changes_after_the_plan_or_amid_the_run_stops_the_stage(
    large: DownloadConfig, tmp_path: Path
) -> None:
    path = Path(large.listings[0][0].location)
    before = path.read_bytes()
    path.write_bytes(before[::-1])
    with pytest.raises(UserError, match=r"a\.jsonl changed since the run was planned; run again"):
        download(large, {}, tmp_path / "changed", LocalContext())
    path.write_bytes(before)
    (part, *_) = cut(path, 2, tmp_path / "marker")
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=r"a\.jsonl changed"):
        slices.check_stamp(path, part)
