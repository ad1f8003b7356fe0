"""What is delivered to MLflow is there once, however often it is sent; what it refuses holds nothing else up."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from forks import ROOT
from mlflow import MlflowClient
from postgres import postgres

from flows.engine.events import StepSealed, Told, TrainingStarted
from flows.engine.log import LogFile
from flows.engine.store import Store
from flows.listeners.mlflow.delivery import deliver, send_left, unsent, waiting
from flows.listeners.mlflow.findings import Finding
from flows.listeners.mlflow.operations import Away, Gone, Mlflow
from flows.listeners.mlflow.points import curve_points, event_points, is_drawn
from flows.listeners.mlflow.samples import tables_of
from flows.listeners.mlflow.translate import beginning, description
from flows.listeners.mlflow.uploads import Refused
from llm.training.events import EventLog

KEY = "0123456789abcdef"
RUN = {"run": KEY}
POINTS = [[f"train/loss{n % 3}", n / 7, 1_700_000_000_000 + n, n] for n in range(2500)]
DATASETS = [{"name": "dedup", "digest": "f00d", "source_type": "local", "source": "{}", "profile": "{}"}]
TOLD = [
    {"op": "begin", **beginning(KEY, "pretrain")},
    *description(KEY, {"lr": 0.1, "long": {str(n): n for n in range(150)}}, {"llmill.stage": "pretrain"}),
    {"op": "inputs", **RUN, "datasets": DATASETS},
    {"op": "metrics", **RUN, "points": POINTS},
    {"op": "metrics", **RUN, "points": [["nan", float("nan"), 1_700_000_000_000, 1]]},
    {"op": "text", **RUN, "name": "summary.md", "text": "ä"},
    {"op": "table", **RUN, "name": "samples.json", "columns": ["step", "text"], "data": [[1, "ä"], [2, "b"]]},
    {"op": "end", **RUN, "status": "FINISHED", "time": 1_700_000_009_000},
]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SQLite database whose tables are made: that takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return (folder / "mlflow.db").read_bytes()


@pytest.fixture
def mlflow(database: bytes, tmp_path: Path) -> Mlflow:
    (tmp_path / "mlflow.db").write_bytes(database)
    return Mlflow(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")


def events(operations: Iterable[dict]) -> list[Told]:
    return [Told(operation=operation) for operation in operations]


def log_of(home: Path, *operations: dict) -> LogFile:
    log = LogFile.begin(home, "small", "home")
    log.append(*events(operations))
    return log


def send(mlflow: Mlflow, *operations: dict) -> list[str]:
    """Why each operation was refused."""
    return [why for _, why in deliver(log_of(mlflow.home, *operations), mlflow)]


def runs(mlflow: Mlflow) -> list:
    client = MlflowClient(mlflow.uri)
    return client.search_runs([client.get_experiment_by_name("small").experiment_id])


def assert_there_once(mlflow: Mlflow) -> None:
    client, [run] = MlflowClient(mlflow.uri), runs(mlflow)
    assert (run.info.status, run.info.end_time, run.info.run_name) == (
        "FINISHED",
        TOLD[-1]["time"],
        "pretrain",
    )
    assert run.info.start_time == TOLD[0]["time"]
    found = [
        [point.key, point.value, point.timestamp, point.step]
        for name in ("train/loss0", "train/loss1", "train/loss2")
        for point in client.get_metric_history(run.info.run_id, name)
    ]
    assert sorted(found) == sorted(POINTS)
    assert len(client.get_metric_history(run.info.run_id, "nan")) == 1
    assert run.data.params == {"lr": "0.1", **{f"long.{n}": str(n) for n in range(150)}}
    assert [(one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs] == [
        ("dedup", "f00d")
    ]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["samples.json", "summary.md"]
    assert tables_of(run.data.tags) == ["samples.json"]


def test_a_log_sent_twice_and_from_the_middle_is_there_once(mlflow: Mlflow) -> None:
    for told in (TOLD, TOLD, TOLD[3:], TOLD[:5], TOLD[-1:]):
        assert set(send(Mlflow(mlflow.home, mlflow.uri), *told)) == {""}
    assert_there_once(mlflow)


@pytest.fixture(scope="module")
def on_postgres() -> Iterator[str]:
    with postgres() as address:
        yield f"{address}/postgres"


def test_so_it_is_on_postgresql(on_postgres: str, tmp_path: Path) -> None:
    mlflow = Mlflow(tmp_path, on_postgres)
    for told in (TOLD, TOLD[:5], TOLD[4:]):
        assert set(send(Mlflow(tmp_path, on_postgres), *told)) == {""}
    assert_there_once(mlflow)


def test_of_two_runs_that_one_request_made_the_empty_one_goes(mlflow: Mlflow) -> None:
    send(mlflow, *TOLD)
    client = MlflowClient(mlflow.uri)
    experiment = client.get_experiment_by_name("small").experiment_id
    client.create_run(experiment, tags={"llmill.key": KEY}, run_name="pretrain")  # came through late
    assert len(runs(mlflow)) == 2
    send(Mlflow(mlflow.home, mlflow.uri), TOLD[-1])
    assert_there_once(mlflow)


def test_what_is_refused_is_set_aside_and_the_rest_arrives(mlflow: Mlflow) -> None:
    bad = {"op": "metrics", **RUN, "points": [*POINTS[:100], ["what?", 1.0, 1, 1], *POINTS[100:]]}
    other = {"op": "params", **RUN, "params": {"lr": "another", "more": "1"}}
    both = {"op": "tags", **RUN, "tags": {"good": "yes", "": "nameless"}}
    log = log_of(mlflow.home, *TOLD[:4], bad, {"op": "unheard of"}, other, both, {"op": "end"}, *TOLD[5:])
    refused = {operation["op"]: why for operation, why in deliver(log, mlflow) if why}
    assert set(refused) == {"metrics", "log", "unheard of", "end"}
    assert "what?" in refused["metrics"]
    assert "lr" in refused["log"]
    assert "1 more" in refused["log"]
    kept = [json.loads(line) for line in log.refused.read_text().splitlines()]
    assert [line["op"] for line in kept] == ["metrics", "unheard of", "log", "end"]
    assert (kept[2]["params"], kept[2]["tags"]) == (other["params"], both["tags"])
    [run] = runs(mlflow)
    assert run.data.params["more"] == "1"
    assert run.data.tags["good"] == "yes"
    assert not unsent(log, Store(mlflow.home))
    client = MlflowClient(mlflow.uri)
    assert len(client.get_metric_history(run.info.run_id, "train/loss0")) == len(POINTS) // 3 + 1


@pytest.mark.parametrize("when", ["before", "amid"])
def test_what_a_deleted_experiment_is_to_be_told_waits_and_arrives_when_it_is_there_again(
    mlflow: Mlflow, when: str
) -> None:
    client = MlflowClient(mlflow.uri)
    experiment = client.create_experiment("small", (mlflow.home / "mlartifacts").as_uri())
    log, other = log_of(mlflow.home, *TOLD), LogFile.begin(mlflow.home, "other", "home")
    other.append(*events({**operation, "run": "2" * 16} for operation in TOLD))
    if when == "amid":
        for _ in range(3):
            next(deliver(log, mlflow))
    client.delete_experiment(experiment)
    began = time.monotonic()
    with pytest.raises(
        Gone, match=rf"mlflow experiments restore --experiment-id {experiment}`, then `llmill sync`"
    ):
        list(deliver(log, mlflow))
    assert not log.refused.exists()
    log.release()
    other.release()
    said = [why for _, why in send_left(mlflow.home, mlflow)]
    assert len(said) == 1
    assert "experiment small was deleted in MLflow" in said[0]
    assert not other.path.exists(), "another experiment's figures do not wait for it"
    assert time.monotonic() - began < 100
    client.restore_experiment(experiment)
    assert list(send_left(mlflow.home, mlflow)) == []
    assert_there_once(mlflow)
    assert not log.path.exists()


def test_a_mistake_of_ours_is_not_said_to_be_mlflows_and_holds_nothing_up(mlflow: Mlflow) -> None:
    wrong = [
        {"op": "end"},
        {"op": "metrics", **RUN, "points": [["a"]]},
        {"op": "artifact", **RUN, "stage": "clean"},
    ]
    log = log_of(mlflow.home, *TOLD[:3], *wrong, TOLD[-1])
    refused = [why for _, why in deliver(log, mlflow) if why]
    assert [why.partition(": ")[0] for why in refused] == ["a fault of llmill's own"] * 3
    assert [why.split(": ")[1] for why in refused] == ["KeyError", "ValueError", "KeyError"]
    assert [run.info.status for run in runs(mlflow)] == ["FINISHED"]
    assert len(log.refused.read_text().splitlines()) == 3


def test_runs_that_a_kill_left_open_are_ended_by_whoever_sends_what_is_left(mlflow: Mlflow) -> None:
    """Also where all that they had told was delivered."""
    stage = {"op": "begin", **beginning("1" * 16, "clean"), "parent": KEY}
    log = LogFile.begin(mlflow.home, "small", "home", lasts=True)
    log.append(*events([*TOLD[:3], stage]))
    list(deliver(log, mlflow))
    assert {run.info.status for run in runs(mlflow)} == {"RUNNING"}
    assert list(send_left(mlflow.home, mlflow)) == []
    assert {run.info.status for run in runs(mlflow)} == {"RUNNING"}, "its process lives"
    with open(log.path, "a") as file:
        file.write('{"event": "told", "operation": {"run": "torn')
    os.utime(log.path, (1_700_000_005, 1_700_000_005))
    log.release()
    assert list(send_left(mlflow.home, mlflow)) == []
    assert {(run.info.status, run.info.end_time) for run in runs(mlflow)} == {("KILLED", 1_700_000_005_000)}
    assert not log.path.exists()
    again = LogFile.begin(mlflow.home, "small", "home", lasts=True)
    again.append(*events([*TOLD[:1], {"op": "end", **RUN, "status": "FINISHED", "time": TOLD[-1]["time"]}]))
    again.release()
    assert list(send_left(mlflow.home, mlflow)) == []
    found = {run.data.tags["llmill.key"]: run.info.status for run in runs(mlflow)}
    assert found == {KEY: "FINISHED", "1" * 16: "KILLED"}


def test_a_sweep_that_is_killed_is_ended_too_and_one_that_ends_well_is_told_once(mlflow: Mlflow) -> None:
    killed, well = (Finding(mlflow.home, "small", "sweep", name, key=name * 16) for name in ("3", "4"))
    for finding in (killed, well):
        finding.hold()
        assert not finding.report({"llmill.sweep.settings": "pretrain.lr"})
    assert list(send_left(mlflow.home, mlflow)) == []
    assert {run.info.status for run in runs(mlflow)} == {"RUNNING"}
    assert not well.report({}, status="FINISHED")
    assert killed._held
    killed._held.release()  # as the system does when a process is killed
    assert list(send_left(mlflow.home, mlflow)) == []
    assert {run.info.run_name: run.info.status for run in runs(mlflow)} == {"3": "KILLED", "4": "FINISHED"}


def test_what_mlflows_client_reads_of_the_environment_is_set_in_one_place() -> None:
    places = [
        path
        for path in (ROOT / "flows").rglob("*.py")
        if "MLFLOW_HTTP_REQUEST_MAX_RETRIES" in path.read_text()
    ]
    assert places == [ROOT / "flows" / "listeners" / "mlflow" / "__init__.py"]


def test_a_run_that_was_deleted_is_not_asked_a_thousand_times(mlflow: Mlflow) -> None:
    send(mlflow, TOLD[0])
    [run] = runs(mlflow)
    MlflowClient(mlflow.uri).delete_run(run.info.run_id)
    with pytest.raises(Refused, match="active"):
        mlflow.report("small", TOLD[4])


def test_files_of_an_artifact_that_was_removed_are_told_of_by_a_tag(mlflow: Mlflow) -> None:
    name = {"stage": "clean", "fingerprint": "f00d", "payload_sha256": "0"}
    send(mlflow, TOLD[0], {"op": "artifact", **RUN, **name, "what": "about"})
    [run] = runs(mlflow)
    assert "removed before MLflow had them" in run.data.tags["llmill.files"]


def test_a_sealed_file_that_is_gone_is_told_of_and_holds_nothing_up(mlflow: Mlflow) -> None:
    store = Store(mlflow.home)
    folder, _ = store.begin("clean", "f00d", {})
    for name in ("kept.txt", "lost.txt"):
        (folder / name).write_text(name)
    artifact = store.seal(
        "clean", "f00d", {"config": {}, "inputs": {}, "metrics": {}, "finished": "2026-01-01"}
    )
    (artifact.path / "lost.txt").unlink()
    name = {"stage": "clean", "fingerprint": "f00d", "payload_sha256": artifact.payload_sha256}
    refused = send(mlflow, TOLD[0], {"op": "artifact", **RUN, **name, "what": "payload"}, TOLD[-1])
    assert [bool(why) for why in refused] == [False, True, False]
    assert "lost.txt" in refused[1]
    [run] = runs(mlflow)
    assert run.info.status == "FINISHED"
    files = MlflowClient(mlflow.uri).list_artifacts(run.info.run_id, "payload")
    assert [file.path for file in files] == ["payload/kept.txt"]


def test_of_two_values_of_a_param_the_first_stays_and_the_second_is_set_aside(mlflow: Mlflow) -> None:
    told = [{"op": "params", **RUN, "params": {"lr": value}} for value in ("1", "2")]
    refused = send(mlflow, TOLD[0], *told)
    assert [bool(why) for why in refused] == [False, False, True]
    [run] = runs(mlflow)
    assert run.data.params["lr"] == "1"


def test_a_run_that_was_deleted_in_the_middle_of_a_training_gets_its_earlier_points_when_it_goes_on(
    mlflow: Mlflow,
) -> None:
    send(mlflow, TOLD[0])
    [run] = runs(mlflow)
    client = MlflowClient(mlflow.uri)
    client.delete_run(run.info.run_id)
    events = Store(mlflow.home).partial("pretrain", "f00d") / "logs" / "events.jsonl"
    events.parent.mkdir(parents=True)
    lines = [
        json.dumps({"event": "step", "step": n, "time": 1.7e9 + n, "loss": n / 2}) + "\n" for n in range(9)
    ]
    events.write_text("".join(lines))
    seen = {"stage": "pretrain", "fingerprint": "f00d", "offset": sum(map(len, lines[:6]))}
    send(Mlflow(mlflow.home, mlflow.uri), {**TOLD[0], "seen": seen})
    [run] = runs(mlflow)
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [*range(6)]


def test_a_server_that_is_away_keeps_all_waiting_and_its_password_is_not_told(tmp_path: Path) -> None:
    log = log_of(tmp_path, *TOLD)
    mlflow = Mlflow(tmp_path, "http://user:hunter2@127.0.0.1:9")
    with pytest.raises(Away) as away:
        list(deliver(log, mlflow))
    assert "127.0.0.1" in str(away.value)
    assert "hunter2" not in str(away.value)
    assert len(list(waiting(log, Store(tmp_path)))) == len(TOLD)


def test_points_that_were_told_one_by_one_go_in_batches(mlflow: Mlflow) -> None:
    one_by_one = [{"op": "metrics", **RUN, "points": [point]} for point in POINTS]
    batches = 4  # of 2,501 points, 800 at a time
    assert len(send(mlflow, *TOLD[:4], *one_by_one, *TOLD[5:])) == 4 + batches + 3
    assert_there_once(mlflow)


def test_what_is_told_of_one_run_goes_together_as_much_as_mlflow_takes_of_each_kind(mlflow: Mlflow) -> None:
    few = [{"op": "params", **RUN, "params": {f"few.{n}": n}} for n in range(40)]
    few += [{"op": "tags", **RUN, "tags": {f"few.{n}": str(n)}} for n in range(40)]
    more = [{"op": "tags", **RUN, "tags": {f"more.{n}": str(n)}} for n in range(99)]
    points = {"op": "metrics", **RUN, "points": POINTS[:800]}
    assert send(mlflow, TOLD[0], *few, points, *more) == ["", "", ""]
    [run] = runs(mlflow)
    assert sum(name.startswith("few.") for name in run.data.params) == 40
    assert sum(name.startswith(("few.", "more.")) for name in run.data.tags) == 139
    history = MlflowClient(mlflow.uri).get_metric_history(run.info.run_id, "train/loss1")
    assert [point.step for point in history] == [n for n in range(800) if n % 3 == 1]


def test_a_run_whose_key_is_new_is_not_looked_for_until_making_it_failed(
    mlflow: Mlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, searched = MlflowClient.create_run, []

    def lose_the_answer(*arguments: object) -> None:
        assert not searched
        monkeypatch.setattr(MlflowClient, "create_run", create)
        create(*arguments)
        raise ConnectionError("the answer was lost")

    search = MlflowClient.search_runs

    def watched(client: MlflowClient, ids: list[str], condition: str, **options: int) -> list:
        searched.extend([condition] if KEY in condition else [])
        return search(client, ids, condition, **options)

    monkeypatch.setattr(MlflowClient, "search_runs", watched)
    monkeypatch.setattr(MlflowClient, "create_run", lose_the_answer)
    mlflow.fresh.add(KEY)
    with pytest.raises(Away, match="answer was lost"):
        send(mlflow, *TOLD)
    assert set(send(mlflow, *TOLD)) == {""}
    assert searched
    monkeypatch.undo()
    assert_there_once(mlflow)


def test_an_event_that_cannot_be_translated_is_set_aside_and_holds_nothing_up(mlflow: Mlflow) -> None:
    """A stage of somebody else's may return anything, and a file may be damaged."""
    names = {"stage": "clean", "step": "clean", "fingerprint": "f00d", "recipe": "small", "run": KEY}
    sealed = StepSealed(
        **names,
        key="1" * 16,
        how="ran",
        seconds=1.0,
        total_seconds=1.0,
        path="nowhere",
        size=1,
        metrics={"a": None},  # type: ignore[dict-item]
        payload_sha256="0",
        finished=1,
    )
    log = LogFile.begin(mlflow.home, "small", "home")
    log.append(*events(TOLD[:3]), sealed, *events(TOLD[3:]))
    refused = [why for _, why in deliver(log, mlflow) if why]
    assert len(refused) == 1
    assert "TypeError" in refused[0]
    assert json.loads(log.refused.read_text())["event"]["event"] == "step_sealed"
    assert_there_once(mlflow)


