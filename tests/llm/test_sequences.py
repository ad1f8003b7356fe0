"""Documents laid flat, and read back as sequences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.tokenize.flat import FlatTokens, Stream, Vocabulary, write_flat
from llm.data.sequences import Sequences

END = 0


def lay(folder: Path, *groups: list[list[int]], vocab_size: int = 100) -> Stream:
    """Row groups of documents, to each of which the end-of-text token is added, as a shard's stream."""
    with write_flat(folder, "train-00000", Vocabulary("", vocab_size), END) as flat:
        for group in groups:
            ids = pa.array([f"source/{number}" for number in range(len(group))], pa.string())
            flat.add(ids, pa.array([[*one, END] for one in group], pa.list_(pa.uint32())))
    return FlatTokens(folder, "train").stream()


@pytest.mark.parametrize(("vocab_size", "width"), [(65536, 2), (65537, 4)])
def test_sequences_cover_the_text_once_as_targets(tmp_path: Path, vocab_size: int, width: int) -> None:
    groups = [[list(range(1, 6)), []], [list(range(6, 23))], [list(range(65502, 65536))]]
    stream = lay(tmp_path, *groups, vocab_size=vocab_size)
    assert (tmp_path / "flat" / "train-00000.bin").stat().st_size == 60 * width
    sequences = Sequences([stream], context=8)
    inputs, targets, documents = sequences.take(np.arange(len(sequences)))[:3]
    text = torch.tensor([token for group in groups for document in group for token in [*document, END]])
    assert len(sequences) == 7
    assert torch.equal(inputs.ravel(), text[:56])
    assert torch.equal(targets.ravel(), text[1:57])
    assert documents is None  # nobody asked


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=3, max_size=30), context=st.integers(2, 12), data=st.data())
def test_a_batch_says_which_document_each_token_belongs_to(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], context: int, data: st.DataObject
) -> None:
    documents = [[number + 1] * size for number, size in enumerate(sizes)]
    sequences = Sequences([lay(tmp_path_factory.mktemp("flat"), documents)], context, end=END)
    if not len(sequences):
        return
    wanted = np.array(data.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1, max_size=5)))
    tokens, _, numbers = sequences.take(wanted)[:3]
    owners = np.concatenate([[number] * (size + 1) for number, size in enumerate(sizes)])
    assert numbers is not None
    assert numbers.dtype == torch.int32
    for row, sequence in enumerate(wanted.tolist()):
        true = owners[sequence * context : (sequence + 1) * context]
        assert numbers[row].tolist() == (true - true[0]).tolist()
        assert all(token in (END, owner + 1) for token, owner in zip(tokens[row].tolist(), true, strict=True))


def test_taking_into_given_memory_gives_the_same_and_uses_no_other(tmp_path: Path) -> None:
    sequences = Sequences([lay(tmp_path, [[5, 6, 7], [8] * 20, [9, 10]])], context=4, end=END)
    room = sequences.empty(6)
    for indices in (np.array([1, 5, 0]), np.array([2, 2, 3, 4])):
        fresh, reused = sequences.take(indices), sequences.take(indices, room)
        for one, other, place in zip(fresh[:3], reused[:3], room[:3], strict=True):
            assert one is not None
            assert other is not None
            assert place is not None
            assert torch.equal(one, other)
            assert other.data_ptr() == place.data_ptr()


def test_windows_of_several_streams_are_numbered_stream_after_stream(tmp_path: Path) -> None:
    streams = [lay(tmp_path / name, [[token] * size]) for name, token, size in
               (("a", 1, 11), ("b", 2, 3), ("c", 3, 17))]  # fmt: skip
    both = Sequences(streams, context=4, end=END)
    assert (both.counts, len(both)) == ([2, 0, 4], 6)
    alone = [Sequences([stream], 4, end=END) for stream in streams]
    order = np.array([5, 0, 2, 1, 4, 3, 0])
    found = both.take(order)
    for row, sequence in enumerate(order.tolist()):
        file, index = (0, sequence) if sequence < 2 else (2, sequence - 2)
        expected = alone[file].take(np.array([index]))
        for one, other in zip(found[:3], expected[:3], strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one[row], other[0])


@pytest.mark.parametrize("tokens", [0, 8])
def test_less_than_a_window_is_none(tmp_path: Path, tokens: int) -> None:
    stream = lay(tmp_path, *[[[5] * (tokens - 1)]] if tokens else [])
    assert len(stream) == tokens
    assert len(Sequences([stream], context=8)) == 0
