from __future__ import annotations

import json
import random
import re
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import check_restarts, digests, prose, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import documents
from data_pipeline import sorted_runs as token_runs
from data_pipeline.core.errors import UserError
from data_pipeline.documents import SCHEMA, write_shard
from data_pipeline.stage import LocalContext
from data_pipeline.tokenize import encode
from data_pipeline.tokenize.encode import append_to_each
from data_pipeline.tokenize.merge import ROW_GROUP_TOKENS
from data_pipeline.tokenize.report import SPLITS, count_words
from data_pipeline.tokenize.shards import TokenShards
from data_pipeline.tokenize.stage import TokenizeConfig, tokenize
from data_pipeline.train_tokenizer.stage import TokenizerConfig, train_tokenizer
from data_pipeline.train_tokenizer.tokenizer import load_tokenizer, sha256

TEXTS = {f"{'ab'[n % 2]}/{n:03d}": prose(n, 40 + n) for n in range(200)} | {"a/spelt": "x<|endoftext|>y"}
CONFIG = TokenizeConfig(val_fraction=0.1, shard_tokens=10_000)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    documents = write_documents(folder / "dedup", TEXTS, shards=4)
    train_tokenizer(
        TokenizerConfig(vocab_size=600), {"documents": documents}, folder / "tokenizer", LocalContext()
    )
    return {"documents": documents, "tokenizer": folder / "tokenizer"}


