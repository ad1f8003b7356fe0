from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpora import check_restarts, digests, prose, read_documents, write_documents
from pydantic import ValidationError

from data_pipeline.clean.blocklists import Blocklists
from data_pipeline.clean.c4 import C4Rules
from data_pipeline.clean.decontaminate import Decontamination, EvaluationSet
from data_pipeline.clean.fineweb import FineWebRules
from data_pipeline.clean.language import LanguageRules
from data_pipeline.clean.masking import Masking
from data_pipeline.clean.quality import GopherRules
from data_pipeline.clean.report import Tally
from data_pipeline.clean.stage import CleanConfig, clean
from data_pipeline.core.errors import UserError
from data_pipeline.documents import write_shard
from data_pipeline.stage import LocalContext

OFF = dict.fromkeys(GopherRules.model_fields)


def test_every_document_is_kept_or_rejected_with_its_reason(tmp_path: Path) -> None:
    texts = {f"s/{n}": prose(n) for n in range(20)}
    texts |= {"s/short": "x", "s/long": prose(50, 1000), "s/numbers": "1 2 3 4 5 6 7 8 9 10"}
    source, out = write_documents(tmp_path / "in", texts), tmp_path / "out"
    config = CleanConfig(
        min_chars=2, max_chars=3000, gopher=GopherRules.model_validate(OFF | {"min_alphabetic_words": 0.8})
    )
    metrics = clean(config, {"documents": source}, out, LocalContext())
    kept = read_documents(out)
    rejected = {
        row["id"]: row["reason"] for path in out.glob("rejected/*") for row in pq.read_table(path).to_pylist()
    }
    assert rejected == {
        "s/short": "min_chars",
        "s/long": "max_chars",
        "s/numbers": "min_alphabetic_words",
    }
    assert kept == {id: text for id, text in texts.items() if id not in rejected}
    assert (metrics["documents"], metrics["kept"], metrics["dropped/max_chars"]) == (23, 20, 1)
    assert "| s/numbers | 1 2 3 4 5 6 7 8 9 10 |" in (out / "report.md").read_text()


def test_a_shard_goes_out_for_each_that_comes_in_and_worker_count_changes_nothing(tmp_path: Path) -> None:
    source = write_documents(
        tmp_path / "in", {f"s/{n}": prose(n) for n in range(9)} | {"t/0": "x"}, shards=10
    )
    for workers in (1, 2):
        clean(CleanConfig(min_chars=5), {"documents": source}, tmp_path / str(workers), LocalContext(workers))
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    names = [path.name for path in sorted(source.glob("*.parquet"))]
    assert [path.name for path in sorted((tmp_path / "1").glob("documents-*"))] == names


def test_a_killed_clean_ends_the_same_when_started_again(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "in", {f"s/{n}": prose(n, 30 + n) for n in range(30)})
    check_restarts(clean, CleanConfig(), {"documents": source}, tmp_path)


def test_dropping_everything_is_a_mistake_that_names_the_reasons(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "in", {"s/1": "x", "s/2": "y"})
    with pytest.raises(UserError, match=r"clean dropped every document .dropped/min_chars 2.; loosen"):
        clean(CleanConfig(min_chars=5), {"documents": source}, tmp_path / "out", LocalContext())


def test_length_bounds_out_of_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_chars 1 is below min_chars 5"):
        CleanConfig(min_chars=5, max_chars=1)


def everything(folder: Path) -> CleanConfig:
    """All rules on, with files."""
    (folder / "hosts.txt").write_text("bad.example\n")
    (folder / "phrases.txt").write_text("brass doorbell\n")
    (folder / "quiz.txt").write_text(prose(3))
    lists = Blocklists(urls=(folder / "hosts.txt",), phrases=(folder / "phrases.txt",))
    sets = {"quiz": EvaluationSet(path=folder / "quiz.txt")}
    return CleanConfig(
        blocklists=lists,
        language=LanguageRules(min_score=0.3),
        c4=C4Rules(),
        fineweb=FineWebRules(),
        decontamination=Decontamination(sets=sets),
        masking=Masking(),
    )


def messy_documents(folder: Path) -> Path:
    texts = {f"s/{n}": prose(n, 60 + n) for n in range(12)}
    texts["s/12"] = prose(12) + "\n\nMenu\n\nWrite to someone who is at a@b.example.\r\n"
    texts["s/13"] = prose(13) + " The brass doorbell was played in the house."
    texts |= {
        "t/0": "The ship of the captain is in the harbour.",
        "t/1": "der Hund und die Katze waren im Haus. " * 9,
        "t/2": prose(5) + " { }",
    }
    return write_documents(folder, texts, shards=2)


