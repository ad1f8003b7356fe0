"""Documents laid flat, and read back as windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.core.errors import UserError
from data_pipeline.tokenize.shards import TokenBatch
from llm.data.sequences import Windows, write_flat, write_flat_by_source

END = 0


def batch(*documents: list[int], ids: list[str] | None = None) -> TokenBatch:
    """A row group of these documents, the end-of-text token added to each."""
    whole = [[*document, END] for document in documents]
    offsets = np.cumsum([0, *map(len, whole)])
    names = ids or [f"source/{number}" for number in range(len(whole))]
    return TokenBatch(names, offsets, np.array([token for one in whole for token in one], np.uint32))


def flat(folder: Path, *documents: list[int], vocab_size: int = 100) -> Path:
    write_flat([batch(*documents)], folder / "train.bin", vocab_size, END)
    return folder / "train.bin"


@pytest.mark.parametrize(("vocab_size", "width"), [(65536, 2), (65537, 4)])
def test_windows_cover_the_text_once_as_targets(tmp_path: Path, vocab_size: int, width: int) -> None:
    groups = [batch(list(range(1, 6)), []), batch(list(range(6, 23))), batch(list(range(65502, 65536)))]
    path = tmp_path / "train.bin"
    assert write_flat(groups, path, vocab_size, END) == 60
    assert path.stat().st_size == 60 * width
    windows = Windows([path], vocab_size, context=8)
    inputs, targets, documents = windows.take(np.arange(len(windows)))
    text = torch.from_numpy(np.concatenate([group.tokens for group in groups]).astype(np.int64))
    assert len(windows) == 7
    assert torch.equal(inputs.ravel(), text[:56])
    assert torch.equal(targets.ravel(), text[1:57])
    assert documents is None  # nobody asked


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=3, max_size=30), context=st.integers(2, 12), data=st.data())
def test_a_batch_says_which_document_each_token_belongs_to(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], context: int, data: st.DataObject
) -> None:
    documents = [[number + 1] * size for number, size in enumerate(sizes)]
    path = flat(tmp_path_factory.mktemp("flat"), *documents)
    windows = Windows([path], 100, context, end=END)
    if not len(windows):
        return
    wanted = np.array(data.draw(st.lists(st.integers(0, len(windows) - 1), min_size=1, max_size=5)))
    tokens, _, numbers = windows.take(wanted)
    owners = np.concatenate([[number] * (size + 1) for number, size in enumerate(sizes)])
    assert numbers is not None
    assert numbers.dtype == torch.int32
    for row, window in enumerate(wanted.tolist()):
        true = owners[window * context : (window + 1) * context]
        assert numbers[row].tolist() == (true - true[0]).tolist()
        assert all(token in (END, owner + 1) for token, owner in zip(tokens[row].tolist(), true, strict=True))


def test_taking_into_given_memory_gives_the_same_and_uses_no_other(tmp_path: Path) -> None:
    path = flat(tmp_path, [5, 6, 7], [8] * 20, [9, 10])
    windows = Windows([path], 100, context=4, end=END)
    room = windows.empty(6)
    for indices in (np.array([1, 5, 0]), np.array([2, 2, 3, 4])):
        fresh, reused = windows.take(indices), windows.take(indices, room)
        for one, other, place in zip(fresh, reused, room, strict=True):
            assert one is not None
            assert other is not None
            assert place is not None
            assert torch.equal(one, other)
            assert other.data_ptr() == place.data_ptr()


def test_windows_of_several_files_are_numbered_file_after_file(tmp_path: Path) -> None:
    paths = [flat(tmp_path / name, [token] * size) for name, token, size in
             (("a", 1, 11), ("b", 2, 3), ("c", 3, 17))]  # fmt: skip
    both = Windows(paths, 100, context=4, end=END)
    assert (both.counts, len(both)) == ([2, 0, 4], 6)
    alone = [Windows([path], 100, 4, end=END) for path in paths]
    order = np.array([5, 0, 2, 1, 4, 3, 0])
    found = both.take(order)
    for row, window in enumerate(order.tolist()):
        file, index = (0, window) if window < 2 else (2, window - 2)
        expected = alone[file].take(np.array([index]))
        for one, other in zip(found, expected, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one[row], other[0])


@pytest.mark.parametrize("tokens", [0, 8])
def test_less_than_a_window_is_none(tmp_path: Path, tokens: int) -> None:
    path = flat(tmp_path, *[[5] * (tokens - 1)] if tokens else [])
    assert len(Windows([path], 100, context=8)) == 0


@pytest.mark.parametrize(
    ("tokens", "offsets"), [([5, END, 6], [0, 2, 3]), ([5, END, 6, END], [0, 4]), ([5, END], [0, 2, 2])]
)
def test_a_document_must_end_with_its_only_end_of_text(
    tmp_path: Path, tokens: list[int], offsets: list[int]
) -> None:
    wrong = TokenBatch([f"source/{n}" for n in range(len(offsets) - 1)], np.array(offsets), np.array(tokens))
    with pytest.raises(AssertionError, match=f"document source/{len(offsets) - 2} does not end"):
        write_flat([wrong], tmp_path / "train.bin", 100, END)
    assert not list(tmp_path.iterdir())


def test_each_source_gets_a_file_of_its_own_in_the_order_of_the_text(tmp_path: Path) -> None:
    groups = [
        batch([1], [2, 2], [3], ids=["a/1", "b/x/1", "a/2"]),
        batch([4], [5], ids=["b/2", "b/3"]),
        batch([6], ids=["c/1"]),
    ]
    paths = {name: tmp_path / f"{name}.bin" for name in "ab"}
    assert write_flat_by_source(groups, paths, 100, END) == {"a": 4, "b": 7, "c": 2}
    assert np.fromfile(paths["a"], "<u2").tolist() == [1, END, 3, END]
    assert np.fromfile(paths["b"], "<u2").tolist() == [2, 2, END, 4, END, 5, END]
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "b.bin"}


def test_a_source_without_documents_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    groups = [batch([1], [2], ids=["wiki/1", "books/1"])]
    with pytest.raises(UserError, match=r"mixture names novels, .*\nthe sources are books, wiki"):
        write_flat_by_source(groups, {name: tmp_path / name for name in ("wiki", "novels")}, 100, END)
    assert not list(tmp_path.iterdir())
