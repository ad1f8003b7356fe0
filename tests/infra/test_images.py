"""The one Dockerfile: what a linter and a look at its stages can tell without an engine that builds it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import httpx
import pytest
from known_names import INFRA, ROOT, parse, unknown

DOCKERFILE = INFRA / "Dockerfile"
TARGETS = ("servers", "cpu", "gpu")


def instructions() -> list[tuple[str, str]]:
    """(instruction, its words) in order, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage -> its instructions, those of the stages that it is made from first."""
    found: dict[str, list[tuple[str, str]]] = {}
    current = ""
    for word, rest in instructions():
        if word == "FROM":
            base, _, current = rest.partition(" AS ")
            found[current] = [(word, rest), *found.get(base, [])]
        else:
            found[current].append((word, rest))
    return found


def last(stage: str, word: str) -> str:
    return [rest for name, rest in stages()[stage] if name == word][-1]


def test_the_linter_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_base_images_have_exact_versions() -> None:
    names = set(stages())
    bases = [rest.split(" AS ")[0] for word, rest in instructions() if word == "FROM"]
    outer = [base for base in bases if base not in names]
    assert outer
    assert all(re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+[a-z0-9.-]*", base) for base in outer), outer


@pytest.mark.parametrize("target", TARGETS)
def test_every_image_runs_as_the_same_user_who_is_not_root(target: str) -> None:
    assert last(target, "USER") == "10001:10001"


@pytest.mark.parametrize("target", TARGETS)
def test_what_an_image_starts_is_a_command_that_exists(target: str) -> None:
    words = re.findall(r'"([^"]*)"', last(target, "CMD"))
    assert parse(words) == ("python" if target == "servers" else "llmill")


def test_mlflows_server_imports_of_llmill_its_pages_alone() -> None:
    """The servers' image has few packages, and llmill without what it needs elsewhere."""
    code = (
        "import sys, flows.listeners.mlflow.pages\n"
        "print(*(one for one in sys.modules if one.partition('.')[0] in ('flows', 'llm', 'data_pipeline')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {
        "flows", "flows.listeners", "flows.listeners.mlflow", "flows.listeners.mlflow.pages",
    }  # fmt: skip


def test_workers_are_asked_for_their_health_where_they_answer() -> None:
    from prefect.settings import PREFECT_WORKER_WEBSERVER_PORT

    for target in ("cpu", "gpu"):
        assert f"127.0.0.1:{PREFECT_WORKER_WEBSERVER_PORT.value()}/health" in last(target, "HEALTHCHECK")
        assert "--with-healthcheck" in last(target, "CMD")


def test_variables_in_images_are_read_by_something() -> None:
    pairs = [rest for word, rest in instructions() if word == "ENV"]
    assert not unknown([name for text in pairs for name in re.findall(r"([A-Z_]+)=", text)])


def test_all_packages_come_with_the_versions_of_the_constraints() -> None:
    for target in TARGETS:
        build = stages()[f"build-{target}"]
        assert any(word == "ENV" and "PIP_CONSTRAINT=/src/constraints.txt" in rest for word, rest in build)
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word, rest in instructions():
        for install in re.findall(r"pip install ([^&]*)", rest) if word == "RUN" else []:
            named = [name.strip("'\"") for name in install.split() if not name.startswith("-")]
            for name in named:
                if name.startswith("."):
                    assert set(re.findall(r"\w+", name)) <= set(extras)
                elif not name.startswith("$"):
                    assert re.split(r"[<\[]", name)[0] in pinned, name


def wheel(index: Path, name: str, version: str, *needs: str, extra: str = "") -> None:
    """Put an empty package into a folder that is laid out like an index of packages."""
    folder = index / name
    folder.mkdir(parents=True, exist_ok=True)
    about = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {need}\n" for need in needs)
    metadata += "".join(f"Provides-Extra: {one}\n" for one in extra.split())
    file = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{about}/METADATA", metadata)
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    links = "".join(f'<a href="{one.name}">{one.name}</a>' for one in sorted(folder.glob("*.whl")))
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")