@pytest.fixture(scope="module")
def shards(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenize")
    tokenize(CONFIG, inputs, out, LocalContext())
    return out


def tokens_by_id(folder: Path) -> dict[str, dict[str, list[int]]]:
    """Tokens of each document by split and id."""
    return {
        split: {
            id: batch.tokens[start:end].tolist()
            for batch in TokenShards(folder, split)
            for id, start, end in zip(batch.ids, batch.offsets, batch.offsets[1:], strict=False)
        }
        for split in SPLITS
    }


def test_every_document_is_in_one_split_with_its_own_tokens_and_one_end_of_text(
    inputs: dict[str, Path], shards: Path
) -> None:
    tokenizer = load_tokenizer(inputs["tokenizer"])
    found = tokens_by_id(shards)
    assert not set(found["train"]) & set(found["val"])
    for id, tokens in (found["train"] | found["val"]).items():
        assert tokens == [*tokenizer.encode(TEXTS[id]).ids, 0]
    assert set(found["train"] | found["val"]) == set(TEXTS)
    assert 8 <= len(found["val"]) <= 35  # 201 documents at 0.1: four standard deviations


def test_the_reader_gives_all_tokens_once_and_what_made_them(inputs: dict[str, Path], shards: Path) -> None:
    for split in SPLITS:
        reader = TokenShards(shards, split)
        flat = reader.read_all()
        assert flat.dtype == np.uint16
        assert len(flat) == reader.tokens
        assert (flat == 0).sum() == len(tokens_by_id(shards)[split])
        assert np.array_equal(flat, np.concatenate([batch.tokens for batch in reader]))
        assert reader.vocab_size == 600
        assert reader.tokenizer_sha256 == sha256(inputs["tokenizer"])


def test_neither_workers_nor_the_sharding_of_documents_change_a_byte(
    inputs: dict[str, Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = list(TEXTS.items())
    random.Random(5).shuffle(items)
    monkeypatch.setattr(documents, "ROW_GROUP_ROWS", 7)
    for number in (1, 9, 60):
        other = {**inputs, "documents": write_documents(tmp_path / f"in-{number}", items, shards=number)}
        tokenize(CONFIG, other, tmp_path / f"out-{number}", LocalContext())
        assert digests(tmp_path / f"out-{number}") == digests(shards)
    tokenize(CONFIG, inputs, tmp_path / "workers", LocalContext(2))
    assert digests(tmp_path / "workers") == digests(shards)


@pytest.mark.parametrize(("fan_in", "gather_bytes"), [(2, 1 << 30), (2, 4000), (6, 20_000)])
def test_runs_that_are_sorted_in_small_parts_and_gathered_in_levels_give_the_same_bytes(
    inputs: dict[str, Path],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fan_in: int,
    gather_bytes: int,
) -> None:
    """What bounds memory and open files leaves no trace, in one range of keys or many."""
    other = {**inputs, "documents": write_documents(tmp_path / "in", TEXTS, shards=11)}
    for name, value in (("FAN_IN", fan_in), ("GATHER_BYTES", gather_bytes), ("RUN_BYTES", 3000)):
        monkeypatch.setattr(token_runs, name, value)
    tokenize(CONFIG, other, tmp_path / "out", LocalContext())
    levels = {path.name.split("-")[1] for path in (tmp_path / "out" / "scratch").glob("gathered-*")}
    assert len(levels) == (3 if fan_in == 2 else 1)
    assert digests(tmp_path / "out") == digests(shards)


def test_a_tokenize_killed_while_it_gathers_ends_the_same(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_runs, "FAN_IN", 2)
    check_restarts(tokenize, CONFIG, inputs, tmp_path)


def test_the_plan_tells_memory_by_workers_and_shard_size() -> None:
    (line,) = TokenizeConfig(shard_tokens=1 << 20).predict({}, workers=2)
    assert line.startswith("808.4 MB of memory at most, about (404.2 MB for each of 2 workers)")


def test_datasets_opens_the_shards(shards: Path, tmp_path: Path) -> None:
    files = {split: str(shards / f"{split}-*.parquet") for split in SPLITS}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    assert {split: dict(zip(*loaded[split][:].values(), strict=True)) for split in SPLITS} == tokens_by_id(
        shards
    )


def test_the_report_tells_bytes_a_token_and_tokens_a_word_by_source(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    """Two sources in one shard, by turns; a plain count over the same texts is the measure."""
    texts = {f"{'ab'[n % 2]}/{n}": prose(n, 30 + n) + "\u2028☃ " * (n % 3) for n in range(60)} | {"b/": ""}
    other = {**inputs, "documents": write_documents(tmp_path / "in", texts, shards=1)}
    metrics = tokenize(CONFIG, other, tmp_path / "out", LocalContext())
    tokenizer = load_tokenizer(inputs["tokenizer"])
    total = np.zeros(4, int)
    for source in "ab":
        mine = [text for id, text in texts.items() if id.startswith(source)]
        words = sum(len(re.findall(r"[^ \n]+", text)) for text in mine)
        size, tokens = (
            sum(len(text.encode()) for text in mine),
            sum(len(tokenizer.encode(text).ids) for text in mine),
        )
        row = (
            f"| {source} | {len(mine)} | {tokens + len(mine)} | {size / tokens:.3f} | {tokens / words:.3f} |"
        )
        assert row in (tmp_path / "out" / "report.md").read_text()
        assert metrics[f"tokens/{source}"] == tokens + len(mine)
        total += (len(mine), size, tokens, words)
    assert metrics["documents"] == total[0]
    assert metrics["bytes_per_token"] == total[1] / total[2]
    assert metrics["tokens_per_word"] == total[2] / total[3]


@given(st.lists(st.text(alphabet="a\x00 \n☃", max_size=9), max_size=6), st.integers(0, 3), st.integers(1, 7))
def test_words_are_what_stands_between_white_space(texts: list[str], skipped: int, block: int) -> None:
    column = pa.array(texts, pa.string())[skipped:]
    words = [re.findall(rb"[^\x00-\x20]+", text.encode()) for text in texts[skipped:]]
    assert count_words(column, block) == sum(map(len, words))


def test_a_document_keeps_its_split_when_others_come_or_go(
    inputs: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    fewer = {id: text for n, (id, text) in enumerate(TEXTS.items()) if n % 3}
    tokenize(
        CONFIG,
        {**inputs, "documents": write_documents(tmp_path / "in", fewer)},
        tmp_path / "out",
        LocalContext(),
    )
    before, after = tokens_by_id(shards), tokens_by_id(tmp_path / "out")
    for split in SPLITS:
        assert set(after[split]) == set(before[split]) & set(fewer)


def test_documents_are_shuffled_and_shards_hold_about_what_was_asked(shards: Path) -> None:
    train = list(tokens_by_id(shards)["train"])
    assert abs(np.corrcoef([list(TEXTS).index(id) for id in train], range(len(train)))[0, 1]) < 0.3
    sizes = [
        int(pq.read_schema(path).metadata[b"llmill.tokens"]) for path in TokenShards(shards, "train").paths
    ]
    assert len(sizes) == -(-sum(sizes) // 10_000)
    assert max(sizes) < 20_000


def test_row_groups_hold_about_their_size_and_long_documents_stay_whole(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    texts = {f"a/{n:03d}": prose(n, 3000) for n in range(200)}
    for name, more in (("short", {}), ("long", {"a/long": prose(999, 200_000)})):
        documents = write_documents(tmp_path / name, texts | more)
        config = TokenizeConfig(val_fraction=0.1)
        tokenize(config, {**inputs, "documents": documents}, tmp_path / f"{name}-out", LocalContext())
    sizes = [len(batch.tokens) for batch in TokenShards(tmp_path / "short-out", "train")]
    assert len(sizes) > 2
    assert all(0.9 < size / ROW_GROUP_TOKENS < 1.1 for size in sizes[:-1])
    assert len(tokens_by_id(tmp_path / "long-out")["train"]["a/long"]) > 200_000


def test_documents_longer_than_a_shard_leave_ranges_without_any_and_all_tokens_are_there(
    inputs: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    config = TokenizeConfig(val_fraction=0.1, shard_tokens=10)
    tokenize(config, inputs, tmp_path / "out", LocalContext())
    rows = [pq.read_metadata(path).num_rows for path in TokenShards(tmp_path / "out", "train").paths]
    assert len(rows) == sum(rows)
    assert 0 in rows
    assert tokens_by_id(tmp_path / "out") == tokens_by_id(shards)
    for split in SPLITS:
        one, other = TokenShards(tmp_path / "out", split), TokenShards(shards, split)
        assert np.array_equal(one.read_all(), other.read_all())
    files = {split: str(tmp_path / "out" / f"{split}-*.parquet") for split in SPLITS}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert len(loaded["train"]) == len(rows)


def test_empty_document_shards_change_nothing(inputs: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(inputs["documents"], tmp_path / "in")
    with write_shard(folder / "documents-00004.parquet"):
        pass
    train_tokenizer(
        TokenizerConfig(vocab_size=600), {"documents": folder}, tmp_path / "tokenizer", LocalContext()
    )
    assert sha256(tmp_path / "tokenizer") == sha256(inputs["tokenizer"])
    tokenize(CONFIG, {**inputs, "documents": folder}, tmp_path / "out", LocalContext())
    assert digests(tmp_path / "out") == digests(shards)


def test_a_killed_tokenize_ends_the_same_when_started_again(inputs: dict[str, Path], tmp_path: Path) -> None:
    check_restarts(tokenize, CONFIG, inputs, tmp_path)


def change_tokenizer(inputs: dict[str, Path], folder: Path, **pre_tokenizer: object) -> dict[str, Path]:
    """``inputs`` with a tokenizer whose `ByteLevel` or `Split` step is another one."""
    shutil.copytree(inputs["tokenizer"], folder)
    description = json.loads((folder / "tokenizer.json").read_text())
    for step in description["pre_tokenizer"]["pretokenizers"]:
        step |= {key: value for key, value in pre_tokenizer.items() if key in step}
    (folder / "tokenizer.json").write_text(json.dumps(description))
    return {**inputs, "tokenizer": folder}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"add_prefix_space": True}, "gigatoken gave other ids than tokenizers"),  # an option that it ignores
        ({"pattern": {"Regex": r"\p{L}+|\P{L}"}}, "gigatoken can't use this tokenizer"),  # a pattern it lacks
    ],
)
def test_where_gigatoken_differs_all_is_encoded_with_tokenizers_and_said(
    inputs: dict[str, Path], tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    changed = change_tokenizer(inputs, tmp_path / "tokenizer", **change)
    context = LocalContext()
    tokenize(CONFIG, changed, tmp_path / "out", context)
    assert len(context.notes) == 1
    assert reason in context.notes[0]
    assert reason in (tmp_path / "out" / "report.md").read_text()
    tokenizer = load_tokenizer(changed["tokenizer"])
    found = tokens_by_id(tmp_path / "out")
    for id, tokens in (found["train"] | found["val"]).items():
        assert tokens == [*tokenizer.encode(TEXTS[id]).ids, 0]


def test_where_gigatoken_fails_all_is_encoded_with_tokenizers_and_said(
    inputs: dict[str, Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """As pyo3 raises it."""

    def fail(texts: pa.Array) -> None:
        raise Panic("index out of bounds")

    monkeypatch.setattr(encode, "in_place", fail)
    context = LocalContext()
    tokenize(CONFIG, inputs, tmp_path / "out", context)
    assert "gigatoken failed: index out of bounds" in context.notes[0]
    assert tokens_by_id(tmp_path / "out") == tokens_by_id(shards)


def test_tokens_above_sixteen_bits_are_stored_in_thirty_two(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Every token of a text lies above the reserved ones."""
    config = TokenizerConfig(vocab_size=66_000, reserved_tokens=65_600)
    train_tokenizer(config, inputs, tmp_path / "tokenizer", LocalContext())
    changed = {**inputs, "tokenizer": tmp_path / "tokenizer"}
    context = LocalContext()
    tokenize(CONFIG, changed, tmp_path / "out", context)
    assert not context.notes
    flat = TokenShards(tmp_path / "out", "train").read_all()
    assert flat.dtype == np.uint32
    assert flat[flat > 0].min() > 65_600
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    first = next(iter(TokenShards(tmp_path / "out", "train")))
    assert tokenizer.decode(first.tokens[: first.offsets[1] - 1].tolist()) == TEXTS[first.ids[0]]


@pytest.mark.parametrize(
    ("fraction", "split", "advice"), [(1e-9, "val", "raise"), (1 - 1e-9, "train", "lower")]
)
def test_an_empty_split_is_a_mistake_with_advice(
    inputs: dict[str, Path], tmp_path: Path, fraction: float, split: str, advice: str
) -> None:
    with pytest.raises(
        UserError,
        match=f"none of the 201 documents fell into the {split} split: {advice} tokenize.val_fraction",
    ):
        tokenize(TokenizeConfig(val_fraction=fraction), inputs, tmp_path, LocalContext())


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_corrupt_shard_is_named_and_verify_is_suggested(shards: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(shards, folder)
    path = folder / "train-00000.parquet"
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"corrupt shard .*train-00000\.parquet") as told:
        TokenShards(folder, "train").read_all()
    assert "llmill verify" in str(told.value)


def test_a_corrupt_document_shard_stops_a_stage_by_name(inputs: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(inputs["documents"], tmp_path / "damaged")
    path = folder / "documents-00002.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"corrupt shard .*documents-00002\.parquet"):
        tokenize(CONFIG, {**inputs, "documents": folder}, tmp_path / "out", LocalContext())


def test_a_folder_without_shards_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no train shards"):
        TokenShards(tmp_path, "train")


def test_shards_of_two_tokenizers_are_not_mixed(
    shards: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(shards, tmp_path / "mixed")
    table = pq.read_table(folder / "train-00000.parquet")
    other = {**table.schema.metadata, b"llmill.tokenizer_sha256": b"another"}
    pq.write_table(table.replace_schema_metadata(other), folder / "train-00000.parquet")
    with pytest.raises(UserError, match="different tokenizers"):
        TokenShards(folder, "train")


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), max_size=6))
def test_a_token_is_appended_to_each_document(documents: list[list[int]]) -> None:
    offsets = np.cumsum([0, *map(len, documents)])
    flat = np.array([token for one in documents for token in one], np.uint32)
    longer, tokens = append_to_each((offsets, flat), 0)
    assert [tokens[start:end].tolist() for start, end in pairwise(longer)] == [[*one, 0] for one in documents]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), max_size=8), st.integers(0, 8), st.integers(1, 2000), st.integers(1, 30))
def test_the_bytes_of_a_document_shard_do_not_depend_on_how_rows_were_handed_over(
    cuts: list[int], singly: int, characters: int, rows: int
) -> None:
    """Rows as batches of any sizes, some of them one by one, against all one by one."""
    values = [[id, text[: len(id) * 30], id.split("/")[0], "{}"] for id, text in TEXTS.items()]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(documents, "ROW_GROUP_CHARACTERS", characters)
        patch.setattr(documents, "ROW_GROUP_ROWS", rows)
        one, other = Path(folder, "one"), Path(folder, "other")
        with write_shard(one) as writer:
            for row in values:
                writer.add(*row)
        with write_shard(other) as writer:
            ends = [min(len(values), end) for end in np.cumsum([0, *cuts])] + [len(values)]
            for number, (start, end) in enumerate(pairwise(ends)):
                if number == singly:
                    for row in values[start:end]:
                        writer.add(*row)
                else:
                    columns = zip(*values[start:end], strict=True) if end > start else [[]] * 4
                    writer.add_batch(pa.record_batch([pa.array(c, pa.string()) for c in columns], SCHEMA))
        assert one.read_bytes() == other.read_bytes()
        assert pq.ParquetFile(one).num_row_groups > 1
