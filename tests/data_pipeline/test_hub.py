from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import check_kills, digests, prose, read_documents

from data_pipeline.core.errors import Unresolved, UserError
from data_pipeline.download import streams
from data_pipeline.download.hub import HubRows, explained, split_of
from data_pipeline.download.sources import HuggingFaceSource
from data_pipeline.download.stage import DownloadConfig, download
from data_pipeline.stage import LocalContext


def hugging_face(dataset: Path | str, **options: Any) -> DownloadConfig:
    source = {"kind": "huggingface", "name": "hub", "dataset": str(dataset), **options}
    return DownloadConfig.model_validate({"sources": [source]})


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A data set folder with a train and a test split."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, count in (("train", 20), ("test", 5)):
        rows = [json.dumps({"content": f"{split} {prose(n)}", "n": n}) for n in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


def test_a_data_set_folder_is_streamed_by_split_and_pinned_by_its_files(
    dataset: Path, tmp_path: Path
) -> None:
    config = hugging_face(dataset, split="test", text_field="content")
    before = config.resolve().identity()
    assert str(tmp_path) not in json.dumps(before)
    download(config, {}, tmp_path / "out", LocalContext())
    documents = read_documents(tmp_path / "out")
    assert documents == {f"hub/test/00000#{n}": f"test {prose(n)}" for n in range(5)}
    (dataset / "test.jsonl").write_text(json.dumps({"content": "new"}))
    assert config.resolve().identity() != before


def test_rows_and_bytes_of_a_data_set_can_be_limited(dataset: Path, tmp_path: Path) -> None:
    few = hugging_face(dataset, text_field="content", max_rows=3)
    assert download(few, {}, tmp_path / "few", LocalContext())["documents"] == 3
    small = hugging_face(dataset, text_field="content", max_bytes=len(f"train {prose(0)}") + 1)
    assert download(small, {}, tmp_path / "small", LocalContext())["documents"] == 2


def test_an_unknown_split_is_one_clear_line(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source hub: .*validation") as refused:
        download(hugging_face(dataset, split="validation"), {}, tmp_path / "out", LocalContext())
    assert "\n" not in str(refused.value)


def test_a_mistyped_folder_is_a_mistake_and_no_question_to_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder here and no name of a data set"):
        hugging_face(tmp_path / "not" / "there").resolve()


def test_a_hub_that_cannot_be_reached_leaves_a_source_unresolved_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(Unresolved, match="can't be asked for the revision of nobody/nothing"):
        hugging_face("nobody/nothing").resolve()
    assert time.monotonic() - start < 60


def test_a_full_commit_is_resolved_without_network() -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    pinned = hugging_face("nobody/nothing", revision=commit).resolve()
    assert pinned.listings[0][0].version == f"commit:nobody/nothing@{commit}"
    said = pinned.identity()["sources"][0]
    assert (said["dataset"], said["revision"], said["split"]) == ("nobody/nothing", commit, "train")


def test_of_a_column_format_only_the_text_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "columns"
    folder.mkdir()
    pq.write_table(pa.table({"n": range(3), "content": ["a", "b", "c"]}), folder / "train.parquet")
    config = hugging_face(folder, text_field="content").resolve()
    source, listed = config.sources[0], config.listings[0][0]
    assert isinstance(source, HuggingFaceSource)
    assert list(split_of(source, listed)) == [{"content": "a"}, {"content": "b"}, {"content": "c"}]
    with pytest.raises(UserError, match=r"source hub: .*text") as refused:
        download(hugging_face(folder), {}, tmp_path / "out", LocalContext())
    assert "\n" not in str(refused.value)


def test_a_hub_lost_between_plan_and_run_is_one_line_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    planned = hugging_face("nobody/nothing", revision="0" * 40).resolve()
    with pytest.raises(ConnectionError, match=r"source hub: .*nobody/nothing.*run again when") as lost:
        download(planned, {}, tmp_path / "out", LocalContext())
    assert "\n" not in str(lost.value)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (httpx.ReadTimeout("timed out"), ConnectionError),
        (OSError(), ConnectionError),
        (ValueError("bad\nparquet"), UserError),
        (
            httpx.HTTPStatusError(
                "no", request=httpx.Request("GET", "http://x"), response=httpx.Response(403)
            ),
            UserError,
        ),
        (
            httpx.HTTPStatusError(
                "no", request=httpx.Request("GET", "http://x"), response=httpx.Response(503)
            ),
            ConnectionError,
        ),
    ],
)
def test_a_fault_amid_the_rows_says_whether_to_wait_or_to_mend(
    fault: Exception, kind: type[Exception]
) -> None:
    (source,) = hugging_face("nobody/nothing").sources
    assert isinstance(source, HuggingFaceSource)
    told = explained(source, fault, 7)
    assert isinstance(told, kind)
    assert "source hub" in str(told)
    assert "beyond 7 rows" in str(told)
    assert "\n" not in str(told)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A data set of three Parquet files, each of several row groups."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    for shard in range(3):
        numbers = range(100 * shard, 100 * shard + 40)
        columns = {"text": [prose(n) for n in numbers], "score": [n / 8 for n in numbers]}
        pq.write_table(pa.table(columns), folder / f"train-{shard}.parquet", row_group_size=7)
    return folder


