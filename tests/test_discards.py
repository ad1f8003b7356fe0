"""Whatever a stage discards or leaves out is where a person looks: a real run, of which little is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Llmill
from corpora import prose
from mlflow import MlflowClient
from mlflow.entities import Run
from operator_api import Prefect

from data_pipeline.discards import by_reason, describe, warnings
from flows.listeners.terminal import Terminal

RECIPE = """\
name: little
download:
  sources:
    - {{name: crawl, kind: local, path: FOLDER}}
clean:
  gopher: null
  min_chars: 20
  masking: {{}}
dedup:
  spans: {{}}
pretrain: {{tokens: 1024, batch_tokens: 1024}}
"""
EMPTY, BROKEN = 90, 8
SAID = {
    "download": ["4 documents", "98 rejected (90 empty, 8 bad_json)", "4 left out (3 .pdf, 1 .exe)"],
    "clean": ["3 kept", "1 dropped (min_chars)", "1 masked (email)"],
    "dedup": ["2 kept", "1 removed (exact)"],
}
"""What is said of each stage wherever its result is shown."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred and two records of which four are documents: two alike, one short; and files of other kinds."""
    folder = tmp_path_factory.mktemp("crawl")
    texts = [prose(1), prose(1), f"{prose(2)} jane@example.com", "short", *[""] * EMPTY]
    lines = [*(json.dumps({"text": text}) for text in texts), *["{"] * BROKEN]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("a.pdf", "b.pdf", "c.PDF", "run.exe"):
        (folder / name).write_text("x")
    return folder


@pytest.fixture(scope="module")
def little(make_llmill, folder: Path) -> Llmill:
    return make_llmill(recipe=RECIPE.replace("FOLDER", str(folder)))


@pytest.fixture(scope="module")
def first(little: Llmill) -> str:
    """What the first run says."""
    return little.run("--to", "dedup").stdout


def check_said(output: str, of: dict[str, list[str]] = SAID) -> None:
    for stage, parts in of.items():
        lines = [line for line in output.splitlines() if f" {stage} " in f" {line} "]
        assert all(any(part in line for line in lines) for part in parts), (stage, parts, output)


def test_a_run_says_on_each_stages_line_and_in_the_summary_what_was_discarded(first: str) -> None:
    lines, _, summary = first.partition("result")
    check_said(lines)
    check_said(summary)
    assert "! download: 98 of 102 records are rejected (90 empty, 8 bad_json); see " in lines
    assert "! download: 4 of 5 files are left out (3 .pdf, 1 .exe); see " in lines


def test_plan_and_status_say_it_of_what_is_sealed(little: Llmill, first: str) -> None:
    check_said(little("plan", str(little.recipe)).stdout)
    check_said(little("status", "--artifacts").stdout)
    counts = {"rejected/empty": EMPTY, "rejected/bad_json": BROKEN, "left_out/.pdf": 3, "left_out/.exe": 1}
    planned = json.loads(little("plan", str(little.recipe), "--json").stdout)
    listed = json.loads(little("status", "--json").stdout)["sealed"]
    for entries in (planned, listed):
        assert counts.items() <= next(one for one in entries if one["stage"] == "download")["metrics"].items()


def test_files_that_are_left_out_are_said_before_a_run_and_as_they_are_now(
    little: Llmill, first: str, folder: Path
) -> None:
    assert (
        "4 left out (3 .pdf, 1 .exe)" in little("plan", str(little.recipe), "--home", f"{folder}-new").stdout
    )
    more = folder / "more.tar.lz4"
    more.write_text("x")
    try:
        again = little.run("--to", "dedup", "--set", "runtime.warn_rejected=1").stdout
    finally:
        more.unlink()
    check_said(again, SAID | {"download": ["(reused)", "5 left out (3 .pdf, 1 .exe, 1 .lz4)"]})
    assert "every step was reused" in again
    assert "!" not in again  # no share is above 1


def test_mlflow_has_it_of_the_stage_and_of_the_run(little: Llmill, first: str) -> None:
    client = MlflowClient(f"sqlite:///{little.home}/mlflow.db")
    experiment = client.get_experiment_by_name("little").experiment_id
    runs: list[Run] = client.search_runs([experiment], order_by=["attributes.start_time"])
    download = next(run for run in runs if run.info.run_name == "download")
    assert download.data.metrics["rejected/empty"] == EMPTY
    assert (
        runs[0].data.metrics.items()
        >= {
            "download/rejected/bad_json": BROKEN,
            "download/left_out/.pdf": 3,
            "clean/dropped/min_chars": 1,
            "dedup/removed/exact": 1,
        }.items()
    )
    check_said(runs[0].data.tags["mlflow.note.content"])


def test_the_flow_runs_page_has_it(little: Llmill, first: str, prefect_server: str) -> None:
    prefect = Prefect(prefect_server)
    found = prefect.post("artifacts/filter", artifacts={"key": {"any_": ["little-stages"]}})
    assert "98 rejected (90 empty, 8 bad_json)" in json.dumps(found)


def test_a_reason_of_any_characters_is_a_metric_and_what_is_rare_is_added_up() -> None:
    metrics = by_reason("left_out", {".[red]": 2, "..": 1, "a/b": 1, ".日本": 3})
    assert metrics == {"left_out/.日本": 3, "left_out/._red_": 2, "left_out/_..": 1, "left_out/a_b": 1}
    many = by_reason("left_out", {f".{number:03}": 1 for number in range(1000)})
    assert len(many) == 40
    assert many["left_out/others"] == 1000 - 39
    assert describe(many) == ["1,000 left out (961 others, 1 .000, 1 .001, 1 .002, 36 for 36 other reasons)"]


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"documents": 90, "rejected/empty": 10}, []),
        ({"documents": 89, "rejected/empty": 11}, ["11 of 100 records are rejected (empty)"]),
        ({"documents": 0, "rejected/empty": 1}, ["1 of 1 records are rejected (empty)"]),
        (
            {"documents": 100, "dropped/a": 30, "dropped/b": 21},
            ["51 of 100 documents are dropped (30 a, 21 b)"],
        ),
        ({"documents": 100, "dropped/a": 50}, []),
        ({"documents": 1000, "left_out/max_documents": 5000}, []),
    ],
)
def test_a_share_above_what_is_allowed_is_warned_of(metrics: dict[str, float], said: list[str]) -> None:
    assert warnings(metrics, {"rejected": 0.1, "left_out": 0.1, "dropped": 0.5}) == said


def test_hostile_reasons_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().step_ended("=", "download", describe({"rejected/[/x]": 1.0})[0], "blue")
    assert "1 rejected ([/x])" in capsys.readouterr().out
