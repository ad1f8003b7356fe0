"""A text that is taken out is nowhere any more: not in the store, nor in any copy that MLflow has, wherever that is."""

from __future__ import annotations

import gzip
import html
import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import Llmill
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow_server import Server
from moto.server import ThreadedMotoServer

from data_pipeline.core.errors import UserError
from data_pipeline.documents import write_shard
from flows.compare.heat import span
from flows.engine.context import training_started
from flows.engine.events import (
    Event,
    Note,
    RunEnded,
    RunStarted,
    StepFailed,
    StepSealed,
    StepStarted,
    TrainingStarted,
)
from flows.engine.store import Artifact, Store
from flows.gc import remove, select
from flows.lineage.search import search
from flows.listeners.mlflow.delivery import Following
from flows.listeners.mlflow.links import tracking_uri
from flows.listeners.mlflow.listener import MlflowListener, begin_log
from flows.listeners.mlflow.operations import Mlflow
from flows.listeners.mlflow.translate import operations
from flows.stages import DEFAULT, WITH_TEXTS
from llm.training.events import EventLog

SENTENCES = {
    "english": 'Her grandmother\'s recipe for quince & walnut bread was never written "down", she said\nat last.',
    "chinese": "她祖母的榅桲核桃面包食谱从来没有写下来，她终于说。",
    "thai": "สูตรขนมปังควินซ์และวอลนัทของคุณยายไม่เคยถูกจดไว้เลย เธอพูดในที่สุด",
    "arabic": "لم تُكتب وصفة خبز السفرجل والجوز الخاصة بجدتها قط، قالت أخيرًا.",
    "hindi": "उसकी दादी की रोटी की विधि कभी लिखी नहीं गई, उसने आखिर में कहा।",
    "code": "def quince(walnuts):\n\treturn [bread for bread in walnuts if bread <= 3 and '\\n' not in bread]",
    "emoji": "Grandmother's quince bread 🍞🥜 was never 👵🏽 written down 🤷‍♀️",
}
TEXT = "\n".join(SENTENCES.values())
CHAIN = ("download", "clean", "evaluate", "export")


def seal(store: Store, stage: str, *sources: Artifact) -> Artifact:
    """An artifact that holds the text as its stage would."""
    name = f"{DEFAULT.index(stage):016x}"
    inputs = {
        one.stage: {"stage": one.stage, "fingerprint": one.fingerprint, "payload_sha256": one.payload_sha256}
        for one in sources
    }
    out, _ = store.begin(stage, name, {})
    with write_shard(out / "documents-00000.parquet") as writer:
        writer.add("her#0", TEXT, "her", "{}")
    pq.write_table(pa.table({"bits_per_byte": [1.0]}), out / "documents.parquet")
    (out / "report.md").write_text(f"| example |\n|---|\n| {TEXT[:100]} |\n")
    (out / "samples.jsonl").write_text(json.dumps({"prompt": SENTENCES["chinese"], "text": TEXT}) + "\n")
    (out / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "dtype": "float32"}')
    manifest = {
        "config": {},
        "recipe": "small",
        "inputs": inputs,
        "metrics": {"parameters": 1.0, "logits_max_abs_difference": 0.0, "bits_per_byte": 1.0},
        "finished": "2026-01-01T00:00:00.000+00:00",
        "seconds": 1.0,
        "mlflow_run_id": "",
        "mlflow_key": "",
    }
    return store.seal(stage, name, manifest)


