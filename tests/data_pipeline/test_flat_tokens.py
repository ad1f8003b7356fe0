"""The flat files of token shards: what is in them, and streams of a split or of a source of it."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from corpora import digests, prose, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.core.errors import UserError
from data_pipeline.stage import LocalContext
from data_pipeline.tokenize.flat import FlatTokens, Vocabulary, index_of, lay_flat, write_flat
from data_pipeline.tokenize.report import SPLITS
from data_pipeline.tokenize.shards import TokenShards
from data_pipeline.tokenize.stage import TokenizeConfig, tokenize
from data_pipeline.train_tokenizer.stage import TokenizerConfig, train_tokenizer

END = 0
VOCABULARY = Vocabulary("a tokenizer", 500)
TEXTS = {f"{('web', 'books', 'code')[n % 7 % 3]}/{n:03d}": prose(n, 20 + n) for n in range(150)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some documents of three sources in several token shards."""
    folder = tmp_path_factory.mktemp("flat")
    inputs = {"documents": write_documents(folder / "documents", TEXTS), "tokenizer": folder / "tokenizer"}
    train_tokenizer(TokenizerConfig(vocab_size=500), inputs, inputs["tokenizer"], LocalContext())
    out = folder / "tokens"
    tokenize(TokenizeConfig(val_fraction=0.2, shard_tokens=2_500), inputs, out, LocalContext())
    shutil.rmtree(out / "scratch")
    assert len(list(out.glob("train-*.parquet"))) > 3
    return out


def documents(folder: Path, split: str) -> Iterator[tuple[str, list[int]]]:
    """(id, tokens) of a split's documents, from its Parquet shards."""
    for batch in TokenShards(folder, split):  # type: ignore[arg-type]
        for id, first, end in zip(batch.ids, batch.offsets, batch.offsets[1:], strict=False):
            yield id, batch.tokens[first:end].tolist()


def test_a_split_and_each_source_of_it_read_as_their_documents_end_to_end(shards: Path) -> None:
    for split in SPLITS:
        flat, reader = FlatTokens(shards, split), TokenShards(shards, split)
        assert flat.vocabulary == Vocabulary(reader.tokenizer_sha256, reader.vocab_size)
        assert flat.tokens == reader.tokens
        expected: dict[str | None, list[int]] = {None: []}
        for id, tokens in documents(shards, split):
            expected[None] += tokens
            expected.setdefault(id.partition("/")[0], []).extend(tokens)
        assert flat.sources() == {name: len(expected[name]) for name in ("books", "code", "web")}
        for source, tokens in expected.items():
            stream = flat.stream(source)
            assert len(stream) == len(tokens)
            assert stream.read(np.array([0]), len(tokens)).tolist() == [tokens]
            starts = np.random.default_rng(0).integers(0, len(tokens) - 40, 200)
            rows = stream.read(starts, 40)
            assert rows.tolist() == [tokens[start : start + 40] for start in starts]
    assert len(flat.stream("nowhere")) == 0


def test_flat_files_made_of_parquet_shards_are_those_that_the_stage_writes(
    shards: Path, tmp_path: Path
) -> None:
    """As tokens that were made elsewhere are taken in; what is there already is left as it is."""
    copy = shutil.copytree(shards, tmp_path / "copy")
    shutil.rmtree(copy / "flat")
    with pytest.raises(UserError, match="holds train shards without flat files"):
        FlatTokens(copy, "train")
    lay_flat(copy, END, LocalContext(2))
    assert digests(copy) == digests(shards)
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    (copy / "flat" / "val-00000.arrow").unlink()
    lay_flat(copy, END, LocalContext())
    assert digests(copy) == digests(shards)
    changed = {path.name for path in copy.rglob("*") if path.stat().st_mtime_ns != times[path]}
    assert changed == {"flat", "val-00000.bin", "val-00000.arrow"}