def test_the_shards_of_a_data_set_are_items_of_work_and_workers_do_not_change_the_result(
    sharded: Path, tmp_path: Path
) -> None:
    config = hugging_face(sharded, meta_fields=["score"])
    for workers in (1, 2):
        download(config, {}, tmp_path / str(workers), LocalContext(workers))
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    assert len(list((tmp_path / "1").glob("documents-*"))) == 3
    documents = read_documents(tmp_path / "1")
    assert documents["hub/train/00002#39"] == prose(239)
    assert len(documents) == 120
    rows = pq.read_table(tmp_path / "1" / "documents-00001.parquet").to_pylist()
    assert json.loads(rows[3]["meta"]) == {"score": 103 / 8}


def test_a_limit_counts_over_all_shards_in_order(sharded: Path, tmp_path: Path) -> None:
    download(hugging_face(sharded, max_rows=95), {}, tmp_path / "out", LocalContext(2))
    assert list(read_documents(tmp_path / "out"))[-1] == "hub/train/00002#14"
    assert len(read_documents(tmp_path / "out")) == 95


@pytest.mark.parametrize("limit", [{}, {"max_rows": 95}, {"max_bytes": 60_000}])
def test_a_data_set_goes_on_at_any_row_where_it_stopped(sharded: Path, limit: dict[str, int]) -> None:
    config = hugging_face(sharded, **limit).resolve()
    source, listed = config.sources[0], config.listings[0][0]
    assert isinstance(source, HuggingFaceSource)
    whole = list(HubRows(source, listed, 0, 3, None))
    for stop in (1, 6, 7, 39, 40, 41, 80):
        first = HubRows(source, listed, 0, 3, None)
        before = list(islice(first, stop))
        position = json.loads(json.dumps(first.position()))
        assert before + list(HubRows(source, listed, 0, 3, position)) == whole


def test_a_killed_data_set_keeps_its_whole_parts_and_ends_the_same(sharded: Path, tmp_path: Path) -> None:
    config = hugging_face(sharded, max_rows=110).model_dump() | {"shard_bytes": 5000}
    check_kills(config, tmp_path)


def test_a_folder_that_save_to_disk_wrote_is_read_by_split_and_goes_on_at_any_row(tmp_path: Path) -> None:
    rows = {"about": [{"text": prose(n), "n": n} for n in range(20)], "other": list(range(20))}
    split = datasets.Dataset.from_dict(rows)
    split.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict({"train": split, "test": split.select(range(5))}).save_to_disk(tmp_path / "both")
    wanted: list[tuple[str, dict[str, Any], int]] = [
        ("one", {}, 20),
        ("both", {"split": "test"}, 5),
        ("one", {"max_rows": 7}, 7),
    ]
    for folder, options, count in wanted:
        config = hugging_face(tmp_path / folder, text_field="about.text", meta_fields=["about.n"], **options)
        out = tmp_path / f"out-{folder}-{count}"
        assert download(config, {}, out, LocalContext())["documents"] == count
        assert list(read_documents(out).values()) == [prose(n) for n in range(count)]
    row = pq.read_table(tmp_path / "out-one-20" / "documents-00001.parquet").to_pylist()[0]
    assert json.loads(row["meta"]) == {"about.n": 7}
    resolved = hugging_face(tmp_path / "one", text_field="about.text").resolve()
    source, listed = resolved.sources[0], resolved.listings[0][0]
    assert isinstance(source, HuggingFaceSource)
    whole = list(HubRows(source, listed, 0, 3, None))
    first = HubRows(source, listed, 0, 3, None)
    before = list(islice(first, 9))
    assert before + list(HubRows(source, listed, 0, 3, json.loads(json.dumps(first.position())))) == whole
    for wrong, message in (
        ({"split": "dev"}, "no split 'dev' among"),
        ({"text_field": "body"}, "no column 'body'"),
    ):
        with pytest.raises(UserError, match=message):
            download(hugging_face(tmp_path / "both", **wrong), {}, tmp_path / "none", LocalContext())


def test_a_data_set_of_several_configs_names_them(tmp_path: Path) -> None:
    lines = ["---", "configs:"]
    for name in ("en", "fr"):
        (tmp_path / "set" / name).mkdir(parents=True)
        pq.write_table(pa.table({"text": [name]}), tmp_path / "set" / name / "train.parquet")
        lines += [f"- config_name: {name}", f"  data_files: {name}/*.parquet"]
    (tmp_path / "set" / "README.md").write_text("\n".join([*lines, "---"]))
    with pytest.raises(UserError, match=r"set config to one of \['en', 'fr'\]"):
        download(hugging_face(tmp_path / "set"), {}, tmp_path / "out", LocalContext())
    with pytest.raises(UserError, match=r"'de' not found. Available: \['en', 'fr'\]"):
        download(hugging_face(tmp_path / "set", config="de"), {}, tmp_path / "out", LocalContext())


def test_the_text_of_a_folder_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FREE_BYTES", 100_000)
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"text": ["x" * 1000] * 3000}), tmp_path / "set" / "train.parquet")
    metrics = download(hugging_face(tmp_path / "set", max_expansion=1), {}, tmp_path / "out", LocalContext())
    assert (metrics["documents"], metrics["rejected/expands_too_far"]) == (100, 1)