def told(home: Path, withheld: bool = False) -> list[Artifact]:
    """A line of artifacts, each made from the one before and told MLflow as a run does; one stage failed before."""
    store, log = Store(home), begin_log(home, "small")
    listener, heard = MlflowListener(home, "small", log), Heard()
    log.attach("MLflow", listener)
    log.attach("the test", heard)
    log.append(RunStarted(key="run-1", name="small", recipe="small"))
    sealed: list[Artifact] = []
    for stage in [one for one in CHAIN if not withheld or one in WITH_TEXTS]:
        name = f"{DEFAULT.index(stage):016x}"
        inputs = [
            {
                "stage": one.stage,
                "fingerprint": one.fingerprint,
                "path": str(one.path),
                "metrics": one.metrics,
            }
            for one in sealed[-1:]
        ]
        names = {"step": stage, "stage": stage, "fingerprint": name, "key": f"{stage}-1", "recipe": "small"}
        started = StepStarted(**names, run="run-1", inputs=inputs)
        if stage == "clean":
            log.append(started)
            failed = StepFailed(step=stage, key=started.key, message=f"can't read {TEXT}", status="FAILED")
            log.append(failed)
        log.append(started)
        sealed.append(seal(store, stage, *sealed[-1:]))
        log.append(sealed_event(names, sealed[-1], withheld))
    results = [
        {"step": one.stage, "stage": one.stage, "fingerprint": one.fingerprint, "how": "ran", "seconds": 1.0}
        for one in sealed
    ]
    ended = RunEnded(
        key="run-1",
        status="FINISHED",
        seconds=1.0,
        message=TEXT,
        description="Bread.",
        results=results,
        quoting=not withheld,
    )
    log.append(ended)
    log.close()
    assert not listener.failure
    assert not heard.warnings
    return sealed


def sealed_event(names: dict[str, str], artifact: Artifact, withheld: bool) -> StepSealed:
    return StepSealed(
        **names,
        run="run-1",
        how="ran",
        seconds=1.0,
        total_seconds=1.0,
        path=str(artifact.path),
        size=artifact.size,
        metrics=artifact.metrics,
        payload_sha256=artifact.payload_sha256,
        finished=1,
        withheld=withheld,
        upload_bytes=1e9,
    )


class Heard:
    """Keeps what a run warns of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def handle(self, event: Event) -> None:
        if isinstance(event, Note) and event.warning:
            self.warnings.append(event.text)

    def close(self) -> None:
        return


@pytest.fixture(params=["home", "server", "s3"])
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home whose MLflow is a file in it, or a server that keeps files itself, or one whose files are in a bucket."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if request.param == "home":
        yield home
        return
    server, bucket = Server(tmp_path), ThreadedMotoServer(port=0, verbose=False)
    if request.param == "server":
        server.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    else:
        bucket.start()
        in_bucket(bucket, f"sqlite:///{tmp_path}/elsewhere.db", monkeypatch)
    try:
        yield home
    finally:
        server.kill()
        if request.param == "s3":
            bucket.stop()


def in_bucket(server: ThreadedMotoServer, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an MLflow at ``uri`` keep its files in a bucket of an S3 server."""
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}",
        "MLFLOW_TRACKING_URI": uri,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=settings["MLFLOW_S3_ENDPOINT_URL"]).create_bucket(Bucket="mlflow")
    MlflowClient(uri).create_experiment("small", "s3://mlflow/files")


def test_what_gc_removes_is_gone_from_mlflow_too_wherever_that_keeps_it(home: Path) -> None:
    download, *made = told(home)
    client = MlflowClient(tracking_uri(home))
    experiment = client.get_experiment_by_name("small").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    client.delete_run(runs["clean"].info.run_id)  # as a person does, who thinks that its files go with it
    before = search(home, list(SENTENCES.values()))
    assert not before.unread
    for stage in CHAIN:
        assert any(runs[stage].info.run_id in place for place in before.places), stage
        assert any(f"store/{stage}/" in place for place in before.places), stage
    with pytest.raises(
        UserError, match=r"models:/small/1 \(candidate\) was exported from what would go.*--models"
    ):
        select(Store(home), [download.fingerprint])
    found = select(Store(home), [download.fingerprint], models=True)
    assert [one.key[0] for one in found.candidates] == list(CHAIN[::-1])
    assert {left for _, left in remove(Store(home), found)} == {""}

    for sentence in SENTENCES.values():
        after = search(home, [sentence])
        assert (after.places, after.unread) == ([], [])
    assert not list(Path(home).rglob("*.parquet"))
    assert not client.search_model_versions("name = 'small'")
    assert not client.search_logged_models([experiment])
    left = client.search_runs([experiment], run_view_type=ViewType.ALL)
    assert {run.info.run_id for run in left} == {run.info.run_id for run in runs.values()}
    for run in left:
        if "llmill.stage" in run.data.tags:
            assert run.data.tags["llmill.files"].startswith("removed by llmill gc on 20")
            assert run.data.metrics["bits_per_byte"] == 1, "figures stay"
            assert not client.list_artifacts(run.info.run_id)
    assert client.get_run(runs["clean"].info.run_id).info.lifecycle_stage == "deleted"
    note = next(run.data.tags for run in left if "llmill.stage" not in run.data.tags)["mlflow.note.content"]
    assert note.startswith("1 bits per byte\n\nBread.")
    assert "| export | ran |" in note
    with pytest.raises(UserError, match="there is none"):
        select(Store(home), [made[0].fingerprint])