def test_samples_of_a_training_are_one_table_with_each_step_once(mlflow: Mlflow) -> None:
    """However the file was read until now, and whatever was rolled back; none where no text may be copied."""
    file = Store(mlflow.home).partial("pretrain", "f00d") / "logs" / "events.jsonl"
    events_of_training = EventLog(file)

    def write(step: int, text: str) -> None:
        samples = [{"prompt": "日", "text": f"{text} {step}"}]
        events_of_training.write("samples", step=step, tokens=100 * step, samples=samples)

    names = {"step": "pretrain", "stage": "pretrain", "fingerprint": "f00d", "key": KEY}
    log = LogFile.begin(mlflow.home, "small", "home")
    log.append(*events(TOLD[:1]), TrainingStarted(**names))
    for step in (1, 2, 3):
        write(step, "first\u2028")
    assert {why for _, why in deliver(log, mlflow)} == {""}
    events_of_training.write("rollback", step=3, to=1)
    write(2, "second")
    assert {why for _, why in deliver(log, mlflow)} == {""}
    [run] = runs(mlflow)
    client = MlflowClient(mlflow.uri)
    with open(client.download_artifacts(run.info.run_id, "samples.json"), encoding="utf-8") as table:
        assert json.load(table) == {
            "columns": ["step", "tokens", "prompt", "text"],
            "data": [[1, 100, "日", "first\u2028 1"], [2, 200, "日", "second 2"]],
        }
    quiet = LogFile.begin(mlflow.home, "small", "home")
    quiet.append(TrainingStarted(**names, quoting=False))
    assert "table" not in {operation["op"] for operation, _ in deliver(quiet, mlflow)}


