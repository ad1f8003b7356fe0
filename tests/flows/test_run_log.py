"""The laws of the run log: what was appended is there whole and in order, whatever was killed when; one sends it."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from flows.engine.events import KINDS, Event, Measured, Note, Progress, RunStarted, Told, read_event
from flows.engine.log import DAMAGED, LogFile, RunLog, logs, runs
from flows.engine.store import Store
from flows.listeners.mlflow.delivery import left_behind, waiting

OPERATIONS = [{"op": "text", "run": "r", "name": f"{number}.txt", "text": "ä\n"} for number in range(3)]
TOLD = [Told(operation=operation) for operation in OPERATIONS]
DYING = """
import os, signal, sys
from pathlib import Path
from flows.engine.events import Told
from flows.engine.log import LogFile
log = LogFile.begin(Path(sys.argv[1]), "small", "home")
log.append(Told(operation={"op": "text", "name": "whole"}))
with open(log.path, "ab") as file:
    file.write(b'{"op": "text", "na')
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def begin(home: Path) -> LogFile:
    return LogFile.begin(home, "small", "home")


def names(log: LogFile) -> list[str]:
    """The texts that MLflow has not been told."""
    return [operation["name"] for operation, _ in waiting(log, Store(log.folder)) if operation]


def test_what_is_appended_is_read_in_order_also_by_another_process_and_while_it_grows(tmp_path: Path) -> None:
    log = begin(tmp_path)
    log.append(*TOLD[:2])
    reader = LogFile(log.folder)
    growing = reader.events()
    assert next(growing)[0] == TOLD[0]
    log.append(*TOLD[2:])
    assert names(reader) == ["0.txt", "1.txt", "2.txt"]
    assert reader.head == {"schema": 1, "experiment": "small", "target": "home"}


def test_sending_goes_on_behind_the_offset_in_any_process(tmp_path: Path) -> None:
    log = begin(tmp_path)
    log.append(*TOLD)
    (_, first), (_, second), _ = log.events()
    log.note_sent({"offset": first})
    assert names(LogFile(log.folder)) == ["1.txt", "2.txt"]
    log.note_sent({"offset": second})
    assert names(LogFile(log.folder)) == ["2.txt"]
    (log.folder / "sent.json").write_text("")  # as a power cut may leave it: all is sent again
    assert names(LogFile(log.folder)) == ["0.txt", "1.txt", "2.txt"]


def test_the_line_that_a_kill_tore_is_no_event_and_what_was_whole_is(tmp_path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", DYING, str(tmp_path)], check=False)
    assert died.returncode == -9
    [log] = logs(tmp_path)
    assert not log.path.read_bytes().endswith(b"\n")
    with left_behind(tmp_path) as found:
        [left] = found
        assert names(left) == ["whole"]
        [(_, offset)] = left.events()
        left.note_sent({"offset": offset})
    with left_behind(tmp_path) as found:
        assert list(found) == []
    assert [path.name for path in runs(tmp_path).iterdir()] == [".left"]


def test_a_kill_before_the_first_line_leaves_nothing_that_stays(tmp_path: Path) -> None:
    log = begin(tmp_path)
    log.path.write_bytes(log.path.read_bytes()[:10])
    assert log.head == {}
    log.release()
    with left_behind(tmp_path) as found:
        assert list(found) == []
    assert logs(tmp_path) == []


def test_a_line_that_cannot_be_read_is_handed_on_as_damaged(tmp_path: Path) -> None:
    log = begin(tmp_path)
    log.append(*TOLD[:1])
    with open(log.path, "ab") as file:
        file.write(b'\x00\xff not JSON\n[1]\n{"event": "note"}\n')
    log.append(*TOLD[1:2])
    operations = [operation for operation, _ in waiting(log, Store(tmp_path)) if operation]
    assert [operation["op"] for operation in operations] == ["text", DAMAGED, DAMAGED, DAMAGED, "text"]
    assert "not JSON" in operations[1]["line"]


def test_the_log_of_a_run_at_work_is_taken_by_nobody_else(tmp_path: Path) -> None:
    log = begin(tmp_path)
    log.append(*TOLD)
    with left_behind(tmp_path) as found:
        assert list(found) == []
    look = (
        "import sys; from pathlib import Path; from flows.engine.log import LogFile;"
        "print(LogFile(Path(sys.argv[1])).claim())"
    )
    for expected in ("False", "True"):
        said = subprocess.run(
            [sys.executable, "-c", look, str(log.folder)], check=True, capture_output=True, text=True
        )
        assert said.stdout.strip() == expected
        log.release()


def test_an_append_that_the_disk_has_no_room_for_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = begin(tmp_path)
    log.append(*TOLD[:1])
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:20]))  # as a disk that fills up does
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            log.append(*TOLD[1:2])
    log.append(*TOLD[2:])
    assert names(log) == ["0.txt", "2.txt"]


def test_what_was_refused_stays_when_the_log_goes(tmp_path: Path) -> None:
    log = begin(tmp_path)
    log.refuse(OPERATIONS[0], "no")
    log.remove()
    assert logs(tmp_path) == []
    assert json.loads(log.refused.read_text()) == {"why": "no", **OPERATIONS[0]}