def test_copies_of_what_is_here_no_more_are_found_with_all_that_was_made_from_it(tmp_path: Path) -> None:
    sealed = told(tmp_path)
    for one in sealed[1:]:
        for path in sorted(one.path.rglob("*"), reverse=True):
            path.unlink()
        one.path.rmdir()
    found = select(Store(tmp_path), [sealed[1].fingerprint], models=True)
    assert [(one.kind, one.key[0]) for one in found.candidates] == [
        ("copies", stage) for stage in CHAIN[:0:-1]
    ]
    assert {left for _, left in remove(Store(tmp_path), found)} == {""}
    [run] = MlflowClient(tracking_uri(tmp_path)).search_runs(["1"], "tags.`llmill.stage` = 'download'")
    places = search(tmp_path, [TEXT]).places
    assert any(run.info.run_id in place for place in places)
    kept = ("/store/download/", run.info.run_id, "/mlflow.db")  # its page is in the database
    assert [place for place in places if not any(one in place for one in kept)] == []


def train(home: Path, *, quoting: bool) -> Artifact:
    """A training that is told MLflow as a run does, and whose model writes the text."""
    store, name = Store(home), "7" * 16
    out, _ = store.begin("pretrain", name, {})
    (out / "model.json").write_text("{}")
    events = EventLog(out / "logs" / "events.jsonl")
    events.write("samples", step=3, tokens=30, samples=[{"prompt": "The ", "text": TEXT}])
    manifest = {"config": {}, "recipe": "small", "inputs": {}, "metrics": {"loss": 1.0}, "seconds": 1.0}
    artifact = store.seal(
        "pretrain", name, {**manifest, "finished": "2026-01-01T00:00:00.000+00:00", "mlflow_run_id": ""}
    )
    mlflow = Mlflow(home, tracking_uri(home))
    names = {
        "step": "pretrain",
        "stage": "pretrain",
        "fingerprint": name,
        "key": "pretrain-1",
        "recipe": "small",
    }
    whole = {"key": "run-1", "name": "small", "recipe": "small", "quoting": quoting}
    started = StepStarted(**names, run="run-1", quoting=quoting)
    sealed = replace(sealed_event(names, artifact, withheld=False), quoting=quoting)
    for event in (RunStarted(**whole), started, training_started(started, 0), sealed):
        pending = operations(event, store)
        if isinstance(event, TrainingStarted):
            fields = {"run": event.run, "step": event.step, "quoting": event.quoting}
            of = {"key": event.key, "stage": event.stage, "fingerprint": event.fingerprint}
            following = Following(**of, offset=0, **fields)
            pending = iter(following.read(store)[0])
        for operation in pending:
            if operation.get("what") not in ("plots", "checkpoints"):  # which need a whole training
                mlflow.report("small", operation)
    return artifact


def test_what_a_model_wrote_while_it_was_trained_goes_with_it(home: Path) -> None:
    trained = train(home, quoting=True)
    client = MlflowClient(tracking_uri(home))
    experiment = client.get_experiment_by_name("small").experiment_id
    runs = client.search_runs([experiment])
    for run in runs:
        assert "samples.json" in {one.path for one in client.list_artifacts(run.info.run_id)}
    found = select(Store(home), [trained.fingerprint])
    assert {left for _, left in remove(Store(home), found)} == {""}
    for sentence in SENTENCES.values():
        after = search(home, [sentence])
        assert (after.places, after.unread) == ([], [])
    for run in client.search_runs([experiment]):
        assert "samples.json" not in {one.path for one in client.list_artifacts(run.info.run_id)}
        assert "mlflow.loggedArtifacts" not in run.data.tags
    assert len(runs) == 2


def test_what_a_model_writes_is_not_uploaded_where_texts_are_not(tmp_path: Path) -> None:
    home = tmp_path / "home"
    train(home, quoting=False)
    (home / "store").rename(tmp_path / "elsewhere")
    client = MlflowClient(tracking_uri(home))
    [run] = client.search_runs(["1"], "tags.`llmill.stage` = 'pretrain'")
    assert [one.path for one in client.list_artifacts(run.info.run_id, "payload")] == ["payload/model.json"]
    assert not search(home, [TEXT]).places


