from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import check_restarts, digests, prose, read_documents, write_documents
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_pipeline.core.errors import UserError
from data_pipeline.documents import shard_paths
from data_pipeline.stage import LocalContext
from data_pipeline.tokenize.encode import load_encoder
from data_pipeline.train_tokenizer import stage as module
from data_pipeline.train_tokenizer.stage import PATTERNS, TokenizerConfig, draw_sample, train_tokenizer
from data_pipeline.train_tokenizer.tokenizer import end_of_text, load_tokenizer, sha256, token_bytes

CONFIG = TokenizerConfig(vocab_size=600)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = {f"s/{n}": prose(n) for n in range(60)} | {"s/snow": "naïve déjà vu ☃ 東京 1234567"}
    return write_documents(tmp_path_factory.mktemp("documents"), texts)


@pytest.fixture(scope="module")
def folder(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CONFIG, {"documents": documents}, out, LocalContext())
    return out


TEXT = st.text(alphabet=st.characters(codec="utf-8")) | st.sampled_from(
    [
        "<|endoftext|>",
        "a<|endoftext|>b",
        "<|reserved_0|>",
        "x\r\n\r\n  y\t",
        "don't I'LL ſ'S",
        "\x00\ufeff\u2028",
    ]
)


@given(st.lists(TEXT, max_size=5).map("".join))
def test_any_text_comes_back_from_its_tokens_and_yields_no_special_token(folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    special = range(len(CONFIG.special_tokens))
    assert not set(ids) & set(special)
    assert token_bytes(folder)[ids].sum() == len(text.encode())


MARKED = ["किताब", "हिन्दी", "เป็นน้ำ", "தமிழ்", "বাংলা", "e\u0301te\u0301", "שָׁלוֹם", "မြန်မာ", "ភាសាខ្មែរ"]


@pytest.mark.parametrize("pattern", [None, *PATTERNS, r"[\p{L}\p{M}]+|\s+|[^\s\p{L}\p{M}]+"])
def test_the_pattern_can_be_chosen_and_by_default_marks_stay_with_their_letters(
    documents: Path, tmp_path: Path, pattern: str | None
) -> None:
    chosen = {"pattern": pattern} if pattern else {}
    config = TokenizerConfig(vocab_size=300, **chosen)
    train_tokenizer(config, {"documents": documents}, tmp_path, LocalContext())
    tokenizer = load_tokenizer(tmp_path)
    pieces = tokenizer.pre_tokenizer[0].pre_tokenize_str(" ".join(MARKED))
    whole = [piece.strip() for piece, _ in pieces if piece.strip()] == MARKED
    assert whole == (pattern not in ("gpt2", "cl100k"))
    text = " ".join(MARKED) + " CamelCase don't 12345 --\n\n  x"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    column = pa.array([text])
    slow = load_encoder("tokenizers", tmp_path)(column)
    assert slow[1].tolist() == tokenizer.encode(text).ids
    if pattern is None or pattern in PATTERNS:
        fast = load_encoder("gigatoken", tmp_path)(column)
        assert [part.tolist() for part in fast] == [part.tolist() for part in slow]


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [("gpt4", "neither of gpt2, cl100k, o200k"), ("(", "no regular expression"), ("", "neither")],
)
def test_a_pattern_that_is_neither_a_name_nor_a_regular_expression_is_refused(
    pattern: str, fault: str
) -> None:
    with pytest.raises(ValidationError, match=rf"pattern\n.*{fault}"):
        TokenizerConfig(pattern=pattern)


@given(st.lists(st.lists(TEXT, max_size=5).map("".join), min_size=1, max_size=4))
def test_gigatoken_gives_the_ids_of_tokenizers_on_any_text(folder: Path, texts: list[str]) -> None:
    column = pa.array(texts, pa.string())
    fast, slow = (load_encoder(name, folder)(column) for name in ("gigatoken", "tokenizers"))
    assert [part.tolist() for part in fast] == [part.tolist() for part in slow]


def test_a_text_that_spells_a_special_token_would_yield_it_without_our_care(folder: Path) -> None:
    """What `load_tokenizer` and `load_encoder` guard against is real."""
    careless = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert careless.encode("a<|endoftext|>b").ids.count(end_of_text(load_tokenizer(folder))) == 1


def test_the_same_documents_give_the_same_bytes_whatever_shards_threads_or_hash_seeds(
    documents: Path, folder: Path, tmp_path: Path
) -> None:
    items = [(f"s/{n}", prose(n)) for n in range(60)] + [("s/snow", "naïve déjà vu ☃ 東京 1234567")]
    random.Random(3).shuffle(items)
    write_documents(tmp_path / "in", items, shards=5)
    program = (
        "import sys; from pathlib import Path; from data_pipeline.stage import LocalContext\n"
        "from data_pipeline.train_tokenizer.stage import *\n"
        "source, out = map(Path, sys.argv[1:])\n"
        "train_tokenizer(TokenizerConfig(vocab_size=600), {'documents': source}, out, LocalContext())"
    )
    for threads, source in ((1, documents), (4, tmp_path / "in")):
        out = tmp_path / str(threads)
        environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(threads)}
        subprocess.run([sys.executable, "-c", program, str(source), str(out)], env=environment, check=True)
        assert digests(out) == digests(folder)


def test_a_killed_training_ends_the_same_when_started_again(documents: Path, tmp_path: Path) -> None:
    check_restarts(train_tokenizer, CONFIG, {"documents": documents}, tmp_path)


