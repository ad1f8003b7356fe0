from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import sorted_runs as token_runs
from data_pipeline.hashing import HASHES, hash_column
from data_pipeline.sorted_runs import RUN, SortedRuns, gather, order_of, pack, unpack, write_run
from data_pipeline.stage import LocalContext


def write(runs: SortedRuns, name: str, ids: list[str], keys: list[int]) -> None:
    """A run of documents whose data is their id."""
    with write_run(runs.path(name, 0)) as run:
        for id, key in zip(ids, keys, strict=True):
            run.add(pa.array([id]), np.array([key], np.uint64), pa.array([id.encode()], pa.large_binary()))


@given(st.lists(st.lists(st.integers(0, 65_535), max_size=5), max_size=6), st.integers(0, 3))
def test_lists_of_tokens_come_back_from_bytes(lists: list[list[int]], skipped: int) -> None:
    offsets = np.cumsum([0, *map(len, lists)])
    for width in (np.uint16, np.uint32):
        flat = np.array([token for one in lists for token in one], width)
        back = unpack(pack(offsets, flat)[skipped:], pa.from_numpy_dtype(width))
        assert back.to_pylist() == lists[skipped:]


def test_documents_with_equal_keys_are_ordered_by_id_whatever_order_they_came_in() -> None:
    for ids in (["b", "a", "c", "d"], ["d", "c", "a", "b"]):
        keys = [7 if id in "abd" else 3 for id in ids]
        rows = pa.record_batch([pa.array(ids), pa.array(keys, pa.uint64()), pa.array([b""] * 4)], RUN.names)
        assert [ids[at] for at in order_of(rows)] == ["c", "a", "b", "d"]


def test_the_ends_of_the_range_of_keys_belong_to_it(tmp_path: Path) -> None:
    runs = SortedRuns(tmp_path, ("one",))
    write(runs, "one", ["top", "bottom", "middle"], [HASHES - 1, 0, 5])
    assert runs.between(0, HASHES - 1).column("id").to_pylist() == ["bottom", "middle", "top"]
    assert runs.between(0, 4).column("id").to_pylist() == ["bottom"]
    assert runs.between(5, 5).column("id").to_pylist() == ["middle"]
    assert runs.between(6, HASHES - 2).num_rows == 0


def test_no_task_opens_more_runs_than_the_fan_in_and_none_of_their_documents_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"{number:04d}" for number in range(600)]
    keys = hash_column(pa.array(ids), "").tolist()
    runs = SortedRuns(tmp_path, tuple(f"run{number:02d}" for number in range(30)))
    for number, name in enumerate(runs.names):
        write(runs, name, ids[number::30], keys[number::30])
    opened = []
    slices = token_runs.slices
    between = SortedRuns.between

    def counted(self: SortedRuns, first: int, last: int) -> pa.RecordBatch:
        opened.append(0)
        return between(self, first, last)

    def opens(path: Path, first: int, last: int):
        opened[-1] += 1
        return slices(path, first, last)

    monkeypatch.setattr(token_runs, "FAN_IN", 4)
    monkeypatch.setattr(token_runs, "GATHER_BYTES", 4000)
    monkeypatch.setattr(token_runs, "slices", opens)
    monkeypatch.setattr(SortedRuns, "between", counted)
    gathered = gather(runs, LocalContext())
    assert len(gathered.names) <= 4
    assert len(gathered.firsts) > 1
    bounds = [0, HASHES // 3, HASHES // 2, HASHES]
    found = [gathered.between(first, end - 1) for first, end in pairwise(bounds)]
    expected = [
        {id for id, key in zip(ids, keys, strict=True) if first <= key < end}
        for first, end in pairwise(bounds)
    ]
    assert [set(rows.column("id").to_pylist()) for rows in found] == expected
    assert [rows.num_rows for rows in found] == list(map(len, expected))
    ranges = len(gathered.firsts)
    assert max(opened[: -len(found)]) <= 4 * 2  # a range of one level may straddle two of the level before
    assert max(opened[-len(found) :]) <= 4 * ranges