def test_documents_that_are_not_to_be_uploaded_are_in_mlflow_by_checksum_only(tmp_path: Path) -> None:
    sealed = told(tmp_path, withheld=True)
    (tmp_path / "store").rename(tmp_path.with_name("store"))
    client = MlflowClient(tracking_uri(tmp_path))
    for run in client.search_runs(["1"], "tags.`llmill.stage` = 'clean'"):
        with open(client.download_artifacts(run.info.run_id, "payload.json")) as file:
            assert json.load(file)["files"] == sealed[1].manifest["files"]
        assert {one.path for one in client.list_artifacts(run.info.run_id)} == {
            "manifest.json",
            "payload.json",
        }
    kept = search(tmp_path, ["walnut bread was never written"])
    assert {place.rpartition("/")[2] for place in kept.places} <= {"mlflow.db", "mlflow.db, table tags"}
    assert not search(tmp_path, [SENTENCES["hindi"][:30]]).places or kept.places


def test_a_recipe_withholds_its_documents_from_mlflow(make_llmill: Callable[[], Llmill]) -> None:
    llmill = make_llmill()
    llmill.run("--to", "clean", "--set", "runtime.upload_texts=false")
    client = MlflowClient(tracking_uri(llmill.home))
    experiment = client.get_experiment_by_name("small").experiment_id
    for stage in ("download", "clean"):
        [run] = client.search_runs([experiment], f"tags.`llmill.stage` = '{stage}'")
        names = {one.path for one in client.list_artifacts(run.info.run_id)}
        assert {"manifest.json", "payload.json"} <= names
        assert not names & {"payload", "report.md"}
        assert "mlflow.note.content" not in run.data.tags
    [shard, *_] = llmill.home.glob("store/clean/*/documents-*.parquet")
    text = pq.read_table(shard)["text"][0].as_py()[:200]
    (llmill.home / "text.txt").write_text(text)
    said = llmill("find", "--file", str(llmill.home / "text.txt"), "--json", code=1)
    places = [place for place in json.loads(said.stdout)["places"] if not place.endswith("text.txt")]
    assert places
    assert all("/store/" in place for place in places)


@pytest.mark.parametrize("name", SENTENCES)
def test_a_text_is_found_however_it_was_packed_or_escaped(name: str, tmp_path: Path) -> None:
    text, home = SENTENCES[name], tmp_path / "home"
    home.mkdir()
    (home / "plain.txt").write_text(f"before {text} after")
    (home / "wrapped.txt").write_text(text.replace(" ", "\n    "))
    (home / "ascii.json").write_text(json.dumps({"text": text}))
    (home / "twice.jsonl").write_text(json.dumps({"why": json.dumps({"text": text}, ensure_ascii=False)}))
    (home / "page.html").write_text(text.replace("&", "&amp;").replace("<", "&lt;").replace("'", "&#x27;"))
    coloured = "".join(span((-1) ** place, html.escape(one)) for place, one in enumerate(text))
    (home / "coloured.html").write_text(coloured)
    (home / "coloured.json").write_text(json.dumps({"html": coloured}))
    (home / "packed.gz").write_bytes(gzip.compress(text.encode()))
    nested = pa.array([[{"a": ["else"], "b": text}]])
    pq.write_table(pa.table({"n": [1], "deep": nested}), home / "nested.parquet", compression="zstd")
    with sqlite3.connect(home / "rows.db") as database:
        database.execute("create table pages (id int, text text)")
        database.execute("insert into pages values (1, ?)", [text * 100])
    found = search(home, [text])
    assert not found.unread
    assert {Path(place.partition(",")[0]).name for place in found.places} == {
        path.name for path in home.iterdir()
    }
    assert not search(home, ["words that nobody wrote in any of these files"]).places


def test_what_can_not_be_looked_into_is_told_and_a_text_that_tells_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (unread,) = search(tmp_path, ["grandmother's bread"]).unread
    assert "broken.parquet: ArrowInvalid" in unread
    for text in ("", "a b c", "🍞🍞🍞"):
        with pytest.raises(UserError, match="at least 8 letters or digits"):
            search(tmp_path, [text])
