"""The prefect.yaml that `llmill deploy` writes: an operator's edits stay, and options change what they name."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import httpx
import pytest
import yaml
from browser import SECONDS, open_browser
from operator_api import Prefect
from playwright.sync_api import Locator, Page, expect
from prefect.exceptions import ParameterTypeError
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.schema_tools.validation import validate

from data_pipeline.core.errors import UserError
from flows.prefect.deploy import Options, offer_fields, pools_of, register, write_deployments
from flows.prefect.deployed import ALL, pipeline, recipe_name
from flows.prefect.form import OTHERS, settings_in
from flows.prefect.page_edits import fields_in_file, fields_on_server, remember
from flows.prefect.pools import deployments_of, make_ready
from flows.prefect.schedules import KINDS, Wanted
from flows.recipe import apply_override, load_recipe
from flows.stages import DEFAULT

expect.set_options(timeout=SECONDS * 1000)
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
            names = ["tiny", "tiny.clean", "tiny.pretrain"]
            write(**options, server=deployments_of(prefect_server, names))
            make_ready(prefect_server, ["llmill"])
            register(tmp_path / "prefect.yaml", names)
            offer_fields(prefect_server, load_recipe(tmp_path / "tiny.yaml"), tmp_path / "tiny.yaml")
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


@pytest.fixture
def post(registered, prefect_server):
    """Start a run of the pipeline's deployment as a form does, whose values go over the deployment's own."""
    tiny = registered()["tiny"]

    def post(**parameters) -> httpx.Response:
        body = {"parameters": {**tiny["parameters"], **parameters}}
        return httpx.post(f"{prefect_server}/deployments/{tiny['id']}/create_flow_run", json=body)

    return post


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"pretrain": {"lr": -1}}, "-1 is less than or equal to the minimum of 0"),
        ({"pretrain": {"tokens": "many"}}, "'many' is not of type 'integer'"),
        ({"pretrain": {"precision": "fp64"}}, "'fp64' is not one of"),
        ({"pretrain": {"learning_rate": 1}}, "'learning_rate' was unexpected"),
        ({"pretrain": {OTHERS: {"optimizer.momentum": 2}}}, "2 is greater than or equal to the maximum of 1"),
        ({"pretraining": {}}, "'pretraining' was unexpected"),
    ],
)
def test_a_wrong_value_of_a_field_is_refused_before_there_is_a_run(post, prefect_server, fields, reason):
    before = Prefect(prefect_server).runs("tiny")
    refused = post(config=fields)
    assert (refused.status_code, reason in refused.text) == (409, True), refused.text
    assert Prefect(prefect_server).runs("tiny") == before


def test_a_run_of_the_form_keeps_what_its_fields_began_with(post):
    """So that what nobody touched is as the recipe's file says, when the run starts and when it is retried."""
    started = post(config={"pretrain": {"lr": 1e-3, "tokens": 1024, OTHERS: {"optimizer.momentum": 0.9}}})
    assert started.status_code == 201, started.text
    assert settings_in(started.json()["parameters"]) == [
        "pretrain.lr=0.001",
        "pretrain.optimizer.momentum=0.9",
    ]


def test_fields_that_a_page_saved_are_written_to_the_file_as_far_as_they_were_changed(
    registered, write, prefect_server, tmp_path
):
    """To save anything on the page of a deployment saves all fields that it shows."""
    tiny = registered(settings=["pretrain.lr=2e-3"])["tiny"]
    assert tiny["parameters"]["defaults"]["pretrain.lr"] == 2e-3
    fields = {"pretrain": {"lr": 2e-3, "tokens": 2048}, "clean": {"min_chars": 1, OTHERS: None}}
    Prefect(prefect_server).patch(
        f"deployments/{tiny['id']}", parameters={**tiny["parameters"], "config": fields}
    )
    after = registered()["tiny"]
    assert [(edit.field, edit.page["config"]) for edit in write.last.kept] == [
        ("parameters", {"pretrain": {"tokens": 2048}})
    ]
    assert settings_in(after["parameters"]) == ["pretrain.lr=2e-3", "pretrain.tokens=2048"]
    assert "defaults" not in (tmp_path / "prefect.yaml").read_text()
    assert registered()["tiny"]["parameters"]["config"] == {"pretrain": {"tokens": 2048}}
    assert write.last.kept == []


def test_a_wrong_field_in_the_file_is_refused_in_a_line(registered, tmp_path):
    registered()
    file = tmp_path / "prefect.yaml"
    entries = yaml.safe_load(file.read_text())
    entries["deployments"][0]["parameters"]["config"] = {"pretrain": {"lr": -1}}
    file.write_text(yaml.safe_dump(entries))
    with pytest.raises(
        UserError, match=r"tiny: Prefect refuses it: .*config\.pretrain\.lr.* -1 is less"
    ) as refused:
        registered()
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("pages", [pytest.param("", marks=pytest.mark.long), "/v2"])
def test_the_form_shows_each_setting_under_its_name_with_help_and_default_and_refuses_a_wrong_value(
    registered, prefect_server, pages
):
    deployment = registered()["tiny.pretrain"]
    place = f"{prefect_server.removesuffix('/api')}{pages}/deployments/deployment/{deployment['id']}/run"
    with open_browser() as page:
        page.goto(place)
        lr = field(page, "lr")
        expect(lr).to_have_value("0.0006")
        expect(page.get_by_text("Peak learning rate. Range: above 0.")).to_be_visible()
        expect(field(page, "model.layers")).to_have_value("12")
        expect(page.get_by_text("optimizer.momentum")).to_have_count(0)
        page.get_by_text("open", exact=True).first.click()
        expect(field(page, "optimizer.momentum")).to_have_value("0.95")
        lr.fill("-1")
        page.get_by_role("button", name=re.compile("^(Run|Submit)$")).last.click()
        expect(page.get_by_text("-1 is less than or equal to the minimum of 0").first).to_be_visible()
        page.goto(place)
        expect(lr).to_have_value("0.0006")
        lr.fill("0.001")
        with page.expect_response(lambda answer: "create_flow_run" in answer.url and answer.ok) as answer:
            page.get_by_role("button", name=re.compile("^(Run|Submit)$")).last.click()
        parameters = answer.value.json()["parameters"]
    assert parameters["config"]["pretrain"]["model.layers"] == 12, "a form sends what nobody touched, too"
    assert settings_in(parameters) == ["pretrain.lr=0.001"]


def field(page: Page, setting: str) -> Locator:
    """Where the value of a setting is typed."""
    label = page.get_by_text(f"{setting} (Optional)", exact=True)
    return label.locator("xpath=ancestor::*[.//input][1]//input").first


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
