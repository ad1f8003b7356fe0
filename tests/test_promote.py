"""``llmill promote``: a candidate becomes the champion only when every gate holds, and all decisions leave evidence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import AWAY, Llmill
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.compare.promote import decide, parity, quality
from flows.compare.subjects import Finder
from flows.engine.store import Artifact, Store
from flows.listeners.mlflow.lineage import ModelVersion

NAME, GOOD, BAD = "chosen", "0.003", "1e-05"


@pytest.fixture
def llmill(swept: Llmill, tmp_path: Path) -> Llmill:
    home = tmp_path / "home"
    shutil.copytree(swept.home, home)
    return replace(swept, home=home)


@pytest.fixture
def client(llmill: Llmill) -> MlflowClient:
    client = MlflowClient(f"sqlite:///{llmill.home}/mlflow.db")
    client.create_registered_model(NAME)
    return client


def exported(llmill: Llmill, lr: str, seed: int = 0) -> str:
    """The export of one of the sweep's models."""
    store = Store(llmill.home)
    for artifact in store.artifacts("export"):
        made_by = store.get("pretrain", artifact.inputs["model"].fingerprint)
        assert made_by
        if (made_by.manifest["config"]["lr"], made_by.manifest["config"]["seed"]) == (float(lr), seed):
            return artifact.fingerprint
    raise AssertionError(lr)


def register(client: MlflowClient, fingerprint: str) -> str:
    """A new version, which is the candidate; its number."""
    version = client.create_model_version(NAME, "/anywhere", tags={"llmill.fingerprint": fingerprint}).version
    client.set_registered_model_alias(NAME, "candidate", version)
    return str(version)


def aliases(client: MlflowClient) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(NAME).aliases.items()}


def decisions(client: MlflowClient) -> list[dict]:
    """The evidence of all decisions, oldest first."""
    experiment = client.get_experiment_by_name("small").experiment_id
    runs = client.search_runs(
        [experiment], "tags.`llmill.kind` = 'promote'", order_by=["attributes.start_time"]
    )
    paths = [client.download_artifacts(run.info.run_id, "decision.json") for run in runs]
    return [json.loads(Path(path).read_text()) for path in paths]


def test_the_first_is_promoted_a_better_one_follows_and_a_worse_one_is_refused(llmill, client):
    register(client, exported(llmill, BAD))
    said = llmill("promote", NAME).stdout
    assert "✓ bits per byte   there is no champion yet to be worse than" in said
    assert "✓ decontamination" in said
    assert "documents that hold parts of quiz were dropped" in said
    assert "models:/chosen/1 is promoted; evidence: " in said
    assert aliases(client) == {"champion": "1"}

    register(client, exported(llmill, GOOD))
    assert "models:/chosen/2 is promoted" in llmill("promote", NAME).stdout
    assert aliases(client) == {"champion": "2"}

    register(client, exported(llmill, BAD, 1))
    ended = llmill("promote", NAME, code=1)
    assert "✗ bits per byte" in ended.stdout
    assert "models:/chosen/3 is refused" in ended.stdout
    assert "models:/chosen/3 does not pass: bits per byte" in ended.stderr
    assert aliases(client) == {"champion": "2", "candidate": "3"}

    kept = decisions(client)
    assert [(one["version"], one["outcome"], one["champion"]) for one in kept] == [
        ("1", "promoted", None), ("2", "promoted", "1"), ("3", "refused", "2")
    ]  # fmt: skip
    by_name = {gate["name"]: gate for gate in kept[2]["gates"]}
    assert list(by_name) == ["bits per byte", "logits parity", "checksums", "decontamination"]
    assert by_name["bits per byte"]["evidence"]["high"] > by_name["bits per byte"]["evidence"]["margin"]
    assert by_name["decontamination"]["evidence"]["sets"][0][0]["dropped"] > 0
    refused = client.get_model_version(NAME, "3")
    tags = refused.tags
    assert "models:/chosen/3 was refused" in refused.description
    assert "✗ **bits per byte**" in refused.description
    assert (tags["llmill.promote.outcome"], tags["llmill.promote.failed"]) == ("refused", "bits per byte")
    assert (
        client.get_run(tags["llmill.promote.evidence"]).data.tags["llmill.promote.model"]
        == "models:/chosen/3"
    )