def pip_of(venv: Path, **settings: str) -> dict[str, str]:
    """Make an environment in which ``pip`` is that of a new venv, and nothing of this machine is set for it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    script = venv / "bin" / "pip"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {venv}/bin/python "$@"\n')
    script.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    path = f"{venv / 'bin'}:{os.environ['PATH']}"
    return {
        **kept,
        "PATH": path,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        **settings,
    }


def test_torch_for_cpus_comes_from_its_own_index_and_all_else_as_pinned_from_the_other(
    tmp_path: Path,
) -> None:
    """Run the image's own commands with two small indexes of empty packages, laid out as the real ones are."""
    pins = dict(re.findall(r"^(torch|fsspec)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    torchs, pypi = tmp_path / "pytorch", tmp_path / "pypi"
    wheel(torchs, "torch", f"{pins['torch']}+cpu", "fsspec>=0.8.5")
    wheel(torchs, "torch", "99.0+cpu", "fsspec>=0.8.5")
    wheel(torchs, "fsspec", "2024.6.1")  # it has some of what torch needs, and never our versions
    wheel(pypi, "torch", pins["torch"], "fsspec>=0.8.5", "cuda-of-two-gigabytes")
    wheel(pypi, "fsspec", pins["fsspec"])
    wheel(pypi, "llmill", "0.1.0", "torch", "fsspec", extra="dask s3")
    [commands] = [rest for word, rest in stages()["build-cpu"] if word == "RUN" and "TORCH_INDEX" in rest]
    environment = pip_of(
        tmp_path / "venv",
        TORCH_INDEX=torchs.as_uri(),
        PIP_INDEX_URL=pypi.as_uri(),
        PIP_CONSTRAINT=str(ROOT / "constraints.txt"),
    )
    script = commands.replace("'.[dask,s3]'", "'llmill[dask,s3]'")
    done = subprocess.run(["sh", "-ec", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.name for path in tmp_path.glob("venv/lib/*/site-packages/*.dist-info")}
    assert f"torch-{pins['torch']}+cpu.dist-info" in found
    assert f"fsspec-{pins['fsspec']}.dist-info" in found


@pytest.mark.long
def test_pip_finds_the_torch_of_the_cpu_image_in_its_real_index(tmp_path: Path) -> None:
    [index] = [
        rest.split("=", 1)[1] for word, rest in stages()["build-cpu"] if rest.startswith("TORCH_INDEX=")
    ]
    try:
        httpx.get(f"{index}/torch/", timeout=10, follow_redirects=True).raise_for_status()
    except httpx.HTTPError as error:
        pytest.skip(f"{index} can't be had from here: {error}")
    environment = pip_of(tmp_path / "venv", PIP_CONSTRAINT=str(ROOT / "constraints.txt"))
    report = tmp_path / "report.json"
    command = [
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "--report",
        str(report),
        "--index-url",
        index,
        "torch",
    ]
    subprocess.run(command, env=environment, check=True)
    [found] = json.loads(report.read_text())["install"]
    pin = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin
    assert found["metadata"]["version"] == f"{pin[1]}+cpu"
    pinned = (ROOT / "constraints.txt").read_text().lower()
    for need in found["metadata"].get("requires_dist", []):
        if "extra ==" not in need:
            assert f"\n{re.split(r'[^A-Za-z0-9_.-]', need)[0].lower()}==" in pinned, need


def test_what_is_copied_is_there_and_is_sent_to_the_engine() -> None:
    sent = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    for word, rest in instructions():
        if word == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(
                    line[1:] and source.startswith(line[1:]) for line in sent if line.startswith("!")
                ), source


def test_the_entrypoint_makes_variables_of_secrets_and_becomes_the_command(tmp_path: Path) -> None:
    (tmp_path / "PGPASSWORD").write_text("a b'c")
    (tmp_path / "tls_key").write_text("no variable")
    text = (INFRA / "entrypoint.sh").read_text()
    script = tmp_path / "entry.sh"
    script.write_text(text.replace("/run/secrets", str(tmp_path)))
    command = ["sh", script, "sh", "-c", 'echo "$PGPASSWORD|${tls_key:-}"; exit 3']
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]}
    )
    assert (done.returncode, done.stdout) == (3, "a b'c|\n")


def test_the_entrypoint_needs_no_secrets() -> None:
    done = subprocess.run(
        ["sh", INFRA / "entrypoint.sh", "echo", "well"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "well\n"


def test_an_installed_llmill_has_all_files_of_its_packages():
    """An image installs copies; a clone for development would not miss what is left out."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    taken = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package).glob(pattern)
    }
    packages = [name.removesuffix("*") for name in settings["packages"]["find"]["include"]]
    there = {path for package in packages for path in (ROOT / package).rglob("*") if path.is_file()}
    assert {path for path in there if path.suffix != ".py" and path.parent.name != "__pycache__"} == taken
