"""The journal's laws: what was appended is there whole and in order, whatever was killed when; one sends at a time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.listeners.mlflow.delivery import left_behind
from flows.listeners.mlflow.journal import DAMAGED, Journal, journals, outbox

OPERATIONS = [{"op": "text", "run": "r", "name": f"{number}.txt", "text": "ä\n"} for number in range(3)]
DYING = """
import os, signal, sys
from pathlib import Path
from flows.listeners.mlflow.journal import Journal, outbox
journal = Journal.begin(outbox(Path(sys.argv[1])), "small", "home")
journal.append([{"op": "text", "name": "whole"}])
with open(journal.path, "ab") as file:
    file.write(b'{"op": "text", "na')
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def begin(home: Path) -> Journal:
    return Journal.begin(outbox(home), "small", "home")


def names(journal: Journal) -> list[str]:
    return [operation["name"] for operation, _ in journal.waiting()]


def test_what_is_appended_is_read_in_order_also_by_another_process_and_while_it_grows(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    journal.append(OPERATIONS[:2])
    reader = Journal(journal.path)
    growing = reader.waiting()
    assert next(growing)[0] == OPERATIONS[0]
    journal.append(OPERATIONS[2:])
    assert names(reader) == ["0.txt", "1.txt", "2.txt"]
    assert reader.head == {"experiment": "small", "target": "home"}


def test_delivery_goes_on_behind_the_position_in_any_process(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    journal.append(OPERATIONS)
    (_, first), (_, second), _ = journal.waiting()
    journal.delivered(first)
    assert names(Journal(journal.path)) == ["1.txt", "2.txt"]
    journal.delivered(second)
    assert names(Journal(journal.path)) == ["2.txt"]
    journal.path.with_suffix(".position").write_text(
        ""
    )  # as a power cut may leave it: all is delivered again
    assert names(Journal(journal.path)) == ["0.txt", "1.txt", "2.txt"]


def test_the_line_that_a_kill_tore_is_no_operation_and_what_was_whole_is(tmp_path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", DYING, str(tmp_path)], check=False)
    assert died.returncode == -9
    [journal] = journals(tmp_path)
    assert not journal.path.read_bytes().endswith(b"\n")
    with left_behind(tmp_path) as found:
        [left] = found
        assert names(left) == ["whole"]
        [(_, position)] = left.waiting()
        left.delivered(position)
    with left_behind(tmp_path) as found:
        assert list(found) == []
    assert [path.name for path in outbox(tmp_path).iterdir()] == [".left.lock"]


def test_a_kill_before_the_first_line_leaves_nothing_that_stays(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    journal.path.write_bytes(journal.path.read_bytes()[:10])
    assert journal.head == {}
    journal.release()
    with left_behind(tmp_path) as found:
        assert list(found) == []
    assert journals(tmp_path) == []


def test_a_line_that_cannot_be_read_is_handed_on_as_damaged(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    journal.append(OPERATIONS[:1])
    with open(journal.path, "ab") as file:
        file.write(b"\x00\xff not JSON\n[1]\n")
    journal.append(OPERATIONS[1:2])
    operations = [operation for operation, _ in journal.waiting()]
    assert [operation["op"] for operation in operations] == ["text", DAMAGED, DAMAGED, "text"]
    assert "not JSON" in operations[1]["line"]


def test_the_journal_of_a_run_at_work_is_taken_by_nobody_else(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    journal.append(OPERATIONS)
    with left_behind(tmp_path) as found:
        assert list(found) == []
    look = (
        "import sys; from pathlib import Path; from flows.listeners.mlflow.journal import Journal;"
        "print(Journal(Path(sys.argv[1])).claim())"
    )
    for expected in ("False", "True"):
        said = subprocess.run(
            [sys.executable, "-c", look, str(journal.path)], check=True, capture_output=True, text=True
        )
        assert said.stdout.strip() == expected
        journal.release()


def test_an_append_that_the_disk_has_no_room_for_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begin(tmp_path)
    journal.append(OPERATIONS[:1])
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:20]))  # as a disk that fills up does
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            journal.append(OPERATIONS[1:2])
    journal.append(OPERATIONS[2:])
    assert names(journal) == ["0.txt", "2.txt"]


def test_what_was_refused_stays_when_the_journal_goes(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    journal.refuse(OPERATIONS[0], "no")
    journal.remove()
    assert journals(tmp_path) == []
    assert json.loads(journal.refused.read_text()) == {"why": "no", **OPERATIONS[0]}