def test_what_an_older_version_left_for_mlflow_is_sent_from_where_it_was(tmp_path: Path) -> None:
    outbox = tmp_path / "runs" / "outbox"
    outbox.mkdir(parents=True)
    head = json.dumps({"experiment": "small", "target": "home"}) + "\n"
    lines = [json.dumps(operation) + "\n" for operation in OPERATIONS]
    (outbox / "20260101T000000.000000-aaaaaaaa.jsonl").write_text(head + "".join(lines))
    (outbox / "20260101T000000.000000-aaaaaaaa.position").write_text(str(len(head + lines[0])))
    with left_behind(tmp_path) as found:
        [left] = found
        assert left.head["experiment"] == "small"
        assert names(left) == ["1.txt", "2.txt"]
    assert list(outbox.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.kind)
def test_each_event_comes_back_from_its_line_and_what_is_unknown_is_passed_over(kind: type[Event]) -> None:
    values = {one.name: VALUES[str(one.type)] for one in dataclasses.fields(kind)}
    event = kind(**values)
    line = json.loads(json.dumps(event.as_json(), allow_nan=False))
    assert read_event({**line, "a field of another version": 1}) == event
    assert read_event({"event": "unheard_of", "time": 1}) is None


VALUES: dict[str, Any] = {
    "list[dict[str, str]]": [{"before": "ก่อน 🍞"}],
    "str": "दो 🍞\n",
    "int": 7,
    "float": 0.5,
    "float | None": None,
    "bool": True,
    "dict[str, str]": {"id": "1"},
    "dict[str, float]": {"loss": 1.5},
    "dict[str, Any]": {"op": "text"},
    "list[dict[str, Any]]": [{"step": "clean"}],
    "list[str]": ["env:HOOK"],
    "list[tuple[str, float, int, int]]": [["system/cpu", 1.0, 2, 3]],
}


def test_points_that_are_no_numbers_of_json_are_said_in_words() -> None:
    told = Measured(key="k", points=[("loss", float("nan"), 1, 2), ("norm", float("inf"), 1, 2)])
    assert [point[1] for point in told.as_json()["points"]] == ["nan", "inf"]


class Recorder:
    """A listener that keeps what it hears, and fails or waits at a kind of event."""

    def __init__(self, fails_at: str = "", waits_at: str = "") -> None:
        self.heard: list[Event] = []
        self.closed = False
        self.fails_at, self.waits_at = fails_at, waits_at
        self.may_go_on = threading.Event()

    def handle(self, event: Event) -> None:
        if event.kind == self.fails_at:
            raise KeyError("no such thing")
        if event.kind == self.waits_at:
            self.may_go_on.wait()
        self.heard.append(event)

    def close(self) -> None:
        self.closed = True


def test_a_listener_that_fails_or_waits_touches_neither_the_run_nor_the_others(tmp_path: Path) -> None:
    log = RunLog(begin(tmp_path))
    broken, slow, sound = Recorder(fails_at="progress"), Recorder(waits_at="run_started"), Recorder()
    for name, listener in {"the broken one": broken, "the slow one": slow, "the sound one": sound}.items():
        log.attach(name, listener)
    log.append(RunStarted(key="k", name="small", recipe="small"))
    log.append(Progress(step="clean", done=1, total=2, unit="shards"))
    log.note("on the way")
    kinds = [event.kind for event, _ in log.file.events()]
    assert kinds[0] == "run_started"
    assert "progress" not in kinds, "what is of the moment is not kept"
    slow.may_go_on.set()
    log.close()
    said = [event.text for event in sound.heard if isinstance(event, Note) and event.warning]
    assert said == ["the broken one fails and gets no more events of this run: KeyError: 'no such thing'"]
    assert [event.kind for event in broken.heard] == ["run_started"]
    assert [event.kind for event in slow.heard][:2] == ["run_started", "progress"]
    assert sound.closed


def test_a_log_that_cannot_be_written_to_is_warned_of_once_and_all_who_listen_hear_on(tmp_path: Path) -> None:
    log, listener = RunLog(begin(tmp_path)), Recorder()
    log.attach("who listens", listener)
    shutil.rmtree(log.file.folder)
    for number in range(3):
        log.note(f"{number}")
    log.close()
    texts = [event.text for event in listener.heard if isinstance(event, Note)]
    assert [text for text in texts if text.isdigit()] == ["0", "1", "2"]
    assert sum("can't be kept" in text for text in texts) == 1


def test_a_disk_that_was_full_for_a_while_loses_what_was_said_then_and_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, listener = RunLog(begin(tmp_path)), Recorder()
    log.attach("who listens", listener)
    assert log.append(Note(text="before"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: 0)
        assert not log.append(Note(text="meanwhile"))
        assert not log.append(Note(text="meanwhile"))
    assert log.append(Note(text="after"))
    log.close()
    kept = [event.text for event, _ in log.file.events() if isinstance(event, Note)]
    assert kept == ["before", "after"]
    heard = [event.text for event in listener.heard if isinstance(event, Note)]
    assert [text for text in heard if "kept" not in text] == ["before", "meanwhile", "meanwhile", "after"]
    assert sum("can't be kept" in text for text in heard) == 1


def test_what_is_said_when_the_file_was_removed_makes_no_new_one(tmp_path: Path) -> None:
    log, listener = RunLog(begin(tmp_path)), Recorder()
    log.attach("who listens", listener)
    log.file.refuse(OPERATIONS[0], "no")
    log.close()
    log.file.remove()
    assert not log.append(Note(text="late"))
    assert logs(tmp_path) == []
