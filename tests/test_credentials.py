"""Planted secrets: of sources, of servers, of whoever is told. None is kept anywhere, none is said."""

from __future__ import annotations

import os
from pathlib import Path

import boto3
import pytest
from command_line import Llmill
from conftest import RECIPE as SMALL
from mlflow_server import Server
from moto.server import ThreadedMotoServer
from text_files import TEXTS, jsonl

from flows.servers import PrefectServer

RECIPE = """
name: secret
download:
  sources:
    - {{name: store, kind: objects, url: "s3://corpus/texts"}}
    - {{name: web, kind: http, urls: ["{signed}"]}}
pretrain: {{tokens: 1024, batch_tokens: 1024, precision: fp32}}
"""


def test_no_credential_is_left_in_the_home_of_a_run_nor_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "AKIAHUNTERHUNTER2222",
        "AWS_SECRET_ACCESS_KEY": "hunter2secrethunter2secrethunter2",
        "AWS_SESSION_TOKEN": "hunter2token",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    try:
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpus")
        client.put_object(Bucket="corpus", Key="texts/a.jsonl", Body=jsonl(TEXTS))
        signed = client.generate_presigned_url(
            "get_object", Params={"Bucket": "corpus", "Key": "texts/a.jsonl"}, ExpiresIn=600
        )
        recipe = tmp_path / "secret.yaml"
        recipe.write_text(RECIPE.format(signed=signed))
        llmill = Llmill(tmp_path / "home", recipe)
        said = llmill.afresh("run", str(recipe), "--only", "download")
    finally:
        server.stop()
    assert f"{2 * len(TEXTS)} documents" in said.stdout
    signature = signed.partition("Signature=")[2].partition("&")[0]
    secrets = [settings[name] for name in list(settings)[:3]] + [signature]
    kept = assert_secret(secrets, said.stdout + said.stderr, tmp_path / "home")
    assert {"mlflow.db", "manifest.json"} <= kept


def assert_secret(secrets: list[str], said: str, folder: Path) -> set[str]:
    """None of them was said, none is in any file; the files' names."""
    kept = [path for path in folder.rglob("*") if path.is_file()]
    for secret in secrets:
        assert len(secret) > 10
        assert secret not in said
        assert not [path for path in kept if secret.encode() in path.read_bytes()]
    return {path.name for path in kept}


PLANTED = {
    "PREFECT_SERVER_API_AUTH_STRING": "operator:hunter2-of-prefect",
    "PREFECT_API_AUTH_STRING": "operator:hunter2-of-prefect",
    "HF_TOKEN": "hf_hunter2hunter2hunter2",
    "AWS_SECRET_ACCESS_KEY": "hunter2-of-the-store",
    "OPERATOR_HOOK": "http://127.0.0.1:9/hunter2-of-the-hook",
}
SMALLER = ("--set", "pretrain.tokens=10_240", "--set", "runtime.notify=[env:OPERATOR_HOOK]")


def test_a_run_that_fails_and_its_repetition_keep_no_secret_of_servers_and_say_none(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))  # as the server sets it; so it is put back
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(SMALL.format(corpus=corpus))
    llmill, server = Llmill(tmp_path / "home", recipe), Server(tmp_path)
    mlflow = f"http://operator:hunter2-of-mlflow@127.0.0.1:{server.port}"
    run = ("run", str(recipe), *SMALLER)
    with PrefectServer(tmp_path) as prefect:
        prefect.wait()
        refused = llmill.afresh(*run, code=2, PREFECT_API_AUTH_STRING="operator:hunter2-is-wrong")
        away = llmill.afresh(*run, "--to", "download", MLFLOW_TRACKING_URI=mlflow)
        server.start()
        try:
            failed = llmill.afresh(*run, "--set", "pretrain.lr=1e30", code=2, MLFLOW_TRACKING_URI=mlflow)
            ended = llmill.afresh(*run, MLFLOW_TRACKING_URI=mlflow)
            told = {done.info.status for done in server.runs()}
        finally:
            server.kill()
    assert "refuses us (401): set PREFECT_API_AUTH_STRING" in refused.stderr
    assert "does not answer; the run goes on" in away.stdout
    assert told == {"FINISHED", "FAILED"}
    said = "".join(one.stdout + one.stderr for one in (refused, away, failed, ended))
    assert "env:OPERATOR_HOOK" in said, "who could not be told is named"
    secrets = {value.rpartition(":")[2].rpartition("/")[2] for value in PLANTED.values()}
    kept = assert_secret([*secrets, "hunter2-of-mlflow", "hunter2-is-wrong"], said, tmp_path)
    assert {"mlflow.db", "prefect.db", "server.log", "manifest.json"} <= kept