def test_a_dry_run_says_the_same_and_changes_nothing(llmill, client):
    register(client, exported(llmill, GOOD))
    dry = json.loads(llmill("promote", NAME, "--dry-run", "--json").stdout)
    assert dry["outcome"] == "promoted"
    assert "would be promoted" in llmill("promote", NAME, "--version", "1", "--dry-run").stdout
    assert aliases(client) == {"candidate": "1"}
    assert not decisions(client)
    assert set(client.get_model_version(NAME, "1").tags) == {"llmill.fingerprint"}
    done = json.loads(llmill("promote", NAME, "--version", "1", "--json").stdout)
    assert {**done, "decided": ""} == {**dry, "decided": ""}
    assert aliases(client) == {"champion": "1"}


def test_an_export_that_is_not_as_it_was_sealed_is_refused(llmill, client):
    fingerprint = exported(llmill, GOOD)
    register(client, fingerprint)
    weights = Store(llmill.home).path("export", fingerprint) / "model.safetensors"
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    ended = llmill("promote", NAME, code=1)
    assert "✗ checksums       model.safetensors: its content is not what was sealed" in ended.stdout
    assert aliases(client) == {"candidate": "1"}


def test_what_is_no_candidate_is_not_found_and_the_champion_not_promoted_again(llmill, client):
    assert "there is no version with the alias candidate" in llmill("promote", NAME, code=2).stderr
    register(client, exported(llmill, GOOD))
    assert (
        "there is no version 7 of models:/chosen; MLflow has models:/chosen/1 (candidate)"
        in llmill("promote", NAME, "--version", "7", code=2).stderr
    )
    client.create_registered_model("other")
    client.create_model_version("other", "/anywhere")
    client.set_registered_model_alias("other", "candidate", "1")
    assert "name the model" in llmill("promote", code=2).stderr
    assert "has no tag llmill.fingerprint" in llmill("promote", "other", code=2).stderr
    client.set_registered_model_alias(NAME, "champion", "1")
    assert "models:/chosen/1 is the champion already" in llmill("promote", NAME, code=2).stderr
    said = llmill("promote", code=2, **AWAY).stderr
    assert "MLflow at http://127.0.0.1:9 does not answer" in said
    with pytest.raises(MlflowException):
        client.get_model_version_by_alias("other", "champion")


def test_a_champion_that_can_not_be_tested_against_is_not_replaced(swept):
    finder = Finder(Store(swept.home))
    candidate = finder.of_export(exported(swept, GOOD), "candidate", "it")
    for fingerprint, why in (("", "has no tag llmill.fingerprint"), ("0123456789abcdef", "is not in ")):
        (gate,) = quality(
            finder,
            candidate,
            ModelVersion(name=NAME, version="1", fingerprint=fingerprint, aliases=("champion",)),
        )
        assert not gate.holds
        assert why in gate.says
    (own,) = quality(
        finder,
        candidate,
        ModelVersion(name=NAME, version="1", fingerprint=exported(swept, GOOD), aliases=("champion",)),
    )
    assert own.holds
    assert "the champion's own model" in own.says


def test_a_model_whose_text_was_never_looked_through_for_evaluation_sets_is_refused(finished):
    said = decide(
        Store(finished.home),
        ModelVersion(name=NAME, version="1", fingerprint=finished.made("export").name, aliases=()),
        None,
    )
    assert said.failed == ["decontamination"]
    assert "name evaluation sets in clean.decontamination" in said.gates[-1].says


@pytest.mark.parametrize(
    ("difference", "holds"), [(9e-5, True), (2e-4, False), (float("nan"), False), (None, False)]
)
def test_logits_that_are_off_by_more_than_export_allows_are_refused(difference, holds):
    metrics = {} if difference is None else {"logits_max_abs_difference": difference}
    assert parity(Artifact(Path(), {"metrics": metrics})).holds == holds
