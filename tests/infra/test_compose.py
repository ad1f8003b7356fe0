"""The compose file: its form, and whether what it starts exists and can be told what it is told."""

from __future__ import annotations

import copy
import re
import stat
import subprocess
import tomllib
from functools import cache
from typing import Any

import compose_spec
import pytest
import yaml
from known_names import INFRA, ROOT, parse, unknown

from flows.engine.services import GPU_POOL, POOL
from flows.prefect.up import DATABASES

FOLDER = INFRA / "compose"
FILE = FOLDER / "compose.yaml"


@cache
def example() -> dict[str, str]:
    """What .env.example sets."""
    lines = [line for line in (FOLDER / ".env.example").read_text().splitlines() if line and line[0] != "#"]
    return dict(line.split("=", 1) for line in lines)


def filled() -> str:
    """The file with the variables of .env.example in place."""
    return re.sub(r"\$\{(\w+)\}", lambda name: example()[name[1]], FILE.read_text())


@cache
def compose() -> dict[str, Any]:
    return yaml.safe_load(filled())


def services() -> dict[str, Any]:
    return compose()["services"]


def ours() -> dict[str, Any]:
    return {name: service for name, service in services().items() if service["image"].startswith("llmill/")}


class Flat(yaml.SafeDumper):
    """Writes what anchors and merges stand for, which the validator does not look up."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def validate(document: dict[str, Any]) -> None:
    compose_spec.PyOptions().from_yaml(yaml.dump(document, Dumper=Flat)).validate()


def test_it_is_what_the_specification_of_compose_says() -> None:
    validate(compose())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("volums", [], "volums"),
        ("depends_on", {"mlflow": {"condition": "service_well"}}, "service_well"),
        ("stop_grace_period", "soon", "soon"),
    ],
)
def test_the_validator_would_notice(key: str, value: Any, message: str) -> None:
    changed = copy.deepcopy(compose())
    changed["services"]["cpu"][key] = value
    with pytest.raises(ValueError, match=message):
        validate(changed)


def test_the_example_sets_each_variable_that_is_asked_for_and_no_other() -> None:
    assert set(re.findall(r"\$\{(\w+)\}", FILE.read_text())) == set(example())
    assert "$" not in filled()


def test_images_have_exact_versions_and_ours_are_targets_of_the_dockerfile() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    targets = re.findall(r"^FROM \S+ AS (\w+)$", (INFRA / "Dockerfile").read_text(), flags=re.MULTILINE)
    for service in services().values():
        assert re.search(r":\d+(\.\d+)+(-[a-z0-9.]+)?$", service["image"]), service["image"]
    for service in ours().values():
        build = service.get("build", {})
        assert service["image"] == f"llmill/{build['target']}:{version}"
        assert build["target"] in targets
        assert (FOLDER / build["context"] / build["dockerfile"]).samefile(INFRA / "Dockerfile")


def test_every_command_of_ours_exists() -> None:
    programs = {}
    for name, service in ours().items():
        command = service["command"]
        if command[:2] == ["python", "/opt/llmill/prepare.py"]:
            assert f"def {command[2]}()" in (INFRA / "prepare.py").read_text()
        else:
            programs[name] = parse(command)
    assert programs == {"prefect": "python", "mlflow": "mlflow", "cpu": "llmill", "gpu": "llmill"}


def test_every_variable_is_read_by_something() -> None:
    names = [name for service in services().values() for name in service.get("environment", {})]
    targets = [secret["target"] for service in ours().values() for secret in service.get("secrets", [])]
    assert "PREFECT_API_URL" in names
    assert not unknown([*names, *targets])


def test_no_secret_stands_in_the_file() -> None:
    for service in services().values():
        for name, value in service.get("environment", {}).items():
            assert not re.search("PASSWORD$|SECRET|_KEY", name), name
            assert not re.search(r"://\w+:\w+@", str(value)), value


def test_secrets_are_the_files_that_the_script_makes(tmp_path: Any) -> None:
    (tmp_path / "secrets.sh").write_text((FOLDER / "secrets.sh").read_text())
    make = ["sh", tmp_path / "secrets.sh", "llmill.example"]
    subprocess.run(make, check=True, capture_output=True)
    made = {path: path.read_bytes() for path in (tmp_path / "secrets").iterdir()}
    assert {path.name for path in made} == {*compose()["secrets"], "login"}
    for name, secret in compose()["secrets"].items():
        assert secret["file"] == f"./secrets/{name}"
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert (tmp_path / "secrets/s3_secret_key").read_text() in (
        tmp_path / "secrets/s3_identities"
    ).read_text()
    subprocess.run(make, check=True, capture_output=True)
    assert {path: path.read_bytes() for path in made} == made  # a second call changes nothing


def test_all_ports_are_bound_to_loopback_unless_somebody_says_otherwise() -> None:
    ports = [port for service in services().values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_nothing_of_ours_may_become_more_than_it_is() -> None:
    for name, service in ours().items():
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"]
        assert "user" not in service  # the image says who


def test_what_waits_for_health_waits_for_a_service_that_tells_of_it() -> None:
    waits = 0
    for service in services().values():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services()[other] or services()[other]["build"]["target"] in (
                    "cpu",
                    "gpu",
                )
                waits += 1
            else:
                assert services()[other]["restart"] == "no"
    assert waits >= 6


def test_workers_serve_llmills_pools_and_keep_one_home() -> None:
    commands = {name: services()[name]["command"] for name in ("cpu", "gpu")}
    assert [command[command.index("--pool") + 1] for command in commands.values()] == [POOL, GPU_POOL]
    homes = {services()[name]["environment"]["LLMILL_HOME"] for name in commands}
    [home] = homes
    assert all(f"home:{home}" in services()[name]["volumes"] for name in commands)
    [device] = services()["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_the_servers_keep_their_data_in_the_databases_that_the_job_makes() -> None:
    urls = {
        "prefect": services()["prefect"]["environment"]["PREFECT_SERVER_DATABASE_CONNECTION_URL"],
        "mlflow": services()["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"],
    }
    assert {name: url.rpartition("/")[2] for name, url in urls.items()} == DATABASES


def test_shell_scripts_are_valid() -> None:
    scripts = [*INFRA.rglob("*.sh"), *INFRA.rglob("*.sbatch")]
    assert scripts
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
