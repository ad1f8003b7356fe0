"""A run on an object store and on a signed address: neither the keys nor the signature are kept anywhere."""

from __future__ import annotations

from pathlib import Path

import boto3
import pytest
from command_line import Llmill
from moto.server import ThreadedMotoServer
from text_files import TEXTS, jsonl

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
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert {"mlflow.db", "manifest.json"} <= {path.name for path in kept}
    for secret in secrets:
        assert len(secret) > 10
        assert secret not in said.stdout + said.stderr
        assert not [path for path in kept if secret.encode() in path.read_bytes()]
