"""``llmill trace``: an artifact's origins and offspring, a document's way, and when a training reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import Llmill
from replays import documents, numbered, replay

from data_pipeline.clean.stage import CleanConfig, clean
from data_pipeline.core.errors import UserError
from data_pipeline.dedup.config import DedupConfig
from data_pipeline.dedup.stage import dedup
from data_pipeline.download.stage import DownloadConfig, download
from data_pipeline.stage import LocalContext
from data_pipeline.tokenize.lookup import read_ids
from data_pipeline.tokenize.stage import TokenizeConfig, tokenize
from data_pipeline.train_tokenizer.stage import TokenizerConfig, train_tokenizer
from flows.engine.store import Store, now, origin_of
from flows.lineage.documents import DocumentTrace, training_of
from flows.lineage.graph import Graph, Node
from flows.lineage.report import Known, document_json, document_lines
from flows.lineage.target import find_target
from flows.stages import DEFAULT
from llm.pretrain.config import PretrainConfig
from llm.pretrain.stage import prepare


@pytest.fixture(scope="module")
def copied(copy_finished: Callable[[Path], Llmill], tmp_path_factory: pytest.TempPathFactory) -> Llmill:
    return copy_finished(tmp_path_factory.mktemp("copied") / "home")


@pytest.fixture(scope="module")
def graph(copied: Llmill) -> Graph:
    return Graph(Store(copied.home))


def only(graph: Graph, stage: str) -> Node:
    (node,) = (node for node in graph.nodes.values() if node.stage == stage)
    return node


def test_each_document_of_the_line_is_where_its_trace_says_and_read_when_it_says(
    graph: Graph, copied: Llmill, tmp_path: Path
) -> None:
    pretrain, folder = only(graph, "pretrain"), only(graph, "tokenize").path
    config = training_of(pretrain).config
    inputs = {"tokens": folder, "tokenizer": only(graph, "train_tokenizer").path}
    job = prepare(config, inputs, tmp_path, LocalContext())
    texts = documents(folder)
    read, _ = replay(job, numbered(job, texts), {})
    known = Known(graph.store)
    held_out = 0
    for id in [id for ids in read_ids(only(graph, "dedup").path) for id in ids.to_pylist()]:
        trace = document_json(DocumentTrace(graph, id), known)
        for place in trace["places"]:
            if "shard" in place:
                file = pq.ParquetFile(graph.nodes[place["stage"], place["fingerprint"]].path / place["shard"])
                assert (
                    file.read_row_group(place["row_group"], ["id"]).column("id")[place["row"]].as_py() == id
                )
        stages = [place["stage"] for place in trace["places"]]
        (training,) = trace["trainings"]
        if id in texts:
            assert stages == ["download", "clean", "dedup", "train_tokenizer", "tokenize"]
            number = list(texts).index(id)
            assert {(one["step"], one["row"]) for one in training["reads"]} == {
                (step, row) for step, row, _ in read[number]
            }
            assert {one["fate"] for one in training["reads"]} <= {"trained"}
            assert trace["models"] == ([{"export": only(graph, "export").fingerprint,
                                         "path": str(only(graph, "export").path)}] if read[number] else [])  # fmt: skip
        else:
            held_out += 1
            assert stages == ["download", "clean", "dedup", "train_tokenizer", "tokenize", "evaluate"]
            assert trace["places"][-2]["is"] == "val"
            assert not training["reads"]
            assert not trace["models"]
    assert held_out
    assert len(texts) > 10


def test_the_command_prints_the_same_for_a_person_and_for_a_script(copied: Llmill, graph: Graph) -> None:
    document = "stdlib/zz_almost.txt"
    said = copied("trace", document).stdout
    assert "documents-00003.parquet, row group 0, row " in said
    assert "in common with\n  stdlib/argparse.txt\n  stdlib/zz_copy.txt" in said, (
        "the copies that dedup removed for it"
    )
    assert f"shaped\n  export          {only(graph, 'export').fingerprint}" in said
    trace = json.loads(copied("trace", document, "--json").stdout)
    steps = {one["step"] for one in trace["trainings"][0]["reads"]}
    assert f"{len(steps)} of 60 steps read" in said
    removed = DocumentTrace(graph, "stdlib/argparse.txt")
    assert "1.00 alike to stdlib/zz_almost.txt, which was kept" in "\n".join(
        document_lines(removed, Known(graph.store))
    )
    assert removed.others() == [document]
    assert not removed.models()


def test_an_artifact_leads_to_all_it_was_made_from_and_went_into_and_to_its_runs(
    copied: Llmill, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{copied.home}/mlflow.db")
    graph = Graph(Store(copied.home))
    export = only(graph, "export")
    client.create_model_version("small", "/elsewhere")
    client.set_registered_model_alias("small", "champion", "1")
    dedup = only(graph, "dedup")
    trace = json.loads(copied("trace", dedup.fingerprint[:6], "--json").stdout)
    assert trace["artifact"]["fingerprint"] == dedup.fingerprint
    assert [one["stage"] for one in trace["made_from"]] == ["download", "clean"]
    source = trace["made_from"][0]["sources"][0]
    assert (source["name"], source["files"], len(source["listing_sha256"])) == ("stdlib", 29, 64)
    after = ["train_tokenizer", "tokenize", "pretrain", "evaluate", "export"]
    assert [one["stage"] for one in trace["went_into"]] == after
    for one in [*trace["made_from"], *trace["went_into"]]:
        manifest = json.loads((Path(one["path"]) / "manifest.json").read_text())
        named = ("payload_sha256", "code", "mlflow_run_id", "prefect_flow_run_id")
        assert {name: one[name] for name in named} == {name: manifest[name] for name in named}
        assert one["host"] == manifest["host"]["name"]
    assert trace["models"] == ["models:/small/1"]
    how = {(run["name"].split()[0], run["how"]) for run in trace["runs"]}
    read = {("train_tokenizer", "read"), ("tokenize", "read")}
    # Tests that share the home, and came before, may have reused it.
    assert {one for one in how if one[1] != "reused"} == {("small", "ran"), ("dedup", "ran")} | read

    moved = tmp_path / "moved"
    shutil.copytree(export.path, moved)
    graph = Graph(Store(copied.home))
    assert find_target(graph, str(moved)) == export
    (moved / "manifest.json").unlink()
    for text in (str(moved), str(export.path), "models:/small/1", "models:/small@champion"):
        assert find_target(graph, text) == export
    for text, said in (
        ("models:/small/2", "has no tag llmill.fingerprint"),
        ("models:/small/7", "it has models:/small/1, models:/small/2"),
        (str(tmp_path), "holds no artifact"),
    ):
        with pytest.raises(UserError, match=said):
            find_target(graph, text)


def test_without_mlflow_the_rest_is_told_and_that_it_is_away(copied: Llmill, graph: Graph) -> None:
    nobody = "http://127.0.0.1:9"
    said = copied("trace", only(graph, "tokenize").fingerprint, MLFLOW_TRACKING_URI=nobody).stdout
    assert f"MLflow at {nobody} does not answer" in said
    assert only(graph, "export").fingerprint in said


def test_what_is_named_wrong_is_answered_with_what_may_have_been_meant(copied: Llmill, graph: Graph) -> None:
    said = copied("trace", "stdlib/argparse.tx", code=2).stderr
    assert "did you mean stdlib/argparse.txt or" in said
    right = only(graph, "clean").fingerprint
    with pytest.raises(UserError, match=f"did you mean {right}"):
        find_target(graph, right[:6] + "0" + right[7:])


def seal(store: Store, stage: str, config: Any, body: Callable[..., Any], **inputs: Node) -> Node:
    """Run a stage's body as a run does, and seal what it wrote."""
    config = config.resolve()
    name = f"{len(store.artifacts()):016x}"
    out, _ = store.begin(
        stage, name, {"inputs": origin_of({key: one.artifact for key, one in inputs.items()})}
    )
    metrics = body(config, {key: one.path for key, one in inputs.items()}, out, LocalContext())
    recorded = {
        key: {
            "stage": one.stage,
            "fingerprint": one.fingerprint,
            "payload_sha256": one.artifact.payload_sha256,
        }
        for key, one in inputs.items()
    }
    manifest = {"config": config.identity(), "inputs": recorded, "metrics": metrics, "finished": now()}
    artifact = store.seal(stage, name, manifest)
    return Node((stage, name), artifact.path, artifact)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A line of the real bodies over texts that meet each of the fates that there are, and a training that began."""
    root = tmp_path_factory.mktemp("line")
    words = np.random.default_rng(0)
    texts = {
        f"{source}/{number}.txt": " ".join(f"word{one}" for one in words.integers(0, 3000, 400))
        for source in ("one", "two")
        for number in range(30)
    }
    texts["one/copy.txt"] = texts["one/0.txt"]
    texts["one/short.txt"] = "tiny"
    for number in range(6):
        texts[f"two/quoted-{number}.txt"] = texts[f"two/{number}.txt"][100:1500]
    for name, text in texts.items():
        path = root / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "text" / "one" / "broken.txt").write_bytes(b"\xff\xfe\xff")
    store = Store(root)
    sources = [{"name": name, "kind": "local", "path": str(root / "text" / name)} for name in ("one", "two")]
    got = seal(
        store,
        "download",
        DownloadConfig.model_validate({"sources": sources, "shard_bytes": 20_000}),
        download,
    )
    cleaned = seal(store, "clean", CleanConfig(gopher=None, min_chars=50), clean, documents=got)
    rules = DedupConfig.model_validate({"spans": {"min_words": 20}})
    unique = seal(store, "dedup", rules, dedup, documents=cleaned)
    tokenizer = seal(
        store, "train_tokenizer", TokenizerConfig(vocab_size=400), train_tokenizer, documents=unique
    )
    shards = seal(
        store, "tokenize", TokenizeConfig(val_fraction=0.2), tokenize, documents=unique, tokenizer=tokenizer
    )
    inputs = {"tokens": shards, "tokenizer": tokenizer}
    out, _ = store.begin(
        "pretrain",
        "00000000000000aa",
        {"inputs": origin_of({key: one.artifact for key, one in inputs.items()})},
    )
    config = PretrainConfig.model_validate(
        {
            "model": {"layers": 1, "heads": 2, "width": 16, "context": 32},
            "tokens": 4096 * 40,
            "batch_tokens": 4096,
            "mixture": {"two": 1},
            "precision": "fp32",
        }
    )
    job = prepare(config, {key: one.path for key, one in inputs.items()}, out, LocalContext())
    job.scratch.mkdir()
    (job.scratch / "job.json").write_text(job.model_dump_json())
    (out / "logs").mkdir()
    events = [{"event": "step", "step": step} for step in range(1, 11)]
    (out / "logs" / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return Graph(store)


@pytest.mark.parametrize(
    ("id", "stage", "said"),
    [
        ("one/broken.txt", "download", "dropped: "),
        ("one/short.txt", "clean", "dropped: min_chars"),
        ("one/copy.txt", "dedup", "removed: the same text as one/0.txt"),
    ],
)
def test_a_document_that_is_left_out_is_followed_to_where_and_why(
    line: Graph, id: str, stage: str, said: str
) -> None:
    trace = find_target(line, id)
    assert isinstance(trace, DocumentTrace)
    last = document_lines(trace, Known(line.store))[len(trace.places)]
    assert last.startswith(f"  {stage} ")
    assert said in last
    assert not trace.readings
    assert not trace.models()


def test_a_document_all_of_which_was_cut_out_leads_to_those_that_keep_it_and_they_to_it(line: Graph) -> None:
    cut = pq.read_table(only(line, "dedup").path / "cut.parquet").to_pylist()
    dropped = {row["id"]: row["kept_in"] for row in cut if row["dropped"]}
    assert 0 < len(dropped) < 6
    for id, keepers in dropped.items():
        trace = DocumentTrace(line, id)
        said = document_lines(trace, Known(line.store))[3]
        assert f"removed: its text is in {', '.join(keepers)}" in said
        assert trace.others() == keepers
        assert not trace.readings
        for keeper in keepers:
            assert id in DocumentTrace(line, keeper).others()
    shortened = [row for row in cut if not row["dropped"]]
    assert shortened
    for row in shortened:
        assert set(row["kept_in"]) <= set(DocumentTrace(line, row["id"]).others())


def test_an_unfinished_training_says_what_it_has_read_and_what_it_will(line: Graph) -> None:
    fates = set()
    for number in range(30):
        first, second = (DocumentTrace(line, f"{source}/{number}.txt") for source in ("one", "two"))
        for reading in first.readings:
            assert not reading.reads, "the mixture leaves this source out"
        for reading in second.readings:
            assert reading.node.state == "unfinished"
            assert reading.as_json()["done"] == 10
            assert all((one.fate == "not yet") == (one.step > 10) for one in reading.reads)
            fates |= {one.fate for one in reading.reads}
            if second.places[only(line, "tokenize").key].what == "train":
                assert len({one.epoch for one in reading.reads}) > 1, "read in several epochs"
                assert ", 10 done) read" in "\n".join(document_lines(second, Known(line.store)))
            else:
                assert not reading.reads
                assert reading.validated
    assert fates == {"trained", "not yet"}
    assert DEFAULT[:2] == ("download", "clean")
