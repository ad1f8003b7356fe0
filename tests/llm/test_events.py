from __future__ import annotations

from pathlib import Path

from llm.training.events import EventLog, read_events


def test_a_log_opened_again_drops_a_torn_line_and_tells_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "events.jsonl"
    first = EventLog(path)
    for step in (1, 2, 3):
        first.write("step", step=step)
    first.write("validation", step=2)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "step", "step": 4')
    again = EventLog(path)
    assert path.read_bytes() == whole
    again.write("resume", step=1)
    for step in (2, 3, 4):
        again.write("step", step=step)
        again.write("validation", step=step)
    told = [(event["event"], event["step"]) for event in read_events(path)]
    assert told[4:] == [("resume", 1), ("validation", 3), ("step", 4), ("validation", 4)]


def test_steps_after_a_rollback_are_told_again_and_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for step in (1, 2, 3, 4):
        log.write("step", step=step)
    log.write("rollback", step=4, to=2)
    log.write("step", step=2)
    log.write("step", step=3)
    again = EventLog(path)
    for step in (3, 4):
        again.write("step", step=step)
    told = [event["step"] for event in read_events(path) if event["event"] == "step"]
    assert told == [1, 2, 3, 4, 3, 4]


def test_every_event_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("step", step=1, loss=2.5)
    (event,) = read_events(tmp_path / "events.jsonl")
    assert (event["event"], event["step"], event["loss"]) == ("step", 1, 2.5)
    assert event["time"] > 1.7e9


def test_no_file_holds_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "none.jsonl") == []