def test_all_rules_together_end_the_same_on_any_workers_and_after_any_kill(tmp_path: Path) -> None:
    source, config = messy_documents(tmp_path / "in"), everything(tmp_path).resolve()
    check_restarts(clean, config, {"documents": source}, tmp_path / "killed")
    for workers in (1, 2):
        clean(config, {"documents": source}, tmp_path / str(workers), LocalContext(workers))
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_the_page_of_numbers_adds_up(tmp_path: Path) -> None:
    source, config = messy_documents(tmp_path / "in"), everything(tmp_path)
    metrics = clean(config, {"documents": source}, tmp_path / "out", LocalContext())
    dropped = {name: count for name, count in metrics.items() if name.startswith("dropped/")}
    assert dropped == {
        "dropped/blocked_phrase": 1,
        "dropped/c4_curly_brackets": 1,
        "dropped/contaminated/quiz": 1,
        "dropped/language": 1,
        "dropped/min_words": 1,
    }
    assert metrics["documents"] == metrics["kept"] + sum(dropped.values()) == 17
    assert (metrics["masked/email"], metrics["lines_removed/no_terminal_mark"]) == (1, 1)
    kept = read_documents(tmp_path / "out")
    assert kept["s/12"].endswith("\n\nWrite to someone who is at <EMAIL>.")
    assert "Menu" not in kept["s/12"]
    assert metrics["bytes_out"] == sum(len(text.encode()) for text in kept.values())

    figures = json.loads((tmp_path / "out/report.json").read_text())
    groups = [one for reasons in figures["sources"].values() for one in reasons.values()]
    for name, key in (("documents", "documents"), ("bytes_in", "bytes_in"), ("bytes_out", "bytes_out")):
        assert sum(one[key] for one in groups) == metrics[name]
    assert figures["sources"]["t"].keys() == {"c4_curly_brackets", "language", "min_words"}
    for name, bins in figures["histograms"].items():
        assert sum(bins["documents"]) == 17 or name == "language score"
        assert sum(bins["kept"]) == metrics["kept"]


def test_a_value_falls_into_the_bin_that_begins_at_or_below_it() -> None:
    tally = Tally()
    values = np.array([0, 0.0999, 0.1, 1, np.nan])
    tally.add_values({"alphabetic words": values}, np.array([True, False, True, True, True]))
    assert tally.histograms["alphabetic words"] == [[2, 1, *[0] * 8, 1], [1, 1, *[0] * 8, 1]]


def test_a_text_with_markup_shows_in_the_report_and_hides_nothing_of_it(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "in", {"s/1": "<!-- a | b", "s/2": prose(1)})
    clean(CleanConfig(gopher=None), {"documents": source}, tmp_path / "out", LocalContext())
    assert "| s/1 | \\<!-- a \\| b |" in (tmp_path / "out/report.md").read_text()


def notes_of(tmp_path: Path, config: CleanConfig, metas: dict[str, str]) -> list[str]:
    """The notes of a run over documents with these metas, by id."""
    context = LocalContext()
    with write_shard(tmp_path / "in/documents-00000.parquet") as writer:
        for id, meta in metas.items():
            writer.add(id, prose(len(id)), id.split("/")[0], meta)
    clean(config, {"documents": tmp_path / "in"}, tmp_path / "out", context)
    return context.notes


def test_rules_that_can_match_nothing_in_a_run_say_so(tmp_path: Path) -> None:
    for name, content in {
        "hosts.txt": "bad.example\n",
        "ids.txt": "books/old.txt#3\n",
        "empty.txt": "# nothing yet\n",
        "quiz.txt": "too short",
    }.items():
        (tmp_path / name).write_text(content)
    lists = Blocklists(
        urls=(tmp_path / "hosts.txt",), ids=(tmp_path / "ids.txt",), phrases=(tmp_path / "empty.txt",)
    )
    sets = Decontamination(sets={"quiz": EvaluationSet(path=tmp_path / "quiz.txt")})
    rules = CleanConfig(gopher=None, blocklists=lists, decontamination=sets)
    notes = notes_of(tmp_path, rules, {"s/1": '{"title": "x"}', "s/12": "{}"})
    assert [note.split(" can match nothing: ")[0] for note in notes] == [
        "clean.blocklists.phrases",
        "clean.decontamination.sets.quiz",
        "clean.blocklists.urls",
        "clean.blocklists.ids",
    ]
    assert "meta_fields" in notes[2]


def test_rules_that_could_have_matched_are_silent(tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("bad.example\n")
    (tmp_path / "ids.txt").write_text("s/9\n")
    lists = Blocklists(urls=(tmp_path / "hosts.txt",), ids=(tmp_path / "ids.txt",))
    rules = CleanConfig(gopher=None, blocklists=lists)
    assert not notes_of(tmp_path, rules, {"s/1": "{}", "s/12": '{"url": "https://good.example/"}'})
