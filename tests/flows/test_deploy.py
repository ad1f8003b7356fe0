"""The prefect.yaml that `llmill deploy` writes: an operator's edits stay, and options change what they name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_pipeline.context import UserError
from flows.deploy import Options, pools_of, write_deployments
from flows.deployed import ALL, StageName
from flows.recipe import load_recipe
from flows.stages import BY_NAME

RECIPE = """
name: tiny
download: {sources: [{name: texts, kind: local, path: texts}]}
pretrain: {tokens: 1024, batch_tokens: 1024}
"""


@pytest.fixture
def write(tmp_path: Path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)

    def write(**options) -> dict[str, dict]:
        file = tmp_path / "prefect.yaml"
        write_deployments(file, load_recipe(path), path, tmp_path / "home", Options(**options))
        return {entry["name"]: entry for entry in yaml.safe_load(file.read_text())["deployments"]}

    return write


def test_there_is_one_deployment_of_the_pipeline_and_one_of_each_stage(write, tmp_path):
    entries = write(cron="0 2 * * *", timezone="Europe/Berlin")
    assert list(entries) == ["tiny", *(f"tiny.{stage}" for stage in BY_NAME)]
    assert entries["tiny"]["schedules"] == [
        {"cron": "0 2 * * *", "timezone": "Europe/Berlin", "active": True}
    ]
    assert entries["tiny.clean"]["schedules"] == []
    assert entries["tiny.clean"]["parameters"]["stages"] == {"only": "clean"}
    assert "stages" not in entries["tiny"]["parameters"]
    assert entries["tiny"]["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
    assert entries["tiny"]["parameters"]["recipe"] == str(tmp_path / "tiny.yaml")


def test_what_an_operator_edits_stays_with_its_comments(write, tmp_path):
    before = write(cron="0 2 * * *")
    file = tmp_path / "prefect.yaml"
    text = file.read_text().replace("work_pool:", "work_pool:  # our own", 1)
    file.write_text(text + "\n# the end\n")
    after = write(pool="big")
    assert "work_pool:  # our own" in file.read_text()
    assert "# the end" in file.read_text()
    assert after["tiny"]["work_pool"]["name"] == "big"
    before["tiny"]["work_pool"] = after["tiny"]["work_pool"]
    assert after["tiny"] == before["tiny"], "only the pool was named"


def test_a_gpu_pool_takes_training_and_evaluation_out_of_the_pipelines_process(write, tmp_path):
    entries = write(pool="cpu", gpu_pool="gpu")
    pools = {name.partition(".")[2]: entry["work_pool"]["name"] for name, entry in entries.items()}
    assert {stage for stage, pool in pools.items() if pool == "gpu"} == {"pretrain", "evaluate"}
    assert entries["tiny"]["parameters"]["dispatch"] == ["pretrain", "evaluate"]
    assert pools_of(tmp_path / "prefect.yaml", list(entries)) == ["cpu", "gpu"]


def test_parameters_of_the_flow_are_checked_before_anything_is_written(write, tmp_path):
    entries = write(
        parameters=["stages.stop=tokenize"], collision="cancel-new", settings=["pretrain.lr=1e-3"]
    )
    assert entries["tiny"]["parameters"]["stages"] == {"stop": "tokenize"}
    assert entries["tiny"]["parameters"]["settings"] == ["pretrain.lr=1e-3"]
    assert entries["tiny"]["concurrency_limit"]["collision_strategy"] == "CANCEL_NEW"
    kept = (tmp_path / "prefect.yaml").read_text()
    for wrong, reason in {
        "stagez.stop=clean": "no such parameter",
        "stages.stop=nothing": "stages.stop",
    }.items():
        with pytest.raises(UserError, match=reason):
            write(parameters=[wrong])
    assert (tmp_path / "prefect.yaml").read_text() == kept


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cron": "every night"}, "--cron 'every night'"),
        ({"cron": "0 2 * * *", "timezone": "Europe/Atlantis"}, "Europe/Atlantis"),
        ({"timezone": "UTC"}, "give both"),
    ],
)
def test_a_schedule_that_is_none_is_refused(write, options, reason):
    with pytest.raises(UserError, match=reason):
        write(**options)


def test_a_file_that_is_no_prefect_yaml_is_refused_and_kept(write, tmp_path):
    for text in ("a: [", "- a\n"):
        (tmp_path / "prefect.yaml").write_text(text)
        with pytest.raises(UserError, match=r"prefect\.yaml"):
            write()
        assert (tmp_path / "prefect.yaml").read_text() == text


def test_the_form_of_the_flow_names_the_stages_that_there_are():
    assert [str(name) for name in StageName] == list(BY_NAME)
    assert not any(dict(ALL).values())
