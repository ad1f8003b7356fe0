from __future__ import annotations

import gzip
import json
import random
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import digests, prose, write_documents
from plain_words import SYLLABLES, run_of
from pydantic import ValidationError

from data_pipeline.clean.decontaminate import Contamination, Decontamination, EvaluationSet
from data_pipeline.clean.stage import CleanConfig, clean
from data_pipeline.core.errors import UserError
from data_pipeline.core.pinned_files import pin
from data_pipeline.stage import LocalContext

QUESTION = "Which of the ships that lay in the harbour that winter didn't belong to the captain's brother?"
WORDS = QUESTION.split()  # 17 words: 5 windows of 13


def contamination(path: Path, *, fields: tuple[str, ...] = ("text",), **rules: object) -> Contamination:
    chosen = Decontamination.model_validate(
        rules | {"sets": {"quiz": EvaluationSet(path=path, fields=fields)}}
    )
    return Contamination(chosen, pin([path], "sets"), "NFC")


def found(sets: Contamination, *texts: str) -> list[tuple[int, str, str]]:
    return [*sets.find(pa.array(texts))]


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    (tmp_path / "quiz.jsonl").write_text(
        json.dumps({"question": QUESTION, "choices": ["yes", "no"], "n": 1})
        + "\n\n"
        + json.dumps({"question": "Too short to be looked for?", "choices": None, "n": 2})
    )
    return tmp_path / "quiz.jsonl"


def test_thirteen_words_in_common_drop_a_document_and_twelve_do_not(quiz: Path) -> None:
    sets = contamination(quiz, fields=("question",))
    twelve = prose(1) + " " + " ".join(WORDS[:12]) + " " + prose(2)
    thirteen = prose(1) + " " + " ".join(WORDS[:13]) + " " + prose(2)
    assert found(sets, twelve, thirteen) == [
        (1, "contaminated/quiz", "which of the ships that lay in the harbour that winter didnt belong")
    ]


@pytest.mark.parametrize("script", SYLLABLES)
def test_items_in_scripts_without_spaces_are_found_inside_a_text(script: str, tmp_path: Path) -> None:
    draw = random.Random(script)
    before, item, after, other = ("".join(run_of(script, count, draw)) for count in (30, 16, 30, 90))
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"question": item}))
    sets = contamination(tmp_path / "quiz.jsonl", fields=("question",))
    assert [row for row, _, _ in found(sets, other, before + item + after, before + after)] == [1]


def test_case_punctuation_and_line_breaks_hide_nothing(quiz: Path) -> None:
    disguised = "\n".join(f"“{word.upper()},” -" for word in WORDS)
    assert len(found(contamination(quiz, fields=("question",)), disguised)) == 1


def test_as_many_matches_as_asked_for_drop_a_document_and_one_fewer_does_not(quiz: Path) -> None:
    four, five = " ".join(WORDS[:16]), " ".join(WORDS)
    sets = contamination(quiz, fields=("question",), min_matches=5)
    assert [row for row, _, _ in found(sets, four, five)] == [1]


def test_the_part_of_a_document_that_must_match_spares_a_book_that_quotes(quiz: Path) -> None:
    exactly = QUESTION + " x" * 5  # 10 windows, of which 5 match
    sets = contamination(quiz, fields=("question",), min_fraction=0.5)
    assert [row for row, _, _ in found(sets, exactly, exactly + " x", QUESTION)] == [0, 2]


def test_items_too_short_are_counted_and_not_looked_for(quiz: Path) -> None:
    sets = contamination(quiz, fields=("question", "choices"))
    assert sets.describe() == [("quiz", 4, 3, 5)]
    assert found(sets, "Too short to be looked for? yes no") == []
    assert [
        row
        for row, _, _ in found(
            contamination(quiz, fields=("question",), ngram=6), "too short to be looked for"
        )
    ] == [0]


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl.gz", "parquet"])
def test_sets_are_read_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"quiz.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": [["no", QUESTION], None]}), path)
    else:
        text = json.dumps({"text": QUESTION}) if "jsonl" in kind else f"1. {QUESTION}\n"
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    assert len(found(contamination(path), QUESTION)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": 1}', r"set.jsonl:2: 'text' holds int, not text"),
        ('{"text": "a"}\n{"txt": "a"}', r"set.jsonl:2: no field 'text'; there are 'txt'"),
        ('{"text": "a"', r"set.jsonl:1: no valid JSON"),
        ('["a"]', r"set.jsonl:1: expected a JSON object"),
        ('{"text": ["a", "\\ud800"]}', r"set.jsonl:1: 'text' holds half a surrogate pair"),
    ],
)
def test_a_broken_set_is_an_error_that_names_file_and_line(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "set.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        contamination(tmp_path / "set.jsonl")


def test_a_set_of_another_kind_or_broken_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"quiz.csv is neither of .txt, .jsonl, .parquet"):
        EvaluationSet(path=Path("quiz.csv"))
    (tmp_path / "set.parquet").write_text("no")
    with pytest.raises(UserError, match=r"set.parquet can't be read as Parquet"):
        contamination(tmp_path / "set.parquet")