def test_points_of_a_training_are_taken_from_whole_lines_only(mlflow: Mlflow) -> None:
    """Also where another training's file stands in place of the one that was read."""
    file = Store(mlflow.home).partial("pretrain", "f00d") / "logs" / "events.jsonl"
    file.parent.mkdir(parents=True)
    lines = [
        json.dumps({"event": "step", "step": n, "time": 1.7e9 + n, "loss": n / 2}) + "\n" for n in range(4)
    ]
    file.write_text("".join(lines))
    names = {"step": "pretrain", "stage": "pretrain", "fingerprint": "f00d", "key": KEY}
    log = LogFile.begin(mlflow.home, "small", "home")
    log.append(*events(TOLD[:1]), TrainingStarted(**names, offset=len(lines[0]) + 5))
    assert [why for _, why in deliver(log, mlflow) if why] == []
    with open(file, "a") as more:
        more.write(lines[0])
    assert [why for _, why in deliver(log, mlflow) if why] == []
    [run] = runs(mlflow)
    found = MlflowClient(mlflow.uri).get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in found] == [0, 2, 3]


def test_scores_of_a_training_are_curves_over_steps_and_over_tokens(mlflow: Mlflow) -> None:
    """On its own run over steps, on that of the whole recipe over both."""
    written = EventLog(Store(mlflow.home).partial("pretrain", "f00d") / "logs" / "events.jsonl")
    for step in (4, 8):
        scores = {"code/bits_per_byte": 8 / step, "order/gold_bits_per_byte": 4 / step, "order/accuracy": 0.5}
        written.write("scores", step=step, tokens=100 * step, **scores, seconds=0.25)
    names = {"step": "pretrain", "stage": "pretrain", "fingerprint": "f00d", "key": KEY, "run": "b" * 16}
    whole = {"op": "begin", **beginning("b" * 16, "whole")}
    log = LogFile.begin(mlflow.home, "small", "home")
    log.append(*events([whole, TOLD[0]]), TrainingStarted(**names))
    assert {why for _, why in deliver(log, mlflow)} == {""}
    client = MlflowClient(mlflow.uri)

    def curve(run: str, name: str) -> list[tuple[int, float]]:
        [found] = [one.info.run_id for one in runs(mlflow) if one.info.run_name == run]
        return [(point.step, point.value) for point in client.get_metric_history(found, name)]

    for name, values in (
        ("code/bits_per_byte", (2, 1)),
        ("order/gold_bits_per_byte", (1, 0.5)),
        ("order/accuracy", (0.5, 0.5)),
    ):
        over_steps = [*zip((4, 8), values, strict=True)]
        assert curve("pretrain", f"scores/{name}") == curve("whole", f"scores/{name}") == over_steps
        assert curve("whole", f"tokens/scores/{name}") == [*zip((400, 800), values, strict=True)]
    assert curve("pretrain", "scores/seconds") == [(4, 0.25), (8, 0.25)]
    assert curve("whole", "scores/seconds") == curve("whole", "scores/tokens") == []
    further = curve_points(
        "second", {"event": "scores", "step": 1, "tokens": 9, "time": 1.0, "a/accuracy": 1.0}
    )
    assert further == [
        ("second/scores/a/accuracy", 1.0, 1000, 1),
        ("second/tokens/scores/a/accuracy", 1.0, 1000, 9),
    ]