def test_the_index_of_shards_without_flat_files_is_made_of_them(shards: Path, tmp_path: Path) -> None:
    """As the artifacts of older versions are looked into."""
    for path in shards.glob("*.parquet"):
        shutil.copy(path, tmp_path)
        ours, made = index_of(path), index_of(tmp_path / path.name)
        assert (made.tokens, made.sources) == (ours.tokens, ours.sources)
        for source in ours.sources:
            for one, other in zip(ours.documents(source), made.documents(source), strict=True):
                assert np.array_equal(one, other)


def write(folder: Path, shards: list[list[tuple[str, list[int]]]]) -> None:
    """Flat files of shards of (id, tokens but the last)."""
    for number, rows in enumerate(shards):
        with write_flat(folder, f"train-{number:05d}", VOCABULARY, END) as flat:
            for row in rows:
                flat.add(pa.array([row[0]]), pa.array([[*row[1], END]], pa.list_(pa.uint16())))


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(
        st.lists(st.tuples(st.sampled_from(["a/1", "b/x/2", "c"]), st.integers(0, 6)), max_size=6),
        min_size=1,
        max_size=5,
    ),
    length=st.integers(1, 12),
)
def test_rows_are_what_lies_there_however_short_documents_and_shards_are(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[tuple[str, int]]], length: int
) -> None:
    folder, number = tmp_path_factory.mktemp("flat"), iter(range(1, 500))
    laid = [[(id, [next(number) for _ in range(size)]) for id, size in rows] for rows in shards]
    write(folder, laid)
    flat = FlatTokens(folder, "train")
    for source in (None, "a", "b", "c"):
        mine = [one for rows in laid for one in rows if source in (None, one[0].partition("/")[0])]
        text = [token for _, tokens in mine for token in [*tokens, END]]
        stream = flat.stream(source)
        assert len(stream) == len(text)
        starts = np.arange(max(0, len(text) - length + 1))[::-1]
        assert stream.read(starts, length).tolist() == [text[start : start + length] for start in starts]


@pytest.mark.parametrize("documents", [[[5, END], [6]], [[5, END, 6, END]], [[5, END], []]])
def test_a_document_must_end_with_its_only_end_of_text(tmp_path: Path, documents: list[list[int]]) -> None:
    ids = pa.array([f"source/{number}" for number in range(len(documents))])
    with (
        pytest.raises(AssertionError, match=f"document source/{len(documents) - 1} does not end"),
        write_flat(tmp_path, "train-00000", VOCABULARY, END) as flat,
    ):
        flat.add(ids, pa.array(documents, pa.list_(pa.uint16())))
    assert not list((tmp_path / "flat").iterdir())


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train-00001.bin", "cut"),
        ("train-00001.bin", "gone"),
        ("train-00001.arrow", "cut"),
        ("train-00001.arrow", "other"),
    ],
)
def test_a_corrupt_flat_file_is_named_and_verify_is_suggested(
    shards: Path, tmp_path: Path, name: str, damage: str
) -> None:
    path = shutil.copytree(shards, tmp_path / "damaged") / "flat" / name
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("x", pa.int8())])):
            pass
    with pytest.raises(UserError, match=rf"corrupt shard .*{name}(.|\n)*llmill verify"):
        FlatTokens(tmp_path / "damaged", "train").stream()


def test_flat_files_of_two_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    for number, vocabulary in enumerate((VOCABULARY, Vocabulary("another", 500))):
        with write_flat(tmp_path, f"train-{number:05d}", vocabulary, END):
            pass
    with pytest.raises(UserError, match="different tokenizers"):
        FlatTokens(tmp_path, "train")


def test_a_folder_without_shards_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no train shards"):
        FlatTokens(tmp_path, "train")


def test_more_shards_are_read_than_a_process_may_open_files(tmp_path: Path) -> None:
    count = 300
    write(tmp_path, [[("a/1", [number + 1])] for number in range(count)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        streams = [FlatTokens(tmp_path, "train").stream(source) for source in (None, "a")]
        for stream in streams:
            assert stream.read(np.array([0]), 2 * count)[0, ::2].tolist() == list(range(1, count + 1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
