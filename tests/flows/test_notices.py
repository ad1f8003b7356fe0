"""Whom a run tells of its end, and what is said."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from webhook import hook

from data_pipeline.core.errors import UserError
from flows.engine.events import RunEnded, RunStarted, StepReused
from flows.engine.store import Store
from flows.listeners.last_score import score_line
from flows.listeners.mlflow.delivery import left_behind
from flows.listeners.notices import Notice, NoticeListener, check_receivers, send_notice, unset_receivers


@pytest.mark.parametrize(
    "receiver", ["https://hooks.example/secret", "slack", "env:", "Slack/Team", "env:A-B"]
)
def test_what_is_no_receiver_is_refused_with_how_to_write_one(receiver):
    with pytest.raises(UserError, match="slack-webhook/team"):
        check_receivers([receiver])


def test_a_variable_that_is_not_set_is_warned_of_and_fails_no_run(monkeypatch):
    monkeypatch.delenv("LLMILL_TEST_HOOK", raising=False)
    check_receivers(["env:LLMILL_TEST_HOOK"])
    assert unset_receivers(["env:LLMILL_TEST_HOOK", "slack-webhook/team"]) == ["env:LLMILL_TEST_HOOK"]
    warnings: list[str] = []
    send_notice(Notice("small", "failed", "it failed"), ["env:LLMILL_TEST_HOOK"], warnings.append)
    assert warnings == [
        "env:LLMILL_TEST_HOOK could not be notified of the run's end: the variable is not set"
    ]
    monkeypatch.setenv("LLMILL_TEST_HOOK", "http://127.0.0.1:1")
    assert not unset_receivers(["env:LLMILL_TEST_HOOK"])


def test_a_receiver_that_cannot_be_told_is_warned_of_without_its_address(monkeypatch):
    monkeypatch.setenv("LLMILL_TEST_HOOK", "http://127.0.0.1:1/secret-path")
    warnings: list[str] = []
    send_notice(Notice("small", "failed", "it failed"), ["env:LLMILL_TEST_HOOK"], warnings.append)
    assert len(warnings) == 1
    assert "env:LLMILL_TEST_HOOK could not be notified" in warnings[0]
    assert "secret-path" not in warnings[0]


def test_the_text_for_people_holds_what_failed_its_log_and_the_command_that_resumes():
    notice = Notice(
        recipe="small",
        state="failed",
        summary="clean failed",
        stage="clean",
        log="line 1\nline 2",
        resume="llmill run small.yaml",
    )
    assert notice.subject == "llmill: small failed"
    assert notice.text == "clean failed\n```\nline 1\nline 2\n```\nresume with: llmill run small.yaml"


def evaluation(store: Store, name: str, bits: float, *, day: int = 1, **changes: Any) -> StepReused:
    """A sealed evaluation, as the run that reuses it reports it."""
    metrics = {"bits_per_byte": bits, "documents": 17.0, "bytes": 1000.0, **changes.pop("metrics", {})}
    about = {"config": {}, "inputs": {}, "recipe": "small", "step": "evaluate", **changes}
    store.begin("evaluate", name, {})
    sealed = store.seal("evaluate", name, {**about, "metrics": metrics, "finished": f"2026-01-0{day}"})
    return StepReused(
        step=about["step"], stage="evaluate", fingerprint=name, run="k", how="reused", seconds=0.0,
        path=str(sealed.path), metrics=metrics, finished=0,
    )  # fmt: skip


def test_a_score_stands_beside_that_of_the_model_before(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = evaluation(store, "aaaaaaaa11", 1.25)
    assert score_line(first, "small", store.root) == "bits per byte 1.2500 (first run)"
    evaluation(store, "bbbbbbbb11", 9.0, day=2, recipe="another")
    evaluation(store, "cccccccc11", 9.0, day=3, step="evaluate_base")
    better = score_line(evaluation(store, "dddddddd11", 1.24, day=4), "small", store.root)
    assert better == (
        "bits per byte 1.2400, 0.0100 lower (better) than the model before; "
        "`llmill compare aaaaaaaa dddddddd` says whether that is more than chance"
    )
    worse = score_line(evaluation(store, "eeeeeeee11", 1.26, day=5), "small", store.root)
    assert "0.0200 higher (worse) than the model before; `llmill compare dddddddd eeeeeeee`" in worse
    assert score_line(first, "small", store.root).endswith("(first run)"), "what came later is not before it"


def test_scores_on_other_texts_are_not_subtracted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    evaluation(store, "aaaaaaaa11", 1.25)
    other = evaluation(store, "bbbbbbbb11", 1.0, day=2, metrics={"bytes": 1001.0})
    said = score_line(other, "small", store.root)
    assert said == "bits per byte 1.0000; the model before had 1.2500, on other held-out texts"
    base = evaluation(store, "cccccccc11", 2.0, day=3, step="evaluate_base")
    assert score_line(base, "small", store.root) == "evaluate_base: bits per byte 2.0000 (first run)"
    nan = dataclasses.replace(base, metrics={"bits_per_byte": float("nan")})
    assert score_line(nan, "small", store.root) == ""


def test_the_notice_of_a_runs_end_has_its_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, told = Store(tmp_path), list[dict[str, Any]]()
    evaluation(store, "aaaaaaaa11", 1.25)
    with hook(told) as url:
        monkeypatch.setenv("LLMILL_TEST_HOOK", url)
        listener = NoticeListener(pytest.fail)
        listener.handle(RunStarted(**STARTED, store=str(store.root)))
        listener.handle(evaluation(store, "bbbbbbbb11", 1.5, day=2))
        listener.handle(RunEnded(key="k", status="FINISHED", seconds=1.0))
        listener.close()
    [notice] = told
    assert notice["bits_per_byte"] == {"evaluate": 1.5}
    assert notice["score"].startswith("bits per byte 1.5000, 0.2500 higher (worse)")
    assert (notice["state"], notice["summary"]) == ("completed", "evaluate reused")


STARTED: dict[str, Any] = {
    "key": "k", "name": "small 1", "recipe": "small", "command": "llmill run small.yaml",
    "notify": ["env:LLMILL_TEST_HOOK"],
}  # fmt: skip
DYING = """
import json, os, signal, sys
from pathlib import Path
from flows.engine.events import Linked, RunStarted, StepStarted
from flows.engine.log import LogFile
log = LogFile.begin(Path(sys.argv[1]), "small", "home", lasts=True)
log.append(RunStarted(**json.loads(sys.argv[2])), Linked(url="http://mlflow/run"))
log.append(StepStarted(step="pretrain", stage="pretrain", fingerprint="f", key="s", run="k"))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_who_finds_a_killed_run_reports_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    died = subprocess.run([sys.executable, "-c", DYING, str(tmp_path), json.dumps(STARTED)], check=False)
    assert died.returncode == -9
    told: list[dict[str, Any]] = []
    with hook(told) as url:
        monkeypatch.setenv("LLMILL_TEST_HOOK", url)
        for _ in range(2):  # MLflow is not sent anything, so the log stays
            with left_behind(tmp_path, pytest.fail) as found:
                assert len(list(found)) == 1
    [notice] = told
    assert (notice["state"], notice["stage"], notice["resume"]) == ("killed", "pretrain", STARTED["command"])
    assert notice["summary"] == "its process was killed in pretrain; what is sealed or saved is kept"
    assert notice["subject"] == "llmill: small killed"
    assert notice["mlflow_url"] == "http://mlflow/run"


def test_who_ends_a_killed_run_and_cannot_report_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of Prefect's is not to be had where there is no Prefect; none is started for it."""
    monkeypatch.delenv("LLMILL_TEST_HOOK", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    started = STARTED | {"notify": ["env:LLMILL_TEST_HOOK", "slack-webhook/team"]}
    subprocess.run([sys.executable, "-c", DYING, str(tmp_path), json.dumps(started)], check=False)
    warnings: list[str] = []
    with left_behind(tmp_path, warnings.append) as found:
        assert len(list(found)) == 1
    assert [one.partition(" could not")[0] for one in warnings] == started["notify"]