def test_a_sender_that_dies_amid_a_long_training_leaves_nothing_out(mlflow: Mlflow) -> None:
    """What MLflow takes in several requests is not noted as sent with the first one."""
    file = Store(mlflow.home).partial("pretrain", "f00d") / "logs" / "events.jsonl"
    file.parent.mkdir(parents=True)
    written = EventLog(file)
    for step in range(1, 257):
        written.write("step", step=step, tokens=100 * step, loss=1 / step, lr=0.1, grad_norm=1.0, mfu=0.5)
    names = {"step": "pretrain", "stage": "pretrain", "fingerprint": "f00d", "key": KEY, "run": "b" * 16}
    whole = {"op": "begin", **beginning("b" * 16, "whole")}
    log = LogFile.begin(mlflow.home, "small", "home")
    log.append(*events([whole, TOLD[0]]), TrainingStarted(**names))
    sending = deliver(log, mlflow)
    while (following := log.sent.get("following")) is None:
        next(sending)  # the two runs begin, and the first of three requests
    next(sending)
    assert log.sent["following"] == following
    sending.close()
    list(deliver(log, mlflow))
    client = MlflowClient(mlflow.uri)
    for run in runs(mlflow):
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert sorted(point.step for point in history) == [step for step in range(1, 257) if is_drawn(step)]
    assert log.sent["following"]["offset"] == file.stat().st_size


