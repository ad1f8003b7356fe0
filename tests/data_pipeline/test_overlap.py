"""How much of some texts stands in training documents, held to a count over words."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from corpora import digests, prose, write_documents
from plain_words import SYLLABLES, plain_words, run_of

from data_pipeline.clean.normalise import Form
from data_pipeline.hashing import hash_column
from data_pipeline.overlap import Corpus, Overlap, find_overlap
from data_pipeline.stage import LocalContext
from data_pipeline.tokenize.stage import TokenizeConfig

ALL = TokenizeConfig(val_fraction=1e-9)
ARABIC = "كان البيت القديم يقف قرب النهر وكانت السفن تمر أمام نافذته في كل صباح من فصل الشتاء الطويل"


def look(
    texts: Sequence[str], documents: Mapping[str, str], folder: Path, split: TokenizeConfig = ALL
) -> Overlap:
    corpus = Corpus(write_documents(folder / "documents", documents, shards=2), split)
    return find_overlap(texts, [corpus], folder / "scratch", LocalContext())


@pytest.mark.parametrize("script", SYLLABLES)
def test_texts_in_scripts_without_spaces_are_found(script: str, tmp_path: Path) -> None:
    draw = random.Random(script)
    before, item, after, other = ("".join(run_of(script, count, draw)) for count in (30, 16, 30, 40))
    found = look([item, other], {"s/0": prose(1), "s/1": before + item + after}, tmp_path)
    assert found.seen[0] == found.sought[0] > 0
    assert found.seen[1] == 0 < found.sought[1]


def test_punctuation_hides_nothing_and_another_word_does(tmp_path: Path) -> None:
    words = ARABIC.split()[:13]
    changed = [*words[:6], "كتاب", *words[7:]]
    documents = {"s/0": f"{prose(2)} {'، '.join(words)}. {prose(3)}", "s/1": prose(4)}
    found = look([" ".join(words), " ".join(changed)], documents, tmp_path)
    assert found.sought.tolist() == [1, 1]
    assert found.seen.tolist() == [1, 0]


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_a_text_is_found_in_documents_of_any_unicode_form(form: Form, tmp_path: Path) -> None:
    texts = [
        "L'ÉTÉ où les élèves du café “ﬁnal” y mangeaient déjà à huit heures",
        "ＦＵＬＬ　ｗｉｄｔｈ １２３ … two three four five six seven eight nine",
    ]
    documents = {
        f"s/{n}": unicodedata.normalize(form, f"{prose(n)} {text.lower()} {prose(9)}")
        for n, text in enumerate(texts)
    }
    found = look(texts, documents, tmp_path)
    assert found.sought.tolist() == found.seen.tolist() == [1, 1]


def test_a_short_text_is_sought_as_a_whole_and_a_shorter_one_is_not(tmp_path: Path) -> None:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota"]
    texts = [" ".join(words[:count]) for count in (7, 8, 9)] + [" ".join([*words[:8], "lambda"]), "", "..."]
    found = look(texts, {"s/0": f"{prose(1)} {' '.join(words)} {prose(2)}", "s/1": prose(3)}, tmp_path)
    assert found.sought.tolist() == [0, 1, 1, 1, 0, 0]
    assert found.seen.tolist() == [0, 1, 1, 0, 0, 0]


def test_every_count_is_that_of_comparing_words(tmp_path: Path) -> None:
    draw = random.Random(5)
    documents = {f"s/{number}": prose(number, 200) for number in range(12)}
    pieces = [text.split() for text in documents.values()]
    texts = []
    for number in range(60):
        words, other = draw.choice(pieces), prose(1000 + number, 40).split()
        at, count = draw.randrange(150), draw.randrange(1, 40)
        texts.append(" ".join([*other[: draw.randrange(15)], *words[at : at + count], *other[20:22]]))
    found = look(texts, documents, tmp_path)

    def windows(text: str) -> list[tuple[str, ...]]:
        words = [word for _, word in plain_words(text, joined=True)]
        width = min(13, len(words)) if len(words) >= 8 else 13
        return [tuple(words[at : at + width]) for at in range(len(words) - width + 1)]

    everything = [[word for _, word in plain_words(text, joined=True)] for text in documents.values()]
    stand = {
        tuple(words[at : at + width])
        for words in everything
        for width in range(8, 14)
        for at in range(len(words) - width + 1)
    }
    assert found.sought.tolist() == [len(windows(text)) for text in texts]
    assert found.seen.tolist() == [sum(one in stand for one in windows(text)) for text in texts]
    assert 0 < (found.seen > 0).sum() < (found.sought > 0).sum()
    assert found.size == sum(len(text.encode()) for text in documents.values())


def test_what_was_held_out_is_not_looked_at(tmp_path: Path) -> None:
    split = TokenizeConfig(val_fraction=0.5, seed=3)
    items = {f"s/{number}": prose(number, 30) for number in range(40)}
    held_out = hash_column(pa.array(items), split.salt) < split.held_out
    found = look([*items.values()], items, tmp_path, split)
    assert 5 < held_out.sum() < 35
    assert ((found.seen == 0) == held_out).all()
    assert ((found.seen == found.sought) == ~held_out).all()


def test_what_a_kill_left_is_used_and_workers_change_nothing(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Context(LocalContext):
        def map(self, fn, items, *, names=None):  # type: ignore[no-untyped-def]
            fn(items[0])
            raise Killed

    documents = write_documents(
        tmp_path / "in", {f"s/{number}": prose(number) for number in range(9)}, shards=3
    )
    texts, corpora = [prose(4, 40), prose(99, 40)], [Corpus(documents, ALL)]
    whole = find_overlap(texts, corpora, tmp_path / "whole", LocalContext())
    with pytest.raises(Killed):
        find_overlap(texts, corpora, tmp_path / "killed", Context())
    marker = tmp_path / "killed" / "corpus-0-documents-00000.json"
    before = marker.stat().st_mtime_ns
    resumed = find_overlap(texts, corpora, tmp_path / "killed", LocalContext(workers=2))
    assert marker.stat().st_mtime_ns == before
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert resumed.seen.tolist() == whole.seen.tolist()
    assert whole.seen[0] > 0 == whole.seen[1]