def test_the_sample_is_bounded_and_its_seed_changes_it(documents: Path, tmp_path: Path) -> None:
    metrics = {}
    for seed in (0, 1):
        config = TokenizerConfig(vocab_size=300, sample_bytes=5000, seed=seed)
        metrics[seed] = train_tokenizer(
            config, {"documents": documents}, tmp_path / str(seed), LocalContext()
        )
        assert 5000 <= metrics[seed]["sample_bytes"] < 6000
    assert sha256(tmp_path / "0") != sha256(tmp_path / "1")


@pytest.mark.parametrize("margin", [1e-9, 0.3, 1e9])
def test_how_far_is_looked_for_the_sample_does_not_change_it(
    documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, margin: float
) -> None:
    """Whether the first look finds nothing, too little, or all."""
    config = TokenizerConfig(vocab_size=300, sample_bytes=5000)
    expected = draw_sample(config, shard_paths(documents), tmp_path / "expected", LocalContext()).to_pylist()
    monkeypatch.setattr(module, "MARGIN", margin)
    found = draw_sample(config, shard_paths(documents), tmp_path / "found", LocalContext()).to_pylist()
    assert found == expected
    assert sum(map(len, found[:-1])) < 5000 <= sum(len(text.encode()) for text in found)


def test_texts_are_read_only_where_the_sample_needs_them(
    documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts of all row groups but those of the sample are damaged, and nobody notices."""
    monkeypatch.setattr("data_pipeline.documents.ROW_GROUP_ROWS", 1)
    texts = read_documents(documents)
    copy = write_documents(tmp_path / "damaged", texts)
    config = TokenizerConfig(vocab_size=300, sample_bytes=3000)
    monkeypatch.setattr(module, "MARGIN", 1.0)
    drawn = set(draw_sample(config, shard_paths(copy), tmp_path / "first", LocalContext()).to_pylist())
    looked_at = {
        id
        for run in (tmp_path / "first").glob("*.arrow")
        for id in pa.ipc.open_file(run).read_all()["id"].to_pylist()
    }
    damaged = 0
    for path in shard_paths(copy):
        footer, data = pq.read_metadata(path), bytearray(path.read_bytes())
        ids = pq.read_table(path, columns=["id"])["id"].to_pylist()
        for group, id in enumerate(ids):
            column = footer.row_group(group).column(1)
            if id not in looked_at:
                data[column.data_page_offset - 2] ^= 0xFF  # the end of the page that holds the text
                damaged += 1
        path.write_bytes(data)
    assert damaged > 40
    again = draw_sample(config, shard_paths(copy), tmp_path / "second", LocalContext()).to_pylist()
    assert set(again) == drawn
    with pytest.raises(UserError, match=r"corrupt shard .*documents-0000"):
        draw_sample(TokenizerConfig(vocab_size=300), shard_paths(copy), tmp_path / "all", LocalContext())


def test_special_tokens_come_first_and_every_other_entry_has_its_bytes(folder: Path) -> None:
    tokenizer, sizes = load_tokenizer(folder), token_bytes(folder)
    assert tokenizer.get_vocab_size() == 600 == len(sizes)
    assert end_of_text(tokenizer) == 0
    assert sizes[: len(CONFIG.special_tokens)].tolist() == [0] * 8
    assert sizes[8:264].tolist() == [1] * 256
    assert sizes[264:].min() >= 2


def test_transformers_loads_the_folder_and_agrees(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.eos_token == "<|endoftext|>"
    assert loaded.eos_token_id == loaded.bos_token_id == 0
    text = prose(3) + " naïve ☃"
    assert loaded(text)["input_ids"] == load_tokenizer(folder).encode(text).ids
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_the_folder_encodes_text_that_spells_a_special_token_as_we_do(folder: Path) -> None:
    loaded, text = AutoTokenizer.from_pretrained(folder), "a<|endoftext|>b <|reserved_0|>"
    ids = load_tokenizer(folder).encode(text).ids
    assert loaded(text)["input_ids"] == loaded.encode(text) == loaded([text])["input_ids"][0] == ids
    assert loaded.decode(ids) == text
    asked = loaded(text, split_special_tokens=False)["input_ids"]
    assert asked.count(loaded.eos_token_id) == 1
    assert loaded(text)["input_ids"] == ids


@pytest.mark.timeout(120)
def test_long_words_cost_what_their_letters_cost_and_are_reported(tmp_path: Path) -> None:
    """Each word takes the square of its length unless it is cut: 10^12 steps."""
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000)
    texts = {f"s/{n}": prose(n) for n in range(60)} | {"s/long": "".join(letters), "s/dashes": "-" * 1000}
    texts |= {"s/limit": "ü" * 256, "s/lines": "word\n" * 1000}
    source, context = write_documents(tmp_path / "in", texts), LocalContext()
    metrics = train_tokenizer(
        TokenizerConfig(vocab_size=400), {"documents": source}, tmp_path / "out", context
    )
    assert metrics["long_words"] == 2
    assert [note for note in context.notes if note.startswith("2 words of more than 256 characters")]
    tokenizer = load_tokenizer(tmp_path / "out")
    ids = tokenizer.encode("a" * 1000).ids
    assert tokenizer.decode(ids) == "a" * 1000


def test_a_vocabulary_larger_than_the_text_supports_is_a_mistake_with_advice(
    documents: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"support a vocabulary of \d+ entries, not 50000: lower train_tokenizer.vocab_size"
    ):
        train_tokenizer(
            TokenizerConfig(vocab_size=50_000), {"documents": documents}, tmp_path, LocalContext()
        )


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"vocab_size 260 is below 264"):
        TokenizerConfig(vocab_size=260)


def test_a_damaged_tokenizer_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:100])
    with pytest.raises(UserError, match=r"can't load the tokenizer .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"can't load the tokenizer .*tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")