def test_what_is_logged_of_several_runs_in_turns_is_a_request_for_each(mlflow: Mlflow) -> None:
    other = {"run": "f" * 16}
    turns = [
        operation
        for n in range(20)
        for run in (RUN, other)
        for operation in (
            {"op": "metrics", **run, "points": [["loss", n, 1_700_000_000_000 + n, n]]},
            {"op": "tags", **run, "tags": {f"tag.{n}": str(n)}},
        )
    ]
    links = [{"op": "link", **RUN, "tag": "made by", "to": "", "id": "an id"},
             {"op": "link", **other, "tag": "beside", "to": KEY, "id": ""}]  # fmt: skip
    both = [TOLD[0], {"op": "begin", **beginning("f" * 16, "other")}]
    assert send(mlflow, *both, *turns, *links, TOLD[-1]) == [""] * 5
    found = {run.info.run_name: run for run in runs(mlflow)}
    client = MlflowClient(mlflow.uri)
    for run in found.values():
        history = client.get_metric_history(run.info.run_id, "loss")
        assert [point.step for point in history] == [*range(20)]
        assert sum(name.startswith("tag.") for name in run.data.tags) == 20
    assert found["pretrain"].data.tags["made by"] == "an id"
    assert found["other"].data.tags["beside"] == found["pretrain"].info.run_id


def test_of_a_long_training_each_curve_has_no_more_points_than_a_chart() -> None:
    fields = {"loss": 1.0, "update_ratio_matrices": 0.1, "eta_seconds": 9.0, "tokens": 1}
    points = [
        point
        for step in range(1, 10_001)
        for point in event_points({"event": "step", "step": step, "time": 1.0, **fields})
    ]
    steps = {name: [at for one, _, _, at in points if one == f"train/{name}"] for name in fields}
    assert steps["loss"] == [step for step in range(1, 10_001) if is_drawn(step)]
    assert len(steps["loss"]) == 526
    assert steps["update_ratio_matrices"][:10] == [*range(1, 9), 16, 24]
    assert steps["update_ratio_matrices"][-1] == steps["loss"][-1]
    assert not steps["eta_seconds"]
