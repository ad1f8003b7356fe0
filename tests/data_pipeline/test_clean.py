from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from corpora import check_restarts, digests, prose, read_documents, write_documents
from pydantic import ValidationError

from data_pipeline.clean import CleanConfig, clean
from data_pipeline.context import LocalContext, UserError
from data_pipeline.quality import GopherRules

OFF = dict.fromkeys(GopherRules.model_fields)


def test_every_document_is_kept_or_rejected_with_its_reason(tmp_path: Path) -> None:
    texts = {f"s/{n}": prose(n) for n in range(20)}
    texts |= {"s/short": "x", "s/long": prose(50, 1000), "s/numbers": "1 2 3 4 5 6 7 8 9 10"}
    source, out = write_documents(tmp_path / "in", texts), tmp_path / "out"
    config = CleanConfig(
        min_chars=2, max_chars=3000, gopher=GopherRules.model_validate(OFF | {"min_alphabetic_words": 0.8})
    )
    metrics = clean(config, {"download": source}, out, LocalContext())
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
        clean(CleanConfig(min_chars=5), {"download": source}, tmp_path / str(workers), LocalContext(workers))
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    names = [path.name for path in sorted(source.glob("*.parquet"))]
    assert [path.name for path in sorted((tmp_path / "1").glob("documents-*"))] == names


def test_a_killed_clean_ends_the_same_when_started_again(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "in", {f"s/{n}": prose(n, 30 + n) for n in range(30)})
    check_restarts(clean, CleanConfig(), {"download": source}, tmp_path)


def test_dropping_everything_is_a_mistake_that_names_the_reasons(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "in", {"s/1": "x", "s/2": "y"})
    with pytest.raises(UserError, match=r"clean dropped every document .dropped/min_chars 2.; loosen"):
        clean(CleanConfig(min_chars=5), {"download": source}, tmp_path / "out", LocalContext())


def test_length_bounds_out_of_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_chars 1 is below min_chars 5"):
        CleanConfig(min_chars=5, max_chars=1)