def test_the_report_names_the_sets_and_the_ngram_that_was_found(tmp_path: Path, quiz: Path) -> None:
    (tmp_path / "other.txt").write_text(prose(7))
    rules = Decontamination(
        sets={
            "quiz": EvaluationSet(path=quiz, fields=("question",)),
            "other": EvaluationSet(path=tmp_path / "other.txt"),
        }
    )
    texts = {
        "s/0": prose(1),
        "s/1": f"{prose(2)} {QUESTION}",
        "s/2": prose(7),
        "s/3": f"{QUESTION} {prose(7)}",
    }
    source = write_documents(tmp_path / "in", texts)
    metrics = clean(
        CleanConfig(gopher=None, decontamination=rules),
        {"documents": source},
        tmp_path / "out",
        LocalContext(),
    )
    assert (metrics["kept"], metrics["dropped/contaminated/quiz"], metrics["dropped/contaminated/other"]) == (
        1,
        1,
        2,
    )
    report = (tmp_path / "out/report.md").read_text()
    assert "| quiz | 2 | 1 | 5 |" in report
    assert "| s/1 | [which of the ships that lay in the harbour that winter didnt belong] " in report


def test_a_set_in_another_unicode_form_is_found(tmp_path: Path) -> None:
    text = "L'été où le café du port fermait à huit heures, les élèves y mangeaient déjà là"
    (tmp_path / "quiz.txt").write_text(unicodedata.normalize("NFD", text))
    assert len(found(contamination(tmp_path / "quiz.txt"), unicodedata.normalize("NFC", text))) == 1


def two_sets(folder: Path, names: list[str], **rules: object) -> CleanConfig:
    """One set holds the beginning of what the other one holds."""
    (folder / "part.txt").write_text(" ".join(WORDS[:15]))
    (folder / "whole.txt").write_text(QUESTION)
    sets = {name: {"path": folder / f"{name}.txt"} for name in names}
    return CleanConfig(gopher=None, decontamination=Decontamination.model_validate(rules | {"sets": sets}))


@pytest.mark.parametrize("names", [["part", "whole"], ["whole", "part"]])
def test_what_stands_in_two_sets_counts_for_both(tmp_path: Path, names: list[str]) -> None:
    for least, reason in ((3, "part"), (4, "whole"), (5, "whole")):
        config = two_sets(tmp_path, names, min_matches=least).resolve()
        assert config.decontamination
        sets = Contamination(config.decontamination, config.files.sets, "NFC")
        assert [name for _, name, _ in found(sets, QUESTION)] == [f"contaminated/{reason}"]


def test_the_order_of_the_sets_in_a_recipe_is_of_no_account(tmp_path: Path) -> None:
    one, other = (two_sets(tmp_path, names).resolve() for names in (["part", "whole"], ["whole", "part"]))
    assert one.identity() == other.identity()
    source = write_documents(tmp_path / "in", {"s/0": prose(1), "s/1": QUESTION})
    for name, config in (("one", one), ("other", other)):
        clean(config, {"documents": source}, tmp_path / name, LocalContext())
    assert digests(tmp_path / "one") == digests(tmp_path / "other")


def test_a_set_counts_by_its_content_and_how_it_is_read_and_not_by_its_place(tmp_path: Path) -> None:
    identities = []
    for name in ("a.txt", "b.txt", "c.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": QUESTION}))
        sets = {"quiz": EvaluationSet(path=tmp_path / name)}
        identities.append(CleanConfig(decontamination=Decontamination(sets=sets)).resolve().identity())
    assert identities[0] == identities[1] != identities[2]
    assert str(tmp_path) not in json.dumps(identities)
