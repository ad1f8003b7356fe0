"""The prefect.yaml that `llmill deploy` writes: an operator's edits stay, and options change what they name."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import httpx
import pytest
import yaml
from operator_api import Prefect
from prefect.exceptions import ParameterTypeError
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.schema_tools.validation import validate

from data_pipeline.core.errors import UserError
from flows.prefect.deploy import Options, offer_steps, pools_of, register, write_deployments
from flows.prefect.deployed import ALL, pipeline, recipe_name
from flows.prefect.page_edits import fields_in_file, fields_on_server, remember
from flows.prefect.pools import deployments_of, make_ready
from flows.prefect.schedules import KINDS, Wanted
from flows.recipe import apply_override, load_recipe
from flows.stages import DEFAULT

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
        home, recipe = tmp_path / "home", load_recipe(path)
        server = options.pop("server", ())
        wanted = {name: options.pop(name) for name in [*options] if name in Wanted.__dataclass_fields__}
        write.last = write_deployments(
            file,
            recipe=recipe,
            path=path,
            home=home,
            options=Options(schedules=Wanted(**wanted), **options),
            server=server,
        )
        return {entry["name"]: entry for entry in yaml.safe_load(file.read_text())["deployments"]}

    return write


def test_there_is_one_deployment_of_the_pipeline_and_one_of_each_stage(write, tmp_path):
    entries = write(cron=["0 2 * * *"], timezone="Europe/Berlin")
    assert list(entries) == ["tiny", *(f"tiny.{stage}" for stage in DEFAULT)]
    assert entries["tiny"]["schedules"] == [
        {"cron": "0 2 * * *", "timezone": "Europe/Berlin", "active": True}
    ]
    assert entries["tiny.clean"]["schedules"] == []
    assert entries["tiny.clean"]["parameters"]["stages"] == {"only": "clean"}
    assert "stages" not in entries["tiny"]["parameters"]
    assert entries["tiny"]["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
    assert entries["tiny"]["parameters"]["recipe"] == str(tmp_path / "tiny.yaml")


def test_what_an_operator_edits_stays_with_its_comments(write, tmp_path):
    before = write(cron=["0 2 * * *"])
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
        ({"cron": ["every night"]}, "--cron every night: .*Invalid cron string"),
        ({"cron": ["0 2 * * *", "0 0 30 2 *"]}, r"--cron 0 0 30 2 \*: "),
        ({"cron": ["* * * * * */10"]}, "a minute apart"),
        ({"cron": ["0 2 * * *"], "timezone": "Europe/Atlantis"}, "--timezone Europe/Atlantis: no such"),
        ({"every": ["1d"], "timezone": "../etc/passwd"}, "no such timezone"),
        ({"every": ["6 hours"]}, "--every 6 hours: write"),
        ({"every": ["1d", "0h"]}, "--every 0h: write"),
        ({"every": ["59s"]}, "--every 59s: the shortest is a minute"),
        ({"rrule": ["FREQ=OFTEN"]}, "--rrule FREQ=OFTEN: .*FREQ"),
        ({"rrule": ["FREQ=SECONDLY"]}, "a minute apart"),
        ({"rrule": ["FREQ=MINUTELY;BYSECOND=0,30"]}, "a minute apart"),
        ({"rrule": ["FREQ=DAILY;UNTIL=20210101T000000"]}, "no such time to come"),
        ({"timezone": "UTC"}, "--timezone is said of a schedule"),
        ({"paused": True}, "--paused is said of a schedule"),
    ],
)
def test_a_schedule_that_is_none_is_refused_in_a_line(write, tmp_path, options, reason):
    with pytest.raises(UserError, match=reason) as refused:
        write(**options)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "prefect.yaml").exists()


def test_a_file_that_is_no_prefect_yaml_is_refused_and_kept(write, tmp_path):
    for text in ("a: [", "- a\n"):
        (tmp_path / "prefect.yaml").write_text(text)
        with pytest.raises(UserError, match=r"prefect\.yaml"):
            write()
        assert (tmp_path / "prefect.yaml").read_text() == text


def test_a_flow_run_bears_the_name_that_its_recipe_gives_itself(tmp_path):
    file = tmp_path / "file of another name.yaml"
    file.write_text(RECIPE.replace("name: tiny", "name: of-its-own"))
    assert recipe_name(file, ["pretrain.lr=1e-3"]) == "of-its-own"
    assert recipe_name(file, ["name=told"]) == "told"
    file.write_text("[")
    assert recipe_name(file, []) == "file of another name"
    assert recipe_name(tmp_path / "missing.yaml", []) == "missing"


def test_nothing_is_chosen_in_the_form_of_the_flow():
    assert not any(dict(ALL).values())


@pytest.fixture
def registered(write, prefect_server, tmp_path: Path):
    """Register the file with a real server as the command does, and give what that says then."""

    def register_now(**options) -> dict[str, dict]:
        with temporary_settings({PREFECT_API_URL: prefect_server}), pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREFECT_API_URL", prefect_server)
            names = ["tiny", "tiny.clean"]
            write(**options, server=deployments_of(prefect_server, names))
            make_ready(prefect_server, ["llmill"])
            register(tmp_path / "prefect.yaml", names)
            offer_steps(prefect_server, names, DEFAULT)
            entries = deployments_of(prefect_server, names)
        remember(tmp_path / "home", entries)
        return {entry["name"]: entry for entry in entries}

    return register_now


def test_the_form_of_a_deployment_offers_the_steps_of_its_recipe(registered, prefect_server):
    entry = registered()["tiny.clean"]
    chosen = entry["parameter_openapi_schema"]["definitions"]["Stages"]["properties"]
    assert set(chosen) == {"start", "stop", "only", "force"}
    for one in chosen.values():
        assert one["anyOf"][0]["enum"] == list(DEFAULT)
    refused = httpx.post(
        f"{prefect_server}/deployments/{entry['id']}/create_flow_run",
        json={"parameters": {**entry["parameters"], "stages": {"only": "cleam"}}},
    )
    assert refused.status_code == 409
    assert "cleam" in refused.text


def test_what_is_changed_on_prefects_pages_is_shown_and_stays_until_somebody_says_otherwise(
    registered, write, prefect_server, tmp_path
):
    prefect = Prefect(prefect_server)
    tiny = registered(cron=["0 2 * * *"], timezone="Europe/Berlin")["tiny"]
    assert (write.last.kept, write.last.replaced) == ([], [])
    [schedule] = tiny["schedules"]
    later = {"cron": "30 4 * * *", "timezone": "Asia/Tokyo"}
    prefect.patch(f"deployments/{tiny['id']}/schedules/{schedule['id']}", schedule=later)
    prefect.post(f"deployments/{tiny['id']}/pause_deployment")
    prefect.patch(
        f"deployments/{tiny['id']}", parameters={**tiny["parameters"], "settings": ["pretrain.lr=1e-3"]}
    )

    after = registered(pool="llmill")["tiny"]
    said = {edit.field: str(edit) for edit in write.last.kept}
    assert set(said) == {"schedules", "paused", "parameters"}
    assert "30 4 * * * Asia/Tokyo" in said["schedules"]
    assert "the file says 0 2 * * * Europe/Berlin" in said["schedules"]
    assert after["schedules"][0]["schedule"]["cron"] == "30 4 * * *"
    assert after["paused"]
    assert after["parameters"]["settings"] == ["pretrain.lr=1e-3"]

    file = tmp_path / "prefect.yaml"
    file.write_text(file.read_text().replace("30 4 * * *", "45 5 * * *"))
    edited = registered()["tiny"]
    assert (write.last.kept, write.last.replaced) == ([], []), "the file alone was edited"
    assert edited["schedules"][0]["schedule"]["cron"] == "45 5 * * *"

    prefect.post(f"deployments/{tiny['id']}/resume_deployment")
    told = registered(replace=True)["tiny"]
    assert [edit.field for edit in write.last.replaced] == ["paused"]
    assert told["paused"]


def test_several_schedules_are_kept_as_a_page_left_them(registered, write, prefect_server, tmp_path):
    """One is switched off there, one is added; intervals keep their beginning, whoever registers."""
    prefect = Prefect(prefect_server)
    options = {
        "cron": ["0 2 * * *"],
        "every": ["6h"],
        "rrule": ["FREQ=WEEKLY;BYDAY=MO;BYHOUR=3"],
        "paused": True,
    }
    tiny = registered(**options, timezone="Europe/Berlin")["tiny"]
    assert [schedule["active"] for schedule in tiny["schedules"]] == [False] * 3
    on_page = {kind: one for one in tiny["schedules"] for kind in KINDS if one["schedule"].get(kind)}
    anchor = on_page["interval"]["schedule"]["anchor_date"]
    assert fields_on_server(tiny)["schedules"] == fields_in_file(write()["tiny"])["schedules"], (
        "as they were written"
    )
    prefect.patch(f"deployments/{tiny['id']}/schedules/{on_page['rrule']['id']}", active=True)
    added = {"schedule": {"interval": 3600, "anchor_date": "2026-01-01T00:30:00Z"}, "active": True}
    httpx.post(f"{prefect_server}/deployments/{tiny['id']}/schedules", json=[added]).raise_for_status()

    after = registered()["tiny"]
    [edit] = write.last.kept
    assert "every 1 h from 2026-01-01 00:30 UTC, " in str(edit)
    assert "FREQ=WEEKLY;BYDAY=MO;BYHOUR=3 Europe/Berlin (the file says" in str(edit), "it is on"
    assert "0 2 * * * Europe/Berlin (off)" in str(edit)
    assert fields_on_server(after)["schedules"] == edit.page

    (tmp_path / "prefect.yaml").unlink()
    again = registered(every=["6h"], timezone="Europe/Berlin")["tiny"]
    [schedule] = again["schedules"]
    assert schedule["active"]
    assert datetime.fromisoformat(schedule["schedule"]["anchor_date"]) == datetime.fromisoformat(anchor)
    assert write()["tiny"]["schedules"][0]["anchor_date"] == anchor


def test_a_schedules_meaning_stands_beside_it(write, tmp_path):
    file = tmp_path / "prefect.yaml"
    write(cron=["0 2 * * *", "15 4 * * 1"], every=["6h"])
    lines = file.read_text().splitlines()
    assert "      - cron: 0 2 * * *  # i.e. at 02:00 every day" in lines
    assert any(line.startswith("      - interval: 21600  # i.e. every 6 h") for line in lines)
    text = file.read_text().replace("cron: 0 2", "cron: 30 3").replace("# i.e. at 04:15", "# ours: at 04:15")
    file.write_text(text.replace("# i.e. at 02:00 every day", "# i.e. at 02:00 every day\n        # below"))
    write()
    assert "cron: 30 3 * * *  # i.e. at 03:30 every day\n        # below\n" in file.read_text()
    assert "# ours: at 04:15" in file.read_text()
    before = file.read_text()
    write()
    assert file.read_text() == before


def test_without_a_memory_of_the_last_registration_nothing_on_the_server_is_lost(
    registered, write, prefect_server, tmp_path
):
    clean = registered()["tiny.clean"]
    Prefect(prefect_server).patch(f"deployments/{clean['id']}", description="掃除 🧹")
    (tmp_path / "home/servers/deployments.json").write_text("{")
    assert registered()["tiny.clean"]["description"] == "掃除 🧹"
    assert [(edit.deployment, edit.field) for edit in write.last.kept] == [("tiny.clean", "description")]


def test_a_new_file_does_not_take_the_schedule_of_a_deployment_that_the_server_has(
    registered, write, prefect_server, tmp_path
):
    registered(cron=["0 2 * * *"], replace=True)
    (tmp_path / "prefect.yaml").unlink()
    (tmp_path / "home/servers/deployments.json").unlink()
    assert registered()["tiny"]["schedules"][0]["schedule"]["cron"] == "0 2 * * *"
    assert ("tiny", "schedules") in [(edit.deployment, edit.field) for edit in write.last.kept]


@pytest.mark.parametrize(
    "setting",
    ["pretrain.mixture.web-text=2", "clean.decontamination.sets.mmlu-pro.path=a=b.txt", "download.sources.0.path=a\nb",
     "name=x", "clean.decontamination.sets.日本語.path=x.txt"],
)  # fmt: skip
def test_a_deployment_takes_every_setting_that_the_command_line_takes(setting):
    """The pattern is checked by Prefect's server too, by the flow's schema."""
    apply_override({"download": {"sources": [{}]}}, setting)
    pipeline.validate_parameters({"recipe": "", "settings": [setting]})
    validate({"recipe": "", "settings": [setting]}, pipeline.parameters.model_dump_for_openapi())
    with pytest.raises(UserError, match="write it as"):
        apply_override({}, "no setting")
    with pytest.raises(ParameterTypeError):
        pipeline.validate_parameters({"recipe": "", "settings": ["no setting"]})
