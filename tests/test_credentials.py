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

from data_pipeline.core.errors import UserError
from flows.compare.members import read_grid
from flows.lineage.search import search
from flows.prefect.deploy import Options, write_deployments
from flows.prefect.servers import PrefectServer
from flows.recipe import load_recipe, shown

RECIPE = """
name: secret
download:
  sources:
    - {{name: store, kind: objects, url: "s3://corpus/texts"}}
    - {{name: web, kind: http, urls: ["{signed}"]}}
    - {{name: given, kind: http, urls: ["{signed}"]}}
pretrain: {{tokens: 1024, batch_tokens: 1024, precision: fp32}}
"""


def test_no_credential_is_left_in_the_home_of_a_run_nor_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither given by the recipe nor by ``--set``, whether the run ends well or fails."""
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)  # so that it brings a server of its own, with its database in the home
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
        another = client.generate_presigned_url(
            "get_object", Params={"Bucket": "corpus", "Key": "texts/a.jsonl"}, ExpiresIn=700
        )
        missing = another.replace("a.jsonl", "missing.jsonl")
        run = ("run", str(recipe), "--only", "download", "--set")
        said = llmill.afresh(*run, f'download.sources.2.urls=["{another}"]')
        failed = llmill.afresh(*run, f"download.sources.2.urls.0={missing}", code=2)
    finally:
        server.stop()
    assert f"{3 * len(TEXTS)} documents" in said.stdout
    assert "missing.jsonl" in failed.stderr
    signatures = [one.partition("Signature=")[2].partition("&")[0] for one in (signed, another)]
    secrets = [settings[name] for name in list(settings)[:3]] + signatures
    words = said.stdout + said.stderr + failed.stdout + failed.stderr
    kept = assert_secret(secrets, words, tmp_path / "home")
    assert {"mlflow.db", "prefect.db", "manifest.json"} <= kept


def test_a_setting_that_may_be_kept_is_shown_as_it_is_and_no_field_is_named_like_a_secret() -> None:
    for setting in (
        "pretrain.tokens=4e6",
        "tokenize.val_fraction=0.1",
        "download.sources.0.path=a?b",
        "clean.min_chars=1",
    ):
        assert shown(setting) == setting
    assert shown("x.sources.0.urls=[https://u:p@h/a.txt?sig=1, 'https://h/b.txt?k=2&l=3']") == (
        "x.sources.0.urls=[https://***@h/a.txt?*** 'https://h/b.txt?***']"
    )
    assert shown("download.sources.0.api_key=abc") == "download.sources.0.api_key=***"


def test_a_setting_that_is_refused_is_said_without_its_secret(tmp_path: Path, corpus: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(SMALL.format(corpus=corpus))
    address = "https://host/a.jsonl?Signature=hunter2-signed"
    for setting in (
        f"download.sources.0.urls={address}",
        f"download.sources.0.urls=[{address}",
        f"download.sources.7.urls={address}",
        f"download.sources.0.path.deeper={address}",
        f"pretrain.lr={address}",
        "download.sources.0.token=hunter2-signed",
        "https://user:hunter2-signed@host",
    ):
        with pytest.raises(UserError) as refused:
            load_recipe(recipe, [setting])
        assert "hunter2" not in str(refused.value)
        assert "--set" in str(refused.value)
    with pytest.raises(UserError) as refused:
        read_grid([f"download.sources.0.urls={address},"])
    assert "hunter2" not in str(refused.value)


def test_a_deployment_takes_no_secret_for_prefect_would_keep_it(tmp_path: Path, corpus: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(SMALL.format(corpus=corpus))
    file, setting = (
        tmp_path / "prefect.yaml",
        "download.sources.0.urls=[https://host/a.jsonl?Signature=hunter2-signed]",
    )
    for options in (Options(settings=[setting]), Options(parameters=[f"settings=['{setting}']"])):
        with pytest.raises(UserError, match=r"a\.jsonl\?\*\*\*.*Prefect would keep") as refused:
            write_deployments(file, recipe=load_recipe(recipe), path=recipe, home=tmp_path, options=options)
        assert "hunter2" not in str(refused.value)
        assert not file.exists()


def assert_secret(secrets: list[str], said: str, folder: Path) -> set[str]:
    """None of them was said, none is in any file, in rows or columns of one or escaped; the files' names."""
    assert search(folder, secrets).places == []
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


@pytest.mark.long
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
